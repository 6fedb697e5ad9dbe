"""Files that appear whole or not at all."""

import json
import os

from etils import epath


def write_json(path: epath.Path, record) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_text(path: epath.Path, text: str) -> None:
    """Writes the file whole or not at all; makes its directory if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    temporary.write_text(text)
    temporary.replace(path)
