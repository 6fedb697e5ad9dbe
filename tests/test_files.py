"""Files are written atomically, and checksums equal those of the hashlib module."""

import hashlib
import json

import numpy as np
import pytest

from trm_diffusion import files


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_json_is_readable_and_its_directory_is_made(tmp_path):
    files.write_json(tmp_path / "new" / "record.json", {"a": [1]}, indent=1)
    assert (tmp_path / "new" / "record.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'


def test_a_failure_halfway_leaves_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.replacing(path) as partial:
        partial.write_text("half of")
        assert json.loads(path.read_text()) == {"a": 1}  # readers see the old file while the new one is written
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == ["record.json"]


def test_a_directory_gets_its_name_when_it_is_full(tmp_path):
    for error in (RuntimeError, None):
        try:
            with files.replacing(tmp_path / "weights") as partial:
                partial.mkdir()
                (partial / "manifest.json").write_text("{}")
                assert not (tmp_path / "weights").exists()
                if error:
                    raise error
        except RuntimeError:
            assert names(tmp_path) == []
    assert names(tmp_path) == ["weights"] and names(tmp_path / "weights") == ["manifest.json"]


def test_what_a_killed_job_left_is_cleared_and_nothing_else(tmp_path):
    left = files.partial_path(tmp_path / "below" / "a.png")
    left.parent.mkdir()
    left.write_bytes(b"torn")
    others = ["a.png", ".hidden", "a.partial-1"]
    for name in others:
        (tmp_path / "below" / name).write_bytes(b"whole")
    files.clear_partial(tmp_path, "b.png")
    assert left.exists()
    files.clear_partial(tmp_path)
    assert names(tmp_path / "below") == sorted(others)


def test_checksums(tmp_path):
    def expected(data):
        return hashlib.sha256(data).hexdigest()

    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256_of_file(tmp_path / "file") == files.sha256_of_text("abc") == expected(b"abc")
    assert files.sha256_of_names(["a", "é"]) == expected("a\né\n".encode())
    assert files.sha256_of_json(["a", 1]) == expected(b'["a", 1]')
    transposed = np.arange(6, dtype="<i2").reshape(2, 3).T
    scalar = np.float32(1)
    assert files.sha256_of_arrays([("x ", transposed), ("y ", scalar)]) == expected(
        b"x " + np.ascontiguousarray(transposed).tobytes() + b"y " + scalar.tobytes()
    )
