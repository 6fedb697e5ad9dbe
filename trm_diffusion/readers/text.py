"""Text files: UTF-8, with or without a byte order mark. A line ends with a line feed, or with carriage return and line
feed, and with nothing else: U+2028 and its like are part of the text.
"""

import os

from trm_diffusion.errors import UserError
from trm_diffusion.readers.opening import read_bytes
from trm_diffusion.readers.paths import PathLike


def read_text(path: PathLike) -> str:
    """The whole text; its line ends are as in the file. Raises UserError with the line of the first wrong byte."""
    return decode(read_bytes(path), os.fspath(path))


def read_lines(path: PathLike) -> list[str]:
    """The lines without their ends; the i-th is line i + 1 of the file."""
    return split_lines(read_text(path))


def split_lines(text: str) -> list[str]:
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def decode(data: bytes, where: str) -> str:
    """UTF-8 bytes as text. where: names them in the UserError for any other encoding."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise UserError(f"{where}, line {line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{where}, line {line}: a zero byte, which no text holds; save the file as UTF-8")
    return text
