"""Text and JSON: UTF-8 with or without a byte order mark, lines that end with a line feed, and errors with a place."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.readers.written import damaged, one_line_or_nothing
from trm_diffusion.errors import UserError
from trm_diffusion.readers.records import check, parse, read_json, read_json_lines
from trm_diffusion.readers.text import decode, read_lines, read_text, split_lines


def test_lines_end_with_a_line_feed_alone(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red\u2028circle\r\n\x0ba\x85blue\u2029square\r\n\n  last".encode())
    assert read_lines(path) == ["a red\u2028circle", "\x0ba\x85blue\u2029square", "", "  last"]
    assert read_text(path).startswith("a red")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("sea\ncaf\xe9".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        ("\ufeff\n\n".encode() + b"\xff", "line 3: byte 0xff is not UTF-8"),
        ("sea".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("a\nsea".encode("utf-16-le"), "line 1: a zero byte"),
    ],
)
def test_another_encoding_is_named_with_its_line(tmp_path, data, says):
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"prompts.txt, {says}"):
        read_lines(tmp_path / "prompts.txt")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, says in (("fifo", "a FIFO"), ("device", "a device"), ("link", "No such file"), (".", "a folder")):
        with pytest.raises(UserError, match=says):
            read_text(tmp_path / name)


FORM = {"file": str, "size": int, "scale": float, "labels?": [int], "pair": (str, [str]), "counts": {str: int}}
WHOLE = {"file": "a", "size": 1, "scale": 2, "pair": ["a", ["b"]], "counts": {"x": 1}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"file": 3}, "file is 3, not text"),
        ({"size": True}, "size is True, not a whole number"),
        ({"size": 1.5}, "size is 1.5, not a whole number"),
        ({"scale": "2"}, "scale is '2', not a number"),
        ({"labels": [1, None]}, r"labels\[1\] is None, not a whole number"),
        ({"labels": "12"}, "labels is '12', not a list"),
        ({"pair": ["a"]}, "pair has 1 entries, not 2"),
        ({"pair": ["a", "b"]}, r"pair\[1\] is 'b', not a list"),
        ({"counts": {"x": "1"}}, "counts.x is '1', not a whole number"),
        ({"counts": [1]}, r"counts is \[1\], not an object"),
    ],
)
def test_a_wrong_type_is_named(change, says):
    check(WHOLE | {"more": None}, FORM, "x.json")
    with pytest.raises(UserError, match=f"^x.json: {says}: make it again"):
        check(WHOLE | change, FORM, "x.json", "make it again")


def test_json_that_cannot_be_read_names_its_file(tmp_path):
    path = tmp_path / "x.json"
    for text, says in (
        ('{"a": 1', "x.json: not JSON"),
        ('{\n"a": 1,\n]', "x.json, line 3: not JSON"),
        ("", "x.json: not JSON"),
        ("[1]", r"x.json: the value is \[1\], not an object"),
        ("[" * 100_000, "x.json: not JSON that can be read"),
        ("1" * 10_000, "x.json: not JSON that can be read"),
        ('{"a": "\\ud800"}', "x.json: half of a surrogate pair"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            read_json(path)
    path.write_text('\ufeff{"a": "\\ud83d\\ude00"}\r\n')
    assert read_json(path) == {"a": "\U0001f600"}


def test_json_lines_name_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"a": "1\u20282"}\r\n\n{"a": 2}\n')
    first, second = read_json_lines(path, {"a": object})
    assert first == (f"{path}, line 1", {"a": "1\u20282"}) and second == (f"{path}, line 3", {"a": 2})
    with pytest.raises(UserError, match="x.jsonl, line 3: a is 2, not text"):
        read_json_lines(path, {"a": str})
    path.write_text("\n\n")
    with pytest.raises(UserError, match="holds no records"):
        read_json_lines(path)


@settings(max_examples=50, deadline=None)
@given(damaged(json.dumps(WHOLE).encode()) | st.binary(max_size=40))
def test_damaged_json_is_one_line(data):
    with one_line_or_nothing():
        check(parse(decode(data, "x"), dict, "x"), FORM, "x")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]))))
def test_lines_come_back_as_written(lines):
    text = "".join(line + "\n" for line in lines)
    assert split_lines(decode(text.encode("utf-8-sig"), "x")) == lines
