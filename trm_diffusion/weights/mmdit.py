"""Stable Diffusion 3's published layouts: diffusers' SD3Transformer2DModel, and that of the single files.

diffusers has scale before shift in modulations without a gate: the final layer's, and the text's in the last block.
Everything else is in the order of the single files, which is also ours.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flax import nnx

from trm_diffusion.models.embed import cropped_sincos_positions
from trm_diffusion.models.mmdit import JointConfig, MMDiT, MMDiTConfig
from trm_diffusion.weights.forms import SAME, Form, Rule, affine, patches, swapped
from trm_diffusion.weights.layout import Layout, Model, Shapes, depth_of, shapes_of

HEAD_FEATURES = 64  # of every published SD3
IMAGE_SIZE = 128  # side in latent cells that positions were made for, if there is no config.json


class Names(NamedTuple):
    """Names of a model's parts in one layout. A block's names follow `block` and its index."""

    block: str
    patch_embed: str
    positions: str
    timestep: tuple[str, str]
    pooled: tuple[str, str]
    final: tuple[str, str]
    visual: "StreamNames"
    text: "StreamNames"
    dual: "StreamNames"
    ungated: Callable[[Form], Form]  # how a modulation of only shift and scale is converted


class StreamNames(NamedTuple):
    modulation: str
    qkv: tuple[str, ...]
    norms: tuple[str, str]
    out: str
    mlp: tuple[str, str]


def _diffusers_stream(norm: str, qkv: str, norms: str, out: str, mlp: str) -> StreamNames:
    query_key_value = tuple(qkv.format(part) for part in "qkv")
    return StreamNames(
        f"{norm}.linear", query_key_value, (f"{norms}_q", f"{norms}_k"), out, (f"{mlp}.net.0.proj", f"{mlp}.net.2")
    )


def _single_file_stream(name: str, attention: str = "attn") -> StreamNames:
    inside = f"{name}.{attention}"
    return StreamNames(
        f"{name}.adaLN_modulation.1",
        (f"{inside}.qkv",),
        (f"{inside}.ln_q", f"{inside}.ln_k"),
        f"{inside}.proj",
        (f"{name}.mlp.fc1", f"{name}.mlp.fc2"),
    )


DIFFUSERS = Names(
    block="transformer_blocks.",
    patch_embed="pos_embed.proj",
    positions="pos_embed.pos_embed",
    timestep=tuple(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
    pooled=tuple(f"time_text_embed.text_embedder.linear_{n}" for n in (1, 2)),
    final=("norm_out.linear", "proj_out"),
    visual=_diffusers_stream("norm1", "attn.to_{}", "attn.norm", "attn.to_out.0", "ff"),
    text=_diffusers_stream("norm1_context", "attn.add_{}_proj", "attn.norm_added", "attn.to_add_out", "ff_context"),
    dual=_diffusers_stream("", "attn2.to_{}", "attn2.norm", "attn2.to_out.0", ""),
    ungated=swapped,
)
SINGLE_FILE = Names(
    block="joint_blocks.",
    patch_embed="x_embedder.proj",
    positions="pos_embed",
    timestep=("t_embedder.mlp.0", "t_embedder.mlp.2"),
    pooled=("y_embedder.mlp.0", "y_embedder.mlp.2"),
    final=("final_layer.adaLN_modulation.1", "final_layer.linear"),
    visual=_single_file_stream("x_block"),
    text=_single_file_stream("context_block"),
    dual=_single_file_stream("x_block", "attn2"),
    ungated=lambda form: form,
)


def infer(names: Names, shapes: Shapes, config: dict) -> Model:
    width, in_channels, patch, _ = shapes[f"{names.patch_embed}.weight"]
    depth = depth_of(shapes, names.block)
    first = f"{names.block}0."
    query_norm = shapes.get(f"{first}{names.visual.norms[0]}.weight")
    dual = [i for i in range(depth) if f"{names.block}{i}.{names.dual.out}.weight" in shapes]
    if dual != list(range(len(dual))):
        raise ValueError(f"blocks {dual} have a second attention; only the first blocks may")
    image_size = config.get("sample_size", IMAGE_SIZE)
    return dict(
        depth=depth,
        width=width,
        heads=config.get("num_attention_heads", width // (query_norm[0] if query_norm else HEAD_FEATURES)),
        patch=patch,
        mlp_ratio=shapes[f"{first}{names.visual.mlp[0]}.weight"][0] / width,
        qk_norm=query_norm is not None,
        dual_attention_blocks=len(dual),
        position_max_size=round(shapes[names.positions][1] ** 0.5),
        position_base_size=image_size // patch,
        image_size=image_size,
        in_channels=in_channels,
        out_channels=shapes[f"{names.final[1]}.weight"][0] // patch**2,
        text_features=shapes["context_embedder.weight"][1],
        pooled_features=shapes[f"{names.pooled[0]}.weight"][1],
    )


def config_of(model: Model) -> MMDiTConfig:
    joint = JointConfig(
        **{name: model[name] for name in ("dual_attention_blocks", "position_max_size", "position_base_size")}
    )
    fields = ("depth", "width", "heads", "patch", "mlp_ratio", "qk_norm")
    return MMDiTConfig(**{name: model[name] for name in fields}, mmdit=joint, scan_blocks=False)


def build(model: Model) -> nnx.Module:
    sizes = {name: model[name] for name in ("in_channels", "out_channels", "text_features", "pooled_features")}
    return MMDiT(config_of(model), image_size=model["image_size"], **sizes, rngs=nnx.Rngs(0))


def _attention(ours: str, theirs: str, names: StreamNames, model: Model, *, ends: bool = False) -> Iterator[Rule]:
    yield from affine(f"{ours}/qkv", *[theirs + name for name in names.qkv])
    if model["qk_norm"]:
        for norm, name in zip(("query_norm", "key_norm"), names.norms, strict=True):
            yield Rule(f"{ours}/{norm}/scale", (f"{theirs}{name}.weight",), SAME)
    if not ends:
        yield from affine(f"{ours}/out", theirs + names.out)


def rules(names: Names, model: Model) -> list[Rule]:
    found = [
        *affine("patch_embed", names.patch_embed, kernel=patches(model["patch"])),
        *affine("context_embed", "context_embedder"),
        *affine("final/modulation", names.final[0], change=names.ungated),
        *affine("final/out", names.final[1]),
    ]
    for ours, theirs in (("timestep_embed", names.timestep), ("pooled_embed", names.pooled)):
        found += [*affine(f"{ours}/first", theirs[0]), *affine(f"{ours}/second", theirs[1])]
    for index in range(model["depth"]):
        ours, theirs = f"stack/blocks/{index}", f"{names.block}{index}."
        for side, stream in (("visual", names.visual), ("text", names.text)):
            ends = side == "text" and index == model["depth"] - 1
            change = names.ungated if ends else None
            found += affine(f"{ours}/{side}/modulation", theirs + stream.modulation, change=change)
            found += _attention(f"{ours}/{side}/attention", theirs, stream, model, ends=ends)
            if not ends:
                found += affine(f"{ours}/{side}/mlp/up", theirs + stream.mlp[0])
                found += affine(f"{ours}/{side}/mlp/down", theirs + stream.mlp[1])
        if index < model["dual_attention_blocks"]:
            found += _attention(f"{ours}/dual", theirs, names.dual, model)
    return found


def positions(names: Names, model: Model) -> dict:
    size = model["position_max_size"]
    base = model["position_base_size"]
    return {names.positions: cropped_sincos_positions(model["width"], size, size, max_size=size, base_size=base)[None]}


def config_diffusers(model: Model) -> dict:
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": model["image_size"],
        "patch_size": model["patch"],
        "in_channels": model["in_channels"],
        "num_layers": model["depth"],
        "attention_head_dim": model["width"] // model["heads"],
        "num_attention_heads": model["heads"],
        "joint_attention_dim": model["text_features"],
        "caption_projection_dim": model["width"],
        "pooled_projection_dim": model["pooled_features"],
        "out_channels": model["out_channels"],
        "pos_embed_max_size": model["position_max_size"],
        "dual_attention_layers": list(range(model["dual_attention_blocks"])),
        "qk_norm": "rms_norm" if model["qk_norm"] else None,
    }


def _layout(name: str, names: Names, **options) -> Layout:
    return Layout(
        name=name,
        kind="mmdit",
        signature=(f"{names.patch_embed}.weight", f"{names.block}0.{names.text.qkv[0]}.weight"),
        infer=functools.partial(infer, names),
        shapes=shapes_of(build),
        rules=functools.partial(rules, names),
        constants=functools.partial(positions, names),
        **options,
    )


DIFFUSERS_SD3 = _layout("diffusers-sd3", DIFFUSERS, config=config_diffusers)
SINGLE_FILE_SD3 = _layout(
    "single-file-sd3",
    SINGLE_FILE,
    prefixes=("model.diffusion_model.", ""),
    neighbours=("first_stage_model.", "text_encoders."),
)
