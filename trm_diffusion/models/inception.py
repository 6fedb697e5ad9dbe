"""The Inception network of the Frechet Inception Distance: images to features.

It is the graph of 2015-12-05 that Heusel et al. (2017) chose and that every published FID uses, in float32. It differs
from the usual Inception v3: it resizes its own input, its average pools exclude padding from the mean, its last block
uses max pooling, and it has 1008 outputs. Layer names are those of the PyTorch port of its weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INPUT_SIZE = 299
SPATIAL_CHANNELS = 7
NUM_LOGITS, POOL_WIDTH = 1008, 2048
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")  # as PyTorch names its tensors
LAYOUT = ("NHWC", "HWIO", "NHWC")
EXACT = lax.Precision.HIGHEST  # by default, accelerators compute float32 products with fewer bits

Weights = dict[str, dict[str, jax.Array]]  # per layer: kernel [kh, kw, in, out] and bias [out]; "fc" has no bias
# convolve(x [N, H, W, in], layer, out, kernel size, stride, padding) -> [N, H', W', out]
Convolve = Callable[..., jax.Array]


class Features(NamedTuple):
    """The features of N images that the metrics use, float32."""

    pool: jax.Array  # [N, 2048] mean over the last feature map: FID, precision, recall
    spatial: jax.Array  # [N, 2023] first 7 channels of Mixed_6d, 17 x 17 x 7 flattened: sFID
    logits: jax.Array  # [N, 1008] without bias: inception score


def inception_features(weights: Weights, images: jax.Array) -> Features:
    """Features of images [N, H, W, 3], any size, values 0 .. 255 (not scaled, not resized)."""
    last_nhwc, spatial_nhwc = network(network_input(images), convolution(weights))
    pool = last_nhwc.mean(axis=(1, 2))
    logits = jnp.matmul(pool, weights["fc"]["kernel"], precision=EXACT)
    return Features(pool, spatial_nhwc.reshape(len(images), -1), logits)


def network_input(images: jax.Array) -> jax.Array:
    """[N, H, W, 3] in 0 .. 255 -> [N, 299, 299, 3] in [-1, 1)."""
    return (resize_as_tf1(images.astype(jnp.float32), INPUT_SIZE) - 128) / 128


def convolution(weights: Weights) -> Convolve:
    """A `Convolve` that applies the named layer's convolution, bias and ReLU."""

    def convolve(x, layer, out, size=1, stride=1, padding="SAME"):
        del out, size  # given by the kernel's shape
        y = lax.conv_general_dilated(
            x,
            weights[layer]["kernel"],
            (stride, stride),
            padding,
            dimension_numbers=LAYOUT,
            precision=EXACT,
        )
        return jax.nn.relu(y + weights[layer]["bias"][None, None, None])

    return convolve


def resize_as_tf1(images: jax.Array, size: int) -> jax.Array:
    """Bilinear resize of [N, H, W, C] float32 to [N, size, size, C] as TensorFlow 1 did it.

    Output i samples the input at i * (in / out), in float32: no half-pixel centres, and no averaging when downscaling.
    """
    for axis in (2, 1):
        length = images.shape[axis]
        source = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
        low = np.minimum(np.floor(source).astype(np.int32), length - 1)
        high = np.minimum(low + 1, length - 1)
        share = np.expand_dims(source - low, [a for a in range(4) if a != axis])
        before, after = (jnp.take(images, index, axis=axis) for index in (low, high))
        images = before + (after - before) * share
    return images


def layer_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Kernel shapes [kh, kw, in, out] of the network's convolutions per layer, found by tracing the network."""
    shapes = {}

    def record(x, layer, out, size=1, stride=1, padding="SAME"):
        height, width = (size, size) if isinstance(size, int) else size
        shapes[layer] = (height, width, x.shape[-1], out)
        return lax.conv_general_dilated(
            x, jnp.zeros(shapes[layer]), (stride, stride), padding, dimension_numbers=LAYOUT
        )

    jax.eval_shape(lambda x: network(x, record), jax.ShapeDtypeStruct((1, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32))
    return shapes


def state_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the published tensors by name; kernels are [out, in, kh, kw]."""
    shapes = {"fc.weight": (NUM_LOGITS, POOL_WIDTH), "fc.bias": (NUM_LOGITS,)}
    for layer, (height, width, channels_in, channels_out) in layer_shapes().items():
        shapes[f"{layer}.conv.weight"] = (channels_out, channels_in, height, width)
        shapes |= {f"{layer}.bn.{name}": (channels_out,) for name in BATCH_NORM}
    return shapes


def fold_batch_norms(state: dict[str, np.ndarray]) -> Weights:
    """Folds each batch norm, at its running statistics, into its convolution, which gets a bias:

    kernel * g / sqrt(var + 1e-3) and bias - mean * g / sqrt(var + 1e-3), in float64, rounded to float32.
    """
    folded = {"fc": {"kernel": np.asarray(state["fc.weight"], np.float32).T}}
    for layer in layer_shapes():
        gain, bias, mean, variance = (np.asarray(state[f"{layer}.bn.{name}"], np.float64) for name in BATCH_NORM)
        scale = gain / np.sqrt(variance + BATCH_NORM_EPSILON)
        kernel_hwio = np.asarray(state[f"{layer}.conv.weight"], np.float64).transpose(2, 3, 1, 0)
        folded[layer] = {
            "kernel": (kernel_hwio * scale).astype(np.float32),
            "bias": (bias - mean * scale).astype(np.float32),
        }
    return folded


def random_state(seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors in the published layout: activations of unit scale, batch norms away from the identity."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in state_shapes().items():
        if len(shape) > 1:
            state[name] = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = rng.uniform(0.8, 1.25, shape).astype(np.float32)
        else:
            state[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    return state


def network(x: jax.Array, convolve: Convolve) -> tuple[jax.Array, jax.Array]:
    """[N, 299, 299, 3] in [-1, 1) -> the last feature map [N, 8, 8, 2048], and [N, 17, 17, 7] of Mixed_6d."""
    x = convolve(x, "Conv2d_1a_3x3", 32, 3, stride=2, padding="VALID")
    x = convolve(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
    x = convolve(x, "Conv2d_2b_3x3", 64, 3)
    x = max_pool(x, stride=2)
    x = convolve(x, "Conv2d_3b_1x1", 80)
    x = convolve(x, "Conv2d_4a_3x3", 192, 3, padding="VALID")
    x = max_pool(x, stride=2)  # [N, 35, 35, 192]
    x = block_a(x, "Mixed_5b", 32, convolve)
    x = block_a(x, "Mixed_5c", 64, convolve)
    x = block_a(x, "Mixed_5d", 64, convolve)
    x = block_b(x, "Mixed_6a", convolve)  # [N, 17, 17, 768]
    x = block_c(x, "Mixed_6b", 128, convolve)
    x = block_c(x, "Mixed_6c", 160, convolve)
    x = block_c(x, "Mixed_6d", 160, convolve)
    spatial = x[..., :SPATIAL_CHANNELS]  # from branch1x1, which TensorFlow's graph calls mixed_6/conv
    x = block_c(x, "Mixed_6e", 192, convolve)
    x = block_d(x, "Mixed_7a", convolve)  # [N, 8, 8, 1280]
    x = block_e(x, "Mixed_7b", average_pool, convolve)
    x = block_e(x, "Mixed_7c", lambda y: max_pool(y, stride=1), convolve)
    return x, spatial


def chain(x: jax.Array, branch: str, convolve: Convolve, *layers: tuple) -> jax.Array:
    """Convolutions branch_1, branch_2, ... one after the other; `layers` are (out, kernel size)."""
    for number, (out, size) in enumerate(layers, start=1):
        x = convolve(x, f"{branch}_{number}", out, size)
    return x


def block_a(x: jax.Array, name: str, pool_channels: int, convolve: Convolve) -> jax.Array:
    return jnp.concatenate(
        [
            convolve(x, f"{name}.branch1x1", 64),
            chain(x, f"{name}.branch5x5", convolve, (48, 1), (64, 5)),
            chain(x, f"{name}.branch3x3dbl", convolve, (64, 1), (96, 3), (96, 3)),
            convolve(average_pool(x), f"{name}.branch_pool", pool_channels),
        ],
        axis=-1,
    )


def block_b(x: jax.Array, name: str, convolve: Convolve) -> jax.Array:
    double = chain(x, f"{name}.branch3x3dbl", convolve, (64, 1), (96, 3))
    return jnp.concatenate(
        [
            convolve(x, f"{name}.branch3x3", 384, 3, stride=2, padding="VALID"),
            convolve(double, f"{name}.branch3x3dbl_3", 96, 3, stride=2, padding="VALID"),
            max_pool(x, stride=2),
        ],
        axis=-1,
    )


def block_c(x: jax.Array, name: str, channels: int, convolve: Convolve) -> jax.Array:
    c, row, column = channels, (1, 7), (7, 1)
    return jnp.concatenate(
        [
            convolve(x, f"{name}.branch1x1", 192),
            chain(x, f"{name}.branch7x7", convolve, (c, 1), (c, row), (192, column)),
            chain(x, f"{name}.branch7x7dbl", convolve, (c, 1), (c, column), (c, row), (c, column), (192, row)),
            convolve(average_pool(x), f"{name}.branch_pool", 192),
        ],
        axis=-1,
    )


def block_d(x: jax.Array, name: str, convolve: Convolve) -> jax.Array:
    single = chain(x, f"{name}.branch3x3", convolve, (192, 1))
    seven = chain(x, f"{name}.branch7x7x3", convolve, (192, 1), (192, (1, 7)), (192, (7, 1)))
    return jnp.concatenate(
        [
            convolve(single, f"{name}.branch3x3_2", 320, 3, stride=2, padding="VALID"),
            convolve(seven, f"{name}.branch7x7x3_4", 192, 3, stride=2, padding="VALID"),
            max_pool(x, stride=2),
        ],
        axis=-1,
    )


def block_e(x: jax.Array, name: str, pool: Callable, convolve: Convolve) -> jax.Array:
    single = chain(x, f"{name}.branch3x3", convolve, (384, 1))
    double = chain(x, f"{name}.branch3x3dbl", convolve, (448, 1), (384, 3))
    return jnp.concatenate(
        [
            convolve(x, f"{name}.branch1x1", 320),
            convolve(single, f"{name}.branch3x3_2a", 384, (1, 3)),
            convolve(single, f"{name}.branch3x3_2b", 384, (3, 1)),
            convolve(double, f"{name}.branch3x3dbl_3a", 384, (1, 3)),
            convolve(double, f"{name}.branch3x3dbl_3b", 384, (3, 1)),
            convolve(pool(x), f"{name}.branch_pool", 192),
        ],
        axis=-1,
    )


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3 x 3 max pool; stride 2 has no padding, stride 1 is padded to keep the size."""
    padding = "VALID" if stride == 2 else "SAME"
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def average_pool(x: jax.Array) -> jax.Array:
    """3 x 3 average pool, stride 1, over the pixels that exist: 9 inside, 6 at an edge, 4 in a corner."""
    total = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(length), np.ones(3), mode="same") for length in x.shape[1:3])
    return total / np.outer(rows, columns).astype(np.float32)[None, :, :, None]
