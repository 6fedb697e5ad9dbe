"""What a job leaves, in a form that can be compared.

    python -m tests.campaign.results WORKDIR

prints one JSON line about a run: the hash of its restored state, its metrics without wall-clock fields, its samples.
"""

import hashlib
import json
import sys
from pathlib import Path

from tests.campaign.commands import Outcome, run

FREE = ("version", "git_commit", "jax", "device")  # fields of sampling.json about software and device


def of_folder(folder: Path) -> dict[str, str]:
    """The hash of every file that is not hidden, by its path; records without the fields in FREE."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    found = {str(path.relative_to(folder)): _digest(path) for path in paths}
    beside = folder.with_name(f"{folder.name}.sampling.json")
    return found | ({beside.name.replace(folder.name, "OUT"): _digest(beside)} if beside.exists() else {})


def of_run(workdir: Path) -> dict:
    """What the module prints, or {"error": ...}."""
    outcome = run("tests.campaign.results", str(workdir))
    lines = [line for line in outcome.output.splitlines() if line.startswith('{"state"')]
    return json.loads(lines[0]) if outcome.code == 0 and lines else {"error": reason(outcome)}


def reason(outcome: Outcome) -> str:
    return outcome.error or outcome.output.strip()[-300:]


def difference(found: dict, wanted: dict) -> str:
    """The first difference between two results, or ""."""
    if "error" in found:
        return f"cannot be read: {found['error']}"
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            what = "missing" if name not in found else "left over" if name not in wanted else "different"
            return f"{name} is {what}"
    return ""


def debris(directory: Path) -> str:
    """A temporary file or directory that a killed job left, or ""."""
    for path in sorted(directory.rglob("*")):
        if ".partial-" in path.name or "checkpoint-tmp" in path.name:
            return str(path.relative_to(directory))
    return ""


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.name.endswith("sampling.json"):
        try:
            data = json.dumps({name: value for name, value in json.loads(data).items() if name not in FREE}).encode()
        except (ValueError, AttributeError):
            pass
    return hashlib.sha256(data).hexdigest()


def _print_run(workdir: Path) -> None:
    import jax
    import numpy as np
    from etils import epath

    from trm_diffusion.files import sha256_of_arrays
    from trm_diffusion.run.restore import load_run
    from trm_diffusion.run.workdir import load_config
    from trm_diffusion.runtime.logging import WALL_CLOCK_FIELDS

    _, state = load_run(load_config(epath.Path(workdir)), epath.Path(workdir))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    samples = {path.name: np.load(path)["images"] for path in sorted((workdir / "samples").glob("*.npz"))}
    result = {
        "state": sha256_of_arrays(arrays),
        "metrics": [{k: v for k, v in line.items() if k not in WALL_CLOCK_FIELDS} for line in lines],
        "samples": sha256_of_arrays(samples.items()),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _print_run(Path(sys.argv[1]))
