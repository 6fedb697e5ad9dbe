"""A run's directory: its files, and saving, loading and comparing its config.

config.json        the resolved config, with the format and the package version
latent.json        the latent spec, for a model of latents
text.json          how texts were encoded, for a model of encoded text
words.json         the vocabulary and the captions of grids, for a model of words
checkpoints/       Orbax checkpoints, by update number, each with its checksums.json
checkpoints_set_aside/   newer checkpoints, after a resume from an older one
metrics.jsonl      one line of metrics every `log.every` updates
tensorboard/       the same metrics as event files
samples/           grids drawn during training and by --mode=sample
evaluation.json    metrics, with their evaluation settings
analysis.json      routing and halting by diffusion step, from --mode=analyze
.claim             while it trains: who does (run/claim.py)
"""

import ml_collections
from etils import epath

import trm_diffusion
from trm_diffusion.config import Config, resolve, to_dict
from trm_diffusion.errors import UserError
from trm_diffusion.files import write_json
from trm_diffusion.readers.records import read_json

FORMAT = 1  # version of the directory's and the checkpoints' format
# Config fields that must not change when a run resumes; changes of other fields are reported.
STRUCTURE = (
    "model",
    "diffusion",
    "data.image_size",
    "data.channels",
    "data.num_classes",
    "data.context_channels",
    "train.trainable",
    "train.frozen_dtype",
    "optim.ema_decays",
)

# Exceptions that do not change the trained model: how it and its loss are computed, when tokens halt, and where its
# text encoders are (text.json records which encoders these must be).
FREE = (
    "model.remat",
    "model.attention",
    "model.text.pretrained",
    "model.text.revision",
    "model.text.pretrained_dtype",
    "model.recursion.remat",
    "model.recursion.dispatch",
    "model.recursion.halting_epsilon",
    "model.recursion.halting_patience",
    "diffusion.normal_cdf",
)


def save_config(workdir: epath.Path, config: Config) -> None:
    record = {"format": FORMAT, "version": trm_diffusion.__version__, "config": to_dict(config)}
    write_json(workdir / "config.json", record)


def load_config(workdir: epath.Path) -> Config:
    """The config of a run. Raises UserError if there is no run, or one of a newer format."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json); train first, or give the right --workdir")
    record = read_json(path, {"format": int, "config": dict})
    if record["format"] > FORMAT:
        raise UserError(
            f"{path} has format {record['format']}; this version reads up to {FORMAT}: update trm_diffusion"
        )
    try:
        return resolve(ml_collections.ConfigDict(record["config"]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def changed_fields(workdir: epath.Path, config: Config) -> list[str]:
    """Fields in which `config` differs from the run's. Raises UserError if one of `STRUCTURE`, less `FREE`, does."""
    before, now = (dict(_leaves(to_dict(c))) for c in (load_config(workdir), config))
    changed = [path for path in now if before.get(path) != now[path]]
    free = {*FREE, "model.recursion.halting"} if _same_halting_parameters(before, now) else FREE
    structural = [path for path in changed if path.startswith(STRUCTURE) and path not in free]
    if structural:
        path = structural[0]
        raise UserError(
            f"{workdir} holds a run with config.{path} = {before.get(path)!r}, not {now[path]!r}; "
            "use that run's config, or another --workdir"
        )
    return [f"{path}: {before.get(path)!r} -> {now[path]!r}" for path in changed]


def _same_halting_parameters(before: dict, now: dict) -> bool:
    """Whether both have the same halting parameters; only the rule "learned" has any, so the others may be switched."""
    return "learned" not in (before["model.recursion.halting"], now["model.recursion.halting"])


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
