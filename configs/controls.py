"""Controls for the full mechanism, the rows of a results table. Each is derived from another experiment's config.

    base          the base model, frozen
    sft           its q, k and v projections in the same blocks, fine-tuned
    lora          a plain LoRA on them (T = 1, M = 1, h = x~) of rank M r, with as many parameters as the experts
    mixture       experts without recursion (T = 1)
    recursion     recursion without a mixture (M = 1)
    without_mod   recursion and mixture, h = LN(a)
    full          the experiment itself

The rows differ in nothing else. Each starts from the base in `init.workdir`.

Options, after a colon: base=digits (a file in this directory), row=full (or another row). For example
configs/controls.py:base=digits,row=lora with --config.init.workdir=BASE_RUN
"""

import importlib.util
from pathlib import Path

import ml_collections

from trm_diffusion.config import variant
from trm_diffusion.errors import UserError
from trm_diffusion.models.recursion import recursive_blocks

ROWS = ("base", "sft", "lora", "mixture", "recursion", "without_mod", "full")


def control(config: ml_collections.ConfigDict, row: str) -> ml_collections.ConfigDict:
    """The config of one row. Raises UserError if the row is unknown or the experiment has no recursion."""
    if row not in ROWS:
        raise UserError(f"row {row!r} is none of {', '.join(ROWS)}")
    config = config.copy_and_resolve_references()
    model, recursion = config.model, config.model.recursion
    blocks = recursive_blocks(recursion.blocks, model.depth)
    if not blocks:
        raise UserError("config.model.recursion.blocks is none: controls need an experiment with recursion")
    config.name = f"{config.name}_{row}"
    config.train.trainable = "recursion"
    config.init.missing = "*/recursion/*"
    if row in ("base", "sft"):
        recursion.blocks, config.init.missing = "none", ""
        config.train.trainable = "none"  # no parameter has this name
    if row == "sft":
        model.scan_blocks = False  # a scanned stack holds the projections of all blocks in one parameter
        stream = "visual/" if model.architecture == "mmdit" else ""
        names = (f"stack/segments/{block}/blocks/{stream}attention/qkv/*" for block in blocks)
        config.train.trainable = ",".join(names)
    if row == "lora":
        rank = recursion.experts * recursion.rank
        recursion.update(latent_steps=1, experts=1, rank=rank, normalization=False, modulation=False)
    if row == "mixture":
        recursion.latent_steps = 1
    if row == "recursion":
        recursion.experts = 1
    if row == "without_mod":
        recursion.modulation = False
    if recursion.experts == 1:
        recursion.experts_per_token = 1
    return config


def get_config(argument: str = ""):
    options = variant(argument, base="digits", row="full")
    path = Path(__file__).with_name(f"{options['base']}.py")
    if not path.exists():
        raise UserError(f"base={options['base']}: there is no {path.name} in configs/")
    spec = importlib.util.spec_from_file_location(options["base"], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return control(module.get_config(), options["row"])
