"""What a run's data were made of, kept in its directory, so that a resume notices other data under the same names.

It is cheap: the hashes in the manifests of shards, and sizes and modification times of image files, which are not read.
Of data that are computed (digits, scenes, mazes, synthetic) or versioned (TFDS), only the number of records is kept.
"""

import json

import numpy as np
from etils import epath

from trm_diffusion.data.base import Source
from trm_diffusion.data.origins import first_few, stats_of
from trm_diffusion.errors import UserError
from trm_diffusion.files import replacing, sha256_of_names
from trm_diffusion.readers.arrays import NpzFile
from trm_diffusion.readers.records import parse
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import is_main_process

DATA_FILE = "data.npz"  # in a run's directory: "about", a JSON text, and "stats", int64 [N, 2]: size and time (ns)


def check_data(source: Source, workdir: epath.Path) -> None:
    """Raises UserError if the data are not those that the run was trained on, and says what has changed.

    Files that only have another modification time, as after a copy, are reported and accepted.
    """
    path = workdir / DATA_FILE
    if not path.exists():
        return
    before, stats_before = _read(path)
    now, stats = _describe(source)
    if now["records"] != before["records"]:
        raise UserError(
            f"the data have {now['records']} records, and {before['records']} when the run in {workdir} was saved: "
            "restore them, or use another --workdir"
        )
    hashes, hashes_before = now["shards"], before["shards"]
    changed = [name for name in {**hashes_before, **hashes} if hashes_before.get(name) != hashes.get(name)]
    if not changed and now["names_sha256"] != before["names_sha256"]:
        raise _other_data(path, "records of other names")
    differs = stats != stats_before if stats.shape == stats_before.shape else np.zeros((0, 2), bool)
    changed += [source.name(int(index)) for index in np.flatnonzero(differs[:, 0])]
    if changed:
        raise _other_data(path, f"other content for {first_few(changed, 'file')}")
    if differs.any():
        named = first_few([source.name(int(index)) for index in np.flatnonzero(differs[:, 1])], "file")
        say(f"warning: of the data, {named} of equal size have another modification time than before: did they change?")


def keep_data(source: Source, workdir: epath.Path) -> None:
    """Saves what `check_data` compares; only process 0 writes."""
    if is_main_process():
        about, stats = _describe(source)
        with replacing(workdir / DATA_FILE) as partial, partial.open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), stats=stats)


def _describe(source: Source) -> tuple[dict, np.ndarray]:
    stats = stats_of(source)
    names = sha256_of_names(map(source.name, range(len(source)))) if len(stats) else ""
    return {"records": len(source), "shards": source.shard_hashes(), "names_sha256": names}, stats


def _read(path: epath.Path) -> tuple[dict, np.ndarray]:
    form = {"records": int, "shards": dict, "names_sha256": str}
    try:
        arrays = NpzFile(path)
        about = parse(str(arrays.read("about", (), kinds="U")), form, str(path))
        return about, arrays.read("stats", (None, None), kinds="i")
    except UserError:
        raise UserError(
            f"{path} is damaged, so it is unknown what this run was trained on: remove it to go on"
        ) from None


def _other_data(path: epath.Path, what: str) -> UserError:
    return UserError(
        f"the data have {what} than when this run was saved: restore them, use another --workdir, or remove {path} to "
        "go on with the data as they are now"
    )
