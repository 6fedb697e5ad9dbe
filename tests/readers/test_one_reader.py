"""Modules outside `trm_diffusion/readers` open no file to read themselves, and list no folder."""

import ast
from pathlib import Path

import trm_diffusion

ROOT = Path(trm_diffusion.__file__).parent
# Calls that read, by method or as MODULE.FUNCTION, and those that make a path of what a user wrote
METHODS = {"read_text", "read_bytes", "iterdir", "glob", "rglob", "walk", "scandir", "listdir", "expanduser"}
FUNCTIONS = {
    "open", "Path", "pathlib.Path", "epath.Path", "json.load", "json.loads", "np.load", "np.memmap", "np.fromfile",
    "np.genfromtxt", "np.loadtxt", "Image.open", "tarfile.open", "zipfile.ZipFile", "torch.load", "pickle.load",
    "pickle.loads", "gzip.open", "os.open", "os.walk", "io.open",
}  # fmt: skip
WRITING = ("'w'", "'wb'", "'a'", "'ab'")
ALLOWED = {
    "files.py": {"epath.Path", "pathlib.Path", "rglob", "glob", "open"},  # writes, hashes, clears what it left
    "machine.py": {"pathlib.Path", "read_text"},  # of the operating system
    "analysis/grids.py": {"epath.Path", "read_bytes", "Image.open"},  # marks of its own PNG files, to compare
    "run/claim.py": {"epath.Path", "json.loads", "read_bytes", "iterdir", "glob", "os.open", "open"},  # its own claims
    "runtime/checkpoints.py": {"epath.Path"},  # of the run, as Orbax writes it
    "runtime/checksums.py": {"read_bytes", "iterdir", "json.loads", "open"},  # bytes of checkpoints, to compare
    "metrics/geneval.py": {"read_bytes"},  # its own files, to compare
    "runtime/logging.py": {"read_text", "json.loads", "open"},  # metrics.jsonl, whose damaged lines are dropped
    "runtime/processes.py": {"json.loads"},  # messages between processes
    "runtime/libtpu.py": {"Path", "read_text", "json.loads"},  # its own files, and its child's answer
    "run/protocol.py": {"Path"},  # of the source code
    "jobs/compile_ahead.py": {"json.load"},  # standard input
    "jobs/export_images.py": {"zipfile.ZipFile", "read_bytes"},  # written; its own labels, to compare
    "weights/safetensors.py": {"np.memmap", "open"},  # after its header is checked; written
    "weights/torch_files.py": {"torch.load"},  # with weights_only
    "weights/source.py": {"Path"},  # of a download
}


def reading_calls(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            found.add(node.func.attr)
        elif name in FUNCTIONS:
            found.add(name)
        elif name.endswith(".open") and not any(mode in WRITING for mode in map(ast.unparse, node.args)):
            found.add("open")
    return found


def test_no_module_reads_without_its_reader():
    others = [path for path in sorted(ROOT.rglob("*.py")) if ROOT / "readers" not in path.parents]
    found = {path.relative_to(ROOT).as_posix(): reading_calls(path) for path in others}
    assert {name: calls for name, calls in found.items() if calls - ALLOWED.get(name, set())} == {}
