"""A config of everything, small enough to compile and run in seconds."""

import os
import subprocess
import sys
from pathlib import Path

from trm_diffusion.config import Config, default_config, resolve

ROOT = Path(__file__).parents[2]


def tiny_config(**overrides) -> Config:
    """Digits with two blocks, one of which recurses; `overrides` are dotted fields with __ for the dots."""
    c = default_config()
    c.name = "tiny"
    c.model.update(depth=2, width=16, heads=2, patch=4, dtype="float32")
    c.model.recursion.update(blocks="1", rank=4, routing_group=2)
    c.train.update(updates=8, batch_size=8)
    c.optim.update(lr=1e-2, ema_decays=(0.9,), weight_decay=0.01, clip_norm=1.0, warmup_steps=2, schedule="cosine")
    c.sample.update(diffusion_steps=2, guidance=2.0, per_class=1, batch_size=8)
    c.log.update(every=2, samples_every=0, tensorboard=False)
    c.checkpoint.every = 4
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return resolve(c)


def command(*arguments: str, devices: int = 1, **options) -> subprocess.Popen:
    """Starts `python -m trm_diffusion.main` with these arguments on this many CPU devices."""
    environment = dict(os.environ)
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "trm_diffusion.main", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for the command, which must end with `code`; returns its output and error texts."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err
