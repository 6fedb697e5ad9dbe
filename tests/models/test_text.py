"""Words to ids to encoded text."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.test_dit import randomized
from trm_diffusion.models.text import TextConfig, TextEncoder
from trm_diffusion.models.tokenizer import END, PAD, UNKNOWN, Tokenizer, null_tokens
from trm_diffusion.runtime.parameters import PureModel

WORDS = ("a", "blue", "circle", "red", "square")
CONFIG = TextConfig(features=8, pooled_features=8, heads=2, depth=2, vocabulary=10)


def test_words_become_ids_in_the_order_of_the_vocabulary():
    tokenizer = Tokenizer(WORDS, length=6)
    ids = tokenizer.encode("A red, red CIRCLE.")
    assert ids.dtype == np.int32 and ids.tolist() == [3, 6, 6, 5, END, PAD]
    assert tokenizer.encode("a reddish square").tolist() == [3, UNKNOWN, 7, END, PAD, PAD]
    assert tokenizer.unknown_words("A reddish square, 7 times") == ["reddish", "7", "times"]
    assert tokenizer.encode("a red square a blue circle").tolist() == [3, 6, 7, 3, 4, END]  # the last word is cut
    assert tokenizer.encode("").tolist() == null_tokens(6).tolist() == [END, *[PAD] * 5]
    assert len(tokenizer) == 8


def encode(parameters, model, *ids):
    return model.bind(parameters)(jnp.asarray(ids, jnp.int32))


def test_padding_changes_nothing_and_order_and_words_do():
    model = PureModel(lambda key: TextEncoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(key)))
    parameters = randomized(model)
    short = encode(parameters, model, [3, 4, END], [4, 3, END])
    long = encode(parameters, model, [3, 4, END, PAD, PAD])
    chex.assert_shape([short.states, short.mask, short.pooled], [(2, 3, 8), (2, 3), (2, 8)])
    assert long.mask.tolist() == [[True] * 3 + [False] * 2]
    np.testing.assert_allclose(long.states[0, :3], short.states[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(long.pooled[0], short.pooled[0], rtol=1e-5, atol=1e-6)
    assert np.abs(short.pooled[0] - short.pooled[1]).max() > 1e-2
    other = encode(parameters, model, [3, 5, END])
    assert np.abs(other.states - short.states[:1]).max(axis=-1).min() > 1e-3  # every token's state changes


def test_untrained_words_are_of_unit_scale_and_apart():
    model = PureModel(lambda key: TextEncoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(key)))
    words = model.init(jax.random.key(0))["words/embedding"]
    assert 0.8 < float(jnp.std(words)) < 1.2
