"""Layouts of square cells, split into training and test up to symmetry."""

import hashlib

import numpy as np

SPLITS = ("train", "test")  # a stream's key is the index of its split: append only
HELD_OUT = 4  # one layout in so many is of the test split


def symmetries(cells: np.ndarray) -> list[np.ndarray]:
    """The array [S, S] under the 8 rotations and reflections of a square."""
    turned = [np.rot90(cells, turns) for turns in range(4)]
    return turned + [one.T for one in turned]


def canonical(layout: np.ndarray) -> bytes:
    """One form of a layout, bool [S, S], for all of its symmetries."""
    return min(one.tobytes() for one in symmetries(layout))


def held_out(layout: np.ndarray) -> bool:
    """Is the layout, bool [S, S], of the test split?"""
    return hashlib.blake2b(canonical(layout), digest_size=8).digest()[0] % HELD_OUT == 0
