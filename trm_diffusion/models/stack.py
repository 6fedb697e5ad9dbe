"""A stack of transformer blocks of several kinds, compiled once per run of blocks of one kind.

Consecutive blocks of one kind form a *segment*. A scanned segment holds its blocks' parameters stacked along a leading
layer axis and runs them with `jax.lax.scan`, so that a stack without recursion, or with recursion everywhere, is traced
once whatever its depth. Unrolled, each block is a segment of its own, for a debugger or a FLOP count.
The same seed gives the same weights either way, and the base weights do not depend on which blocks recurse.
"""

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.partition import lay
from trm_diffusion.models.remat import rematerialized

_SEGMENT = re.compile(r"(.*stack)/segments/(\d+)/blocks/(.*)")


class StackLayout(NamedTuple):
    """How a stack's blocks are stored in its parameters."""

    segments: tuple[tuple[int, int], ...]  # (first block, length) of each segment
    recursive: tuple[int, ...]  # indices of the blocks that recurse
    scan: bool  # a segment's parameters are stacked along a leading layer axis


class Segment(nnx.Module):
    """Blocks first .. first + length - 1, all of one kind; `blocks` is one block, or `length` of them stacked."""

    def __init__(self, first: int, length: int, stacked: bool, blocks: nnx.Module):
        self.first, self.length, self.stacked = first, length, stacked
        self.blocks = blocks


class BlockStack(nnx.Module):
    """One block for each of `kinds`, in segments; `make_block(kind, key)` builds a block."""

    def __init__(
        self,
        make_block: Callable[[Hashable, jax.Array], nnx.Module],
        kinds: Sequence[Hashable],
        *,
        scan: bool,
        remat: str,
        rngs: nnx.Rngs,
        loop: tuple[int, int] = (0, 0),
        repeat: Callable | None = None,
    ):
        """loop: first and end of the blocks that run as repeat(run, x, latent_steps), where run(x) runs each once; they
        are of other kinds than the rest, and give no reports."""
        self.remat, self.loop, self.repeat = remat, loop, repeat
        key = rngs.params()
        segments = []
        for first, length in segment_lengths(kinds, scan):
            keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(first, first + length))
            build = functools.partial(make_block, kinds[first])
            segments.append(Segment(first, length, scan, nnx.vmap(build)(keys) if scan else build(keys[0])))
        self.segments = nnx.List(segments)

    def __call__(self, x, *, key: jax.Array | None, **inputs):
        """Runs x, an array or a tuple of arrays, through all blocks: `block(x, key=..., **inputs) -> x, report`.

        Returns x and the reports of the recursive blocks, stacked along a leading axis in order of depth, or None if
        no block recurses. Each block's key is `key` folded with its index.
        """
        reports = []

        def run(segments, x):
            for segment in segments:
                x, report = self._run_segment(segment, x, key, inputs)
                if report is not None:
                    reports.append(report)
            return x

        first, end = self.loop
        inside = [segment for segment in self.segments if first <= segment.first < end]
        if not inside:
            x = run(self.segments, x)
        else:
            x = run([segment for segment in self.segments if segment.first < first], x)
            x = self.repeat(lambda x: run(inside, x), x, inputs["latent_steps"])
            x = run([segment for segment in self.segments if segment.first >= end], x)
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *reports) if reports else None

    def _run_segment(self, segment: Segment, x, key: jax.Array | None, inputs: dict):
        """x after the segment's blocks, and their reports, stacked, or None."""
        graphdef, parameters = nnx.split(segment.blocks)

        def body(x, layer):
            parameters, index = layer
            block_key = None if key is None else jax.random.fold_in(key, index)
            x = jax.tree.map(lambda tokens: lay(tokens, "batch"), x)
            return nnx.merge(graphdef, parameters)(x, key=block_key, **inputs)

        body = rematerialized(body, self.remat, in_loop=segment.stacked)
        if segment.stacked:
            return jax.lax.scan(body, x, (parameters, jnp.arange(segment.first, segment.first + segment.length)))
        x, report = body(x, (parameters, jnp.asarray(segment.first)))
        return x, jax.tree.map(lambda leaf: leaf[None], report)


def segment_lengths(kinds: Sequence[Hashable], scan: bool) -> list[tuple[int, int]]:
    """(first block, length) of each segment: runs of blocks of one kind, or single blocks without `scan`."""
    segments = []
    for index, kind in enumerate(kinds):
        if scan and segments and kind == kinds[index - 1]:
            first, length = segments[-1]
            segments[-1] = (first, length + 1)
        else:
            segments.append((index, 1))
    return segments


def segment_of(name: str) -> int:
    """Index of the segment that a block's parameter belongs to, from its path."""
    return int(_SEGMENT.fullmatch(name)[2])


def per_layer(parameters: dict, layout: StackLayout) -> dict:
    """Parameters by path, split into single blocks: "stack/segments/0/blocks/..." -> "stack/blocks/7/...".

    Models of equal depth get equal names, however their blocks are grouped into segments.
    """
    layers = {}
    for name, value in parameters.items():
        for layer_name, index in _layers_of(name, layout):
            layers[layer_name] = value if index is None else value[index]
    return layers


def from_per_layer(layers: dict, names: Sequence[str], layout: StackLayout) -> dict:
    """The inverse of `per_layer` for the parameter paths `names`; omits a parameter if one of its layers is missing."""
    parameters = {}
    for name in names:
        wanted = _layers_of(name, layout)
        if all(layer_name in layers for layer_name, _ in wanted):
            found = [layers[layer_name] for layer_name, _ in wanted]
            parameters[name] = found[0] if wanted[0][1] is None else jnp.stack(found)
    return parameters


def _layers_of(name: str, layout: StackLayout) -> list[tuple[str, int | None]]:
    """(path in `per_layer`, index along the layer axis or None) of each layer in a parameter."""
    match = _SEGMENT.fullmatch(name)
    if match is None:
        return [(name, None)]
    prefix, segment, rest = match.groups()
    first, length = layout.segments[int(segment)]
    return [(f"{prefix}/blocks/{first + i}/{rest}", i if layout.scan else None) for i in range(length)]
