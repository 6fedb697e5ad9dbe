"""The controls of another experiment, one row at a time (trm_diffusion/controls.py).

Options, after a colon: base=digits (a file of this directory), row=full (or base, sft, lora, mixture, recursion,
without_mod). For example configs/controls.py:base=digits,row=lora with --config.init.workdir=BASE_RUN
"""

import importlib.util
from pathlib import Path

from trm_diffusion.config import variant
from trm_diffusion.controls import control
from trm_diffusion.errors import UserError


def get_config(argument: str = ""):
    options = variant(argument, base="digits", row="full")
    path = Path(__file__).with_name(f"{options['base']}.py")
    if not path.exists():
        raise UserError(f"base={options['base']}: there is no {path.name} in configs/")
    spec = importlib.util.spec_from_file_location(options["base"], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return control(module.get_config(), options["row"])
