"""Random keys: each is folded from (seed, purpose, index), so none is stored, reused, or lost on resume."""

import enum

import jax


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of a run's reproducibility: add, never renumber."""

    INITIAL_WEIGHTS = 0
    TRAINING = 1  # index: update number
    SAMPLING = 2  # index: of the image


def key_for(seed: int, purpose: Purpose, index: int | jax.Array = 0) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(purpose)), index)
