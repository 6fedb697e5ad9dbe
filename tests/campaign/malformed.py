"""Malformed files, generated: recipes of bytes by file name, from hypothesis strategies."""

import copy
import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

LENGTHS = (0, 1, 2**31, 2**40, 2**63 - 1)  # what a header may claim
MODES = ("RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, data: bytes, end: int = 0) -> bytes:
    """`data` with one to three edits; end: only bytes before it are changed (0: all)."""
    for _ in range(draw(st.integers(1, 3))):
        limit = min(end or len(data), len(data))
        place = draw(st.integers(0, max(0, limit - 1)))
        edit = draw(st.sampled_from(("cut", "flip", "insert", "delete", "repeat", "zero")))
        if edit == "cut":
            data = data[:place]
        elif edit == "flip" and data:
            data = data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        elif edit == "insert":
            data = data[:place] + draw(st.binary(min_size=1, max_size=16)) + data[place:]
        elif edit == "delete":
            data = data[:place] + data[place + draw(st.integers(1, 64)) :]
        elif edit == "repeat":
            data = data[: place + 32] + data[place:]
        elif edit == "zero":
            data = data[:place] + bytes(min(32, len(data) - place)) + data[place + 32 :]
    return data


@st.composite
def edited(draw, record):
    """A JSON value with one entry, at any depth, removed or replaced by another JSON value."""
    record = copy.deepcopy(record)
    places = list(_places(record))
    if not places or draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    owner, key = draw(st.sampled_from(places))
    if draw(st.booleans()) and isinstance(owner, dict):
        del owner[key]
    else:
        owner[key] = draw(VALUES)
    return record


def _places(value):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from _places(inner)


@st.composite
def json_files(draw, record) -> bytes:
    """A JSON file of the record, wrong in its bytes or in its values, or nested too deeply."""
    kind = draw(st.sampled_from(("bytes", "values", "values", "values", "deep")))
    if kind == "deep":
        return b"[" * draw(st.sampled_from((1_000, 100_000)))
    if kind == "values":
        return json.dumps(draw(edited(record))).encode()
    return draw(damaged(json.dumps(record).encode()))


@st.composite
def text_files(draw, lines: list[str]) -> bytes:
    """Lines in some encoding, with some ends of lines, a mark at the start, or other damage."""
    end = draw(st.sampled_from(("\n", "\r\n", "\u2028", "\x85", "\x0b", "\n\n")))
    text = draw(st.sampled_from(("", "\ufeff"))) + end.join(lines) + draw(st.sampled_from(("", end, "caf\xe9", "\0")))
    data = text.encode(draw(st.sampled_from(("utf-8", "latin-1", "utf-16", "utf-8"))), errors="replace")
    return draw(damaged(data)) if draw(st.booleans()) else data


def _png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data do not have."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in (*chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(parts)


@st.composite
def images(draw) -> bytes:
    """An image file of a rare mode or size, damaged, or one that claims to be huge."""
    kind = draw(st.sampled_from(("mode", "thin", "damaged", "damaged", "damaged", "huge", "other")))
    if kind == "huge":
        return _png(draw(st.sampled_from((1, 2**16, 2**31 - 1))), draw(st.sampled_from((2**14, 2**20, 2**31 - 1))))
    if kind == "other":
        return draw(st.binary(max_size=64))
    size = draw(st.sampled_from(((1, 4000), (4000, 1), (1, 1)))) if kind == "thin" else (20, 16)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    mode = draw(st.sampled_from(MODES)) if kind != "thin" else "RGB"
    image = Image.fromarray(pixels)
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    try:
        image.save(buffer, draw(st.sampled_from(FORMATS)))
    except (OSError, KeyError, ValueError):  # this format has no such mode
        buffer = io.BytesIO()
        image.save(buffer, "TIFF")
    return draw(damaged(buffer.getvalue())) if kind == "damaged" else buffer.getvalue()


@st.composite
def tars(draw, members: dict[str, bytes]) -> bytes:
    """A tar of the members with odd entries among them: devices, links, sparse files, sizes that lie; or damaged."""
    parts = [_member(name, data, len(data)) for name, data in members.items()]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(("x.png", "x.cls", "../y.png", "/z.png", "._1.png", "d/e.png", "5.png")))
        kind = draw(st.sampled_from((b"0", b"1", b"2", b"3", b"5", b"6", b"S", b"g", b"x", b"L")))
        size = draw(st.sampled_from((0, 7, 10_000, 2**33 - 1, -512)))
        parts.insert(draw(st.integers(0, len(parts))), _member(name, bytes(min(max(size, 0), 512)), size, kind))
    data = b"".join(parts) + bytes(draw(st.sampled_from((1024, 1024, 10240, 0))))
    return draw(damaged(data)) if draw(st.booleans()) else data


def _member(name: str, data: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A member that claims to be `size` bytes long."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "0.png" if kind in b"12" else ""
    return info.tobuf(format=tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@st.composite
def arrays(draw, good: dict[str, np.ndarray]) -> bytes:
    """An npz with another array, dtype or claim than its reader expects, or damaged."""
    kind = draw(st.sampled_from(("bytes", "array", "claim", "claim", "missing", "pickle")))
    given = dict(good)
    name = draw(st.sampled_from(sorted(given)))
    if kind == "array":
        shape = draw(st.sampled_from(((), (0,), (6,), (6, 4, 4), (6, 4, 4, 5), (0, 4, 4, 3))))
        given[name] = np.ones(shape, draw(st.sampled_from(("u1", "f4", "i8", "U3", "M8[s]", "c8", "f2"))))
    elif kind == "missing":
        del given[name]
    elif kind == "pickle":
        given[name] = np.array([{}, None], object)
    buffer = io.BytesIO()
    np.savez(buffer, **given)
    if kind == "bytes":
        return draw(damaged(buffer.getvalue()))
    if kind == "claim":
        shape = (draw(st.sampled_from(LENGTHS)), 4, 4, 3)
        header = str({"descr": draw(st.sampled_from(("|u1", "<f8", "|O"))), "fortran_order": False, "shape": shape})
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for other, value in given.items():
                content = io.BytesIO()
                np.save(content, value, allow_pickle=False)
                lying = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(96)
                archive.writestr(f"{other}.npy", lying if other == name else content.getvalue())
    return buffer.getvalue()


@st.composite
def safetensors(draw, data: bytes) -> bytes:
    """A file of safetensors whose header lies or is damaged, or that is cut; the tensors' bytes are as they were."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw(st.sampled_from(("length", "values", "values", "bytes", "cut", "longer", "dtype")))
    if kind == "length":
        return draw(st.sampled_from(LENGTHS)).to_bytes(8, "little") + data[8:]
    if kind == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    if kind == "longer":
        return data + bytes(draw(st.integers(1, 100)))
    if kind == "bytes":
        return draw(damaged(data, end=8 + length))
    entry = header[draw(st.sampled_from(sorted(header)))]
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(("F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "I32", "U64", "C64", "F4", "")))
    else:
        changed = draw(edited(entry))
        entry.clear()
        entry.update(changed if isinstance(changed, dict) else {"dtype": changed})
        if draw(st.booleans()):
            entry["shape"] = draw(st.sampled_from(([-1], [2**40], [2**33, 2**33], [0], [1.5], "16", [True])))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@st.composite
def torch_files(draw) -> bytes:
    """What may stand in a .pt file: a pickle, a zip without weights, bytes."""
    kind = draw(st.sampled_from(("bytes", "zip", "pickle")))
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", draw(st.binary(max_size=32)))
        return buffer.getvalue()
    if kind == "pickle":  # creates a file where it is unpickled
        return b"cos\nmkdir\n(S'unpickled'\ntR."
    return draw(st.binary(max_size=64))
