"""A damaged checkpoint is noticed before it is used: the message names the file and the newest sound checkpoint."""

import shutil
from pathlib import Path

import chex
import jax.numpy as jnp
import pytest
from etils import epath

from tests.runtime.test_checkpoints import LOOP, SMALL, abstract, batches
from trm_diffusion.errors import UserError
from trm_diffusion.runtime import checksums
from trm_diffusion.runtime.checkpoints import CheckpointConfig, Checkpoints
from trm_diffusion.runtime.checksums import NAME, find_damage, read_checksums, write_checksums

DAMAGES = {
    "one bit": lambda path, data: path.write_bytes(bytes([data[0] ^ 4]) + data[1:]),
    "the last bit": lambda path, data: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
    "zeroed": lambda path, data: path.write_bytes(bytes(len(data))),
    "cut": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "longer": lambda path, data: path.write_bytes(data + b"\0"),
    "emptied": lambda path, data: path.write_bytes(b""),
    "missing": lambda path, data: path.unlink(),
}


def damage(path, kind: str) -> None:
    DAMAGES[kind](path, path.read_bytes())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints 1, 2 and 3."""
    directory, iterator = tmp_path_factory.mktemp("checksums") / "checkpoints", batches()
    with Checkpoints(epath.Path(directory), CheckpointConfig(keep=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, SMALL, iterator, LOOP)
    iterator.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return epath.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files_of(checkpoint) -> list:
    return sorted(path for path in Path(checkpoint).rglob("*") if path.is_file() and path.name != NAME)


def restored(directory, config=None):
    iterator = batches()
    with Checkpoints(directory, config) as checkpoints:
        try:
            return checkpoints.restore(checkpoints.latest_step(), abstract(SMALL), iterator)
        finally:
            iterator.close()


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_of_every_file_is_found(saved, tmp_path, kind):
    record = read_checksums(epath.Path(saved / "3"))
    assert find_damage(epath.Path(saved / "3"), record) == ""
    for index, path in enumerate(files_of(saved / "3")):
        copy = tmp_path / str(index)
        shutil.copytree(saved / "3", copy)
        name = path.relative_to(saved / "3")
        damage(copy / name, kind)
        assert find_damage(epath.Path(copy), record).startswith(f"{name} ")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["state/_METADATA", "state/manifest.ocdbt", "data/process_0-of-1.json", NAME])
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_the_newest_sound_one(directory, file, kind):
    if (file, kind) == (NAME, "missing"):
        pytest.skip("without checksums nothing can be compared; see the test below")
    damage(directory / "3" / file, kind)
    with pytest.raises(UserError) as error:
        restored(directory)
    message = str(error.value)
    assert message.startswith("checkpoint 3 is damaged: ") and "\n" not in message and str(directory / "3") in message
    assert "newest sound checkpoint is 2: go on from it with --config.init.step=2" in message
    assert kind in ("one bit", "the last bit", "zeroed", "longer") or file == NAME or f"{file} " in message


def test_the_sound_checkpoint_that_is_named_is_one(directory):
    for step, kind in ((3, "emptied"), (2, "one bit")):
        damage(max(files_of(directory / str(step)), key=lambda path: path.stat().st_size), kind)
    with pytest.raises(UserError, match="newest sound checkpoint is 1: "):
        restored(directory)
    for path in files_of(directory / "1")[:1]:
        damage(path, "cut")
    with pytest.raises(UserError, match="No other checkpoint is sound"):
        restored(directory)


def test_a_checkpoint_without_checksums_is_restored_and_said_to_be_unverified(directory, capsys):
    (directory / "3" / NAME).unlink()
    chex.assert_trees_all_equal(restored(directory), (SMALL, LOOP))
    (line,) = capsys.readouterr().err.splitlines()
    assert "/3 cannot be verified: it has no checksums" in line
    (directory / "3" / "state" / "_METADATA").unlink()  # the libraries' error stays what it is
    with pytest.raises(UserError, match="does not match this config"):
        restored(directory)


def test_an_unverified_older_checkpoint_is_named_as_such(directory):
    damage(directory / "3" / "state" / "_METADATA", "cut")
    (directory / "2" / NAME).unlink()
    with pytest.raises(UserError, match="newest other checkpoint is 2 .it has no checksums.: go on from it"):
        restored(directory)


def test_verification_can_be_turned_off(directory):
    damage(directory / "3" / "commit_success.txt", "emptied")  # a file without which Orbax can do
    chex.assert_trees_all_equal(restored(directory, CheckpointConfig(verify=False)), (SMALL, LOOP))


def test_a_state_that_does_not_fit_is_no_damage(directory):
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(UserError, match="checkpoint 3 does not match this config"):
            checkpoints.restore(3, abstract({"step": jnp.zeros((), jnp.int32)}))


def test_a_file_of_many_chunks_is_shared_among_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK", 1000)
    monkeypatch.setattr(checksums, "BLOCK", 64)
    checkpoint = epath.Path(tmp_path)
    content = bytes(index % 251 for index in range(3500))
    (tmp_path / "array").write_bytes(content)
    write_checksums(checkpoint)
    record = read_checksums(checkpoint)
    assert len(record) < 400 and find_damage(checkpoint, record) == ""
    (tmp_path / "array").write_bytes(content[:2500] + b"\xff" + content[2501:])
    found = [find_damage(checkpoint, record, (index, 2)) for index in (0, 1)]
    assert found == ["array differs from its checksum", ""]  # the third of four chunks
    (tmp_path / "array").write_bytes(content[:3499])
    assert {find_damage(checkpoint, record, (index, 2)) for index in (0, 1)} == {
        "array has 3,499 bytes instead of 3,500"
    }
