"""Arrays and safetensors: a header that claims more than the file holds is refused before anything is allocated."""

import io
import json
import struct
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from tests.readers.written import damaged, one_line_or_nothing
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.image_sets import NpzImages
from trm_diffusion.readers.arrays import NpzFile, read_npy
from trm_diffusion.weights.safetensors import read_safetensors
from trm_diffusion.weights.source import open_source, without_wrappers

IMAGES = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)


def npy_header(shape, dtype="|u1", fortran_order=False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": fortran_order, "shape": shape})
    return stream.getvalue()


def npz(path, compression=zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_arrays_come_back(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", IMAGES, columns=np.asfortranarray(IMAGES[..., 0]), number=np.float32(3))
        file = NpzFile(tmp_path / "a.npz")
        np.testing.assert_array_equal(file.read("arr_0", (None, 4, 4, 3)), IMAGES)
        np.testing.assert_array_equal(file.read("columns", (6, 4, 4)), IMAGES[..., 0])
        assert file.read("number", ()) == 3 and [*file.headers] == ["columns", "number", "arr_0"]
        np.testing.assert_array_equal(np.concatenate(list(NpzImages(tmp_path / "a.npz").batches(4))), IMAGES)
    np.save(tmp_path / "a.npy", np.asfortranarray(IMAGES))
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy", (None, 4, 4, 3)), IMAGES)
    for shape, kinds in (((None, 4, 4), "u"), ((5, 4, 4, 3), "u"), ((None, 4, 4, 3), "f")):
        with pytest.raises(UserError, match="a.npy is uint8 .*; it must be"):
            read_npy(tmp_path / "a.npy", shape, kinds)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("header", "says"),
    [
        (npy_header((2**40, 64, 64, 3)), "takes 13,510,798,882,111,488 bytes"),
        (npy_header((2**62, 2**62)), "takes"),
        (npy_header((-1, 4, 4, 3)), "takes"),
        (npy_header((1, 1, 1, 3), "<f8"), "takes 24 bytes"),
        (npy_header((3,), "|O"), "Python objects"),
        (b"\x93NUMPY\1\0\xff\xff{", "EOF|header"),
    ],
)
def test_a_header_that_claims_more_than_there_is(tmp_path, compression, header, says):
    path = npz(tmp_path / "a.npz", compression, arr_0=header + bytes(3))
    (tmp_path / "a.npy").write_bytes(header + bytes(3))
    for read in (NpzImages, lambda path: read_npy(path.with_suffix(".npy"), (None, 4, 4, 3))):
        with pytest.raises(UserError, match=f"a.np[zy] is damaged, or is not an? .np[zy] file .*{says}"):
            read(path)


def test_a_member_that_claims_more_than_its_bytes(tmp_path):
    data = bytearray(
        npz(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, arr_0=npy_header((1, 1, 1, 3)) + bytes(3)).read_bytes()
    )
    directory = data.index(b"PK\1\2")
    data[directory + 24 : directory + 28] = struct.pack("<I", 2**31)  # the uncompressed size
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match="arr_0.npy claims 2,147,483,648 bytes"):
        NpzFile(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.array(["dog"] * 6), "arr_1 is <U3"),
        (np.zeros(6), "arr_1 is float64"),
        (np.zeros(5, np.int64), r"arr_1 is int64 \[5\]; it must be whole numbers \[6\]"),
        (np.zeros(6, ml_dtypes.bfloat16), "arr_1 is .V2"),
        (np.array([{}] * 6), "Python objects"),
    ],
)
def test_labels_are_whole_numbers(tmp_path, labels, says):
    np.savez(tmp_path / "a.npz", IMAGES, labels)
    with pytest.raises(UserError, match=says):
        NpzImages(tmp_path / "a.npz")


def test_one_flipped_byte_is_noticed_while_images_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[600] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match="a.npz is damaged"):
        list(NpzImages(tmp_path / "a.npz").batches(6))


def small_npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, IMAGES[:2], np.arange(2))
    return stream.getvalue()


@settings(max_examples=40, deadline=None)
@given(damaged(small_npz()))
def test_a_damaged_npz_is_one_line(data):
    with tempfile.NamedTemporaryFile(suffix=".npz") as file, one_line_or_nothing():
        file.write(data)
        file.flush()
        list(NpzImages(Path(file.name)).batches(4))


ENTRIES = {"a": ("F32", [2], (0, 8)), "b": ("BF16", [1, 2], (8, 12)), "c": ("F8_E4M3", [3], (12, 15))}


def safetensors(entries=ENTRIES, data=bytes(15), header=None, length=None) -> bytes:
    fields = ("dtype", "shape", "data_offsets")
    record = {name: dict(zip(fields, entry, strict=True)) for name, entry in entries.items()}
    text = json.dumps(record).encode() if header is None else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_safetensors_of_every_listed_dtype_come_back(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(safetensors(data=bytes(range(15))))
    tensors = read_safetensors(tmp_path / "x.safetensors")
    assert tensors["b"].dtype == ml_dtypes.bfloat16 and tensors["c"].dtype == ml_dtypes.float8_e4m3fn
    assert tensors["b"].tobytes() == bytes(range(8, 12)) and tensors["b"].shape == (1, 2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (safetensors(ENTRIES | {"b": ("BF16", [1, 2], (6, 10))}), "b overlaps|b .*follow"),
        (safetensors(ENTRIES | {"d": ("F32", [2], (0, 8))}), "d overlaps the tensor before it"),
        (safetensors({"a": ("F32", [2], (4, 12))}, bytes(12)), "a does not follow the tensor before it"),
        (safetensors({"a": ("F32", [-1], (0, -4))}, b""), "a of shape"),
        (safetensors({"a": ("F32", [2**62, 4], (0, 0))}, b""), "a of shape"),
        (safetensors({"a": ("F32", [-2, -1], (0, 8))}, bytes(8)), "a of shape"),
        (safetensors({"a": ("F32", [2], (0, 8))}, bytes(4)), "truncated: a ends at byte 8 of 4"),
        (safetensors({"a": ("F32", [2], (0, 8))}, bytes(9)), "end at byte 8 of 9"),
        (safetensors({"a": ("F8_E8M0", [1], (0, 1))}, bytes(1)), "a has the dtype F8_E8M0, which is not read"),
        (safetensors({"a": ("F4", [1], (0, 1))}, bytes(1)), "a has the dtype F4, which is not read"),
        (safetensors({"a": (3, [1], (0, 1))}, bytes(1)), "a.dtype is 3, not text"),
        (safetensors({"a": ("F32", "1", (0, 4))}, bytes(4)), "a.shape is '1', not a list"),
        (safetensors({"a": ("F32", [1.0], (0, 4))}, bytes(4)), "not a whole number"),
        (safetensors({"a": ("F32", [1], (0, 4, 8))}, bytes(4)), "a.data_offsets has 3 entries"),
        (safetensors(header=b"[1]"), "not an object"),
        (safetensors(header=b"\xff\xff"), "is not UTF-8"),
        (safetensors(length=2**60), "truncated in its header"),
        (b"\1\2", "truncated in its header"),
        (safetensors({}, b""), "holds no tensors"),
    ],
)
def test_a_header_that_does_not_fit_its_file(tmp_path, data, says):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"x.safetensors.* ({says})"):
        open_source(str(tmp_path / "x.safetensors"))


@settings(max_examples=50, deadline=None)
@given(damaged(safetensors()))
def test_a_damaged_safetensors_file_is_one_line(data):
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file, one_line_or_nothing():
        file.write(data)
        file.flush()
        read_safetensors(file.name)


def test_side_files_of_weights_are_checked(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors())
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransf')
    with pytest.raises(UserError, match="config.json: not JSON"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").unlink()
    index = tmp_path / "model.safetensors.index.json"
    for text, says in (
        ("{}", "weight_map is missing"),
        ('{"weight_map": {"a": 3}}', "weight_map.a is 3, not text"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not the name of a file beside it"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=f"index.json.* {says}"):
            open_source(str(tmp_path))


def test_prefixes_of_wrappers_are_removed_from_all_names_or_none():
    assert without_wrappers({"module._orig_mod.a": 1, "module._orig_mod.module": 2}) == {"a": 1, "module": 2}
    assert without_wrappers({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
