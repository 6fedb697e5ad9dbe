"""Folders and tars: hidden names and junk are passed over everywhere alike; what is no file is refused by name."""

import io
import os
import socket
import tarfile
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from tests.readers.written import damaged, one_line_or_nothing
from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.captions import CaptionFolderSource
from trm_diffusion.data.contexts import image_files
from trm_diffusion.data.images import ImageFolderSource
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.image_sets import open_images
from trm_diffusion.readers.folders import list_below, list_files, list_folders
from trm_diffusion.readers.tars import list_members
from trm_diffusion.run.prompts import read_prompts

JUNK = (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/0.png", "__MACOSX/a/0.png", ".0.txt")


def tar_of(members: dict[str, bytes], **changes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def fill(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a dog" if name.endswith(".txt") else picture())
    return root


def image_folder(root):
    return ImageFolderSource(str(root), image_size=8, channels=3)


def test_every_reader_passes_over_the_same_junk(tmp_path):
    plain = ["a/0.png", "a/1.png", "b/0.png"]
    classes = fill(tmp_path / "classes", [*plain, *JUNK, *(f"a/{name}" for name in JUNK)])
    source = image_folder(classes)
    assert source.class_names == ("a", "b") and [source.name(i) for i in range(3)] == plain and len(source) == 3
    assert len(open_images(str(classes))) == 3 and open_images(str(classes)).labels.tolist() == [0, 0, 1]
    texts = fill(tmp_path / "texts", ["0.png", "0.txt", "b/1.png", "b/1.txt", *JUNK])
    captions = CaptionFolderSource(str(texts), image_size=8, channels=3)
    assert [captions.name(i) for i in range(len(captions))] == ["0.png", "b/1.png"]
    assert [path.name for path in image_files(texts)] == ["0.png"]
    assert read_prompts(str(texts)) == ["a dog"]
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "._a.tar").write_bytes(b"\0\5\26\7")
    write_tar(tars / "a.tar", {**dict.fromkeys(plain, picture()), **{f"./{name}": b"x" for name in JUNK}})
    config = DataConfig(source="image_tars", path=str(tars), channels=3, num_classes=1)
    assert len(make_source(config)) == 3


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a/0.png", "b/images/0.png"], "b/images/0.png is not read"),
        (["a/0.png", "b/0.png", "b/more/deep/0.png"], "b/more/deep/0.png is not read"),
        (["a/0.png", "b/notes.txt"], "class folder .*b holds no images"),
        (["a/0.png", "0.png"], "0.png lies beside the class folders"),
    ],
)
def test_an_image_or_class_that_would_be_lost_is_named(tmp_path, names, says):
    with pytest.raises(UserError, match=says):
        image_folder(fill(tmp_path, names))


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is at most 107 bytes long
        one.bind(path.name)
        os.chdir(here)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (make_fifo, "a FIFO"),
        (make_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to("nowhere"), "a broken link"),
    ],
)
def test_what_is_no_file_is_never_opened(tmp_path, make, says):
    fill(tmp_path, ["a/0.png", "a/0.txt"])
    make(tmp_path / "a" / "1.png")
    readers = (
        image_folder,
        lambda root: open_images(str(root)),
        lambda root: image_files(root / "a"),
        lambda root: CaptionFolderSource(str(root), image_size=8, channels=3),
    )
    for reader in readers:
        with pytest.raises(UserError, match=f"1.png is {says}"):
            reader(tmp_path)
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "1.bin")  # nobody asks for it
    assert len(image_folder(tmp_path)) == 1


def test_names_links_and_order(tmp_path):
    fill(tmp_path, ["b/x.png", "a-b.png", "a/y.png", "Z.PNG"])
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert list_below(tmp_path, [".png"]) == ["Z.PNG", "a/y.png", "a-b.png", "b/x.png", "c/x.png"]
    assert list_folders(tmp_path) == ["a", "b", "c"] and list_files(tmp_path) == ["Z.PNG", "a-b.png"]
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link to a folder above it"):
        list_below(tmp_path)
    (tmp_path / "a" / "up").unlink()
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    with pytest.raises(UserError, match="not UTF-8; rename it"):
        list_files(tmp_path)
    with pytest.raises(UserError, match="cannot be listed"):
        list_files(tmp_path / "nowhere")


def write_tar(path, members: dict, **changes):
    path.write_bytes(tar_of(members, **changes))
    return path


def test_members_are_found_in_place(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x/1.PNG": b"one", "x/1.cls": b"7", "notes": b"no"})
    members = list_members(path, [".png", ".cls"])
    assert [name for name, *_ in members] == ["x/1.PNG", "x/1.cls"]
    data = path.read_bytes()
    assert [data[offset : offset + size] for _, offset, size in members] == [b"one", b"7"]


def negative(data):
    """The first member claims -512 bytes, so that the next header would be its own."""
    header = bytearray(data[:512])
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[: 2 * 1024], "without the end of a tar"),
        (lambda data: data + data, "more data after the end"),
        (lambda data: data[:1024] + b"\1" * 512 + data[1536:], "damaged header at byte 1024"),
        (lambda data: data[:700], "damaged, or is not an uncompressed tar"),
        (negative, "-512 bytes|damaged"),
        (lambda data: b"", "damaged, or is not an uncompressed tar"),
        (lambda data: b"\0" * 1024, "holds no images"),
    ],
)  # fmt: skip
def test_a_tar_that_hides_members_is_refused(tmp_path, spoil, says):
    path = write_tar(tmp_path / "a.tar", {"1.png": picture(), "2.png": picture()})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=f"a.tar .*({says})"):
        make_source(DataConfig(source="image_tars", path=str(tmp_path), channels=3, num_classes=1))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.LNKTYPE])
def test_members_that_are_no_files_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", {"1.png": b""}, type=kind, linkname="/dev/zero")
    with pytest.raises(UserError, match="1.png is a link, device or FIFO"):
        list_members(path, [".png"])


def test_a_sparse_member_is_refused(tmp_path):
    info = tarfile.TarInfo("1.png")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="1.png is a sparse file"):
        list_members(tmp_path / "a.tar", [".png"])


def test_a_label_in_a_tar_is_a_number(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": picture(), "1.cls": b"dog"})
    with pytest.raises(UserError, match=r"a.tar: 1.cls holds b'dog', not the number of a class"):
        make_source(DataConfig(source="image_tars", path=str(tmp_path), channels=3, num_classes=1))


@settings(max_examples=40, deadline=None)
@given(damaged(tar_of({"1.png": b"one", "1.cls": b"7"})[:3072]))
def test_a_damaged_tar_is_one_line(data):
    with tempfile.NamedTemporaryFile(suffix=".tar") as file, one_line_or_nothing():
        file.write(data)
        file.flush()
        list_members(file.name, [".png", ".cls"])
