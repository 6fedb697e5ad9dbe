"""Paths as users write them: relative, with `~` for the home directory, or in a bucket such as gs://BUCKET/x."""

import importlib.util
import os
import pathlib
import re

from etils import epath

from trm_diffusion.errors import UserError

BUCKETS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # package that reads buckets of this scheme
PathLike = str | os.PathLike


def expand(value: PathLike, name: str = "") -> str:
    """The path with `~` expanded; "" stays "". name: the flag or field that gave it, for errors.

    Raises UserError for a home directory or a scheme that does not exist.
    """
    given = os.fspath(value)
    path = os.path.expanduser(given)
    if path.startswith("~") and not os.path.exists(path):
        raise UserError(f"{_called(name, given)}: there is no such home directory; write the whole path")
    if "\0" in path:
        raise UserError(f"{_called(name, repr(given))}: a path cannot hold a zero byte")
    scheme = re.match(r"([A-Za-z][\w+.-]*):/", path)
    if scheme and not (scheme[1] in BUCKETS and path.startswith(f"{scheme[1]}://")):
        raise UserError(f"{_called(name, given)} is neither a local path nor a bucket such as gs://BUCKET/x")
    return path


def any_path(value: PathLike, name: str = "") -> epath.Path:
    """A local path or one in a bucket. Raises UserError if the package that reads its bucket is not installed."""
    path = expand(value, name)
    package = BUCKETS.get(path.partition("://")[0]) if is_bucket(path) else None
    if package and not is_installed(package):
        raise UserError(f"{_called(name, path)}: buckets of this kind need a package: pip install {package}")
    return epath.Path(path)


def local_path(value: PathLike, name: str = "") -> pathlib.Path:
    """A path for what only local files can be used for. Raises UserError for a bucket."""
    path = expand(value, name)
    if is_bucket(path):
        raise UserError(
            f"{_called(name, path)} is in a bucket, and this needs local files: copy it, or mount the bucket (gcsfuse) "
            "and give the local path"
        )
    return pathlib.Path(path)


def is_bucket(path: PathLike) -> bool:
    return "://" in os.fspath(path)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _called(name: str, value: str) -> str:
    return f"{name}={value}" if name else value
