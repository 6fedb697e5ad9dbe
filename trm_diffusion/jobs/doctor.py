"""The doctor job: reports what this machine has, what is missing, and whether the package can run here."""

import importlib.metadata
import json
import os
import platform
import shutil

from trm_diffusion.runtime.logging import say

REQUIRED = (
    "jax", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "tensorflow-datasets", "chex",
    "numpy", "pillow", "scikit-learn", "tensorboardX", "tqdm",
)  # fmt: skip
OPTIONAL = {  # package: what it is for
    "wandb": "--config.log.wandb",
    "torch": "--mode=convert from .pt files (requirements-torch.txt)",
    "huggingface_hub": "--mode=convert from hub ids",
    "gcsfs": "workdirs on gs://",
    "tensorflow": "preparing TFDS data sets that need it",
}


def doctor() -> bool:
    """Prints versions, devices and memory, then one JSON line; returns whether all requirements are met."""
    report = {"python": platform.python_version(), "cpus": os.cpu_count()}
    report["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    report["disk_free_gib"] = round(shutil.disk_usage(".").free / 2**30, 1)
    report["packages"] = {name: _version(name) for name in REQUIRED}
    report["missing"] = [name for name, version in report["packages"].items() if version is None]
    say(
        f"python {report['python']}, {report['cpus']} CPUs, {report['memory_gib']} GiB of memory, "
        f"{report['disk_free_gib']} GiB of disk free"
    )
    for name, version in report["packages"].items():
        say(f"{name} {version or 'is MISSING: pip install -r requirements.txt'}")
    for name, use in OPTIONAL.items():
        say(f"{name} {_version(name) or 'is not installed'} (optional: {use})")
    report["devices"] = []
    if "jax" not in report["missing"]:
        import jax

        for device in jax.devices():
            memory = (device.memory_stats() or {}).get("bytes_limit")
            gib = round(memory / 2**30, 1) if memory else None
            report["devices"].append({"kind": device.device_kind, "platform": device.platform, "memory_gib": gib})
            say(f"device {device.id}: {device.device_kind} ({device.platform})" + (f", {gib} GiB" if gib else ""))
    report["pass"] = not report["missing"] and bool(report["devices"])
    print(json.dumps(report), flush=True)
    return report["pass"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
