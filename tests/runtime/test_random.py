"""Keys differ by seed, purpose and index, and are the same inside and outside a compiled function."""

import itertools

import chex
import jax
import numpy as np

from trm_diffusion.runtime.random import Purpose, key_for


def test_keys_differ_by_seed_purpose_and_index():
    which = list(itertools.product((0, 1, 7), Purpose, (0, 1, 2, 1000)))
    data = {tuple(np.asarray(jax.random.key_data(key_for(*one)))) for one in which}
    assert len(data) == len(which)


def test_purposes_keep_their_numbers():
    assert [(purpose.name, purpose.value) for purpose in Purpose][:3] == [
        ("INITIAL_WEIGHTS", 0),
        ("TRAINING", 1),
        ("SAMPLING", 2),
    ]


class KeyTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_an_index_may_be_traced_or_mapped(self):
        keys = self.variant(jax.vmap(lambda index: key_for(3, Purpose.SAMPLING, index)))(np.arange(4))
        for index in range(4):
            expected = key_for(3, Purpose.SAMPLING, index)
            chex.assert_trees_all_equal(jax.random.key_data(keys[index]), jax.random.key_data(expected))
