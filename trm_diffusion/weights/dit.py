"""DiT's published layouts: the authors' own, which SiT shares, and diffusers' DiTTransformer2DModel.

diffusers keeps a timestep and a label embedder in every block. They must be equal, or the file is refused.
"""

import functools

from flax import nnx

from trm_diffusion.models.dit import SIZES, DiT, DiTConfig
from trm_diffusion.models.embed import sincos_positions
from trm_diffusion.weights.forms import SAME, Rule, affine, copies, patches
from trm_diffusion.weights.layout import Layout, Model, Shapes, depth_of, shapes_of


def _model(
    shapes: Shapes,
    *,
    depth: int,
    heads: int | None,
    patch_embed: str,
    table: str,
    hidden: str,
    final: str,
    positions: str,
) -> Model:
    width, in_channels, patch, _ = shapes[patch_embed]
    tokens = shapes[positions][1] if positions in shapes else None
    return dict(
        depth=depth,
        width=width,
        heads=heads or next((h for d, w, h in SIZES.values() if (d, w) == (depth, width)), None),
        patch=patch,
        mlp_ratio=shapes[hidden][0] / width,
        image_size=None if tokens is None else round(tokens**0.5) * patch,
        in_channels=in_channels,
        out_channels=shapes[final][0] // patch**2,
        num_classes=shapes[table][0] - 1,
    )


def build(model: Model) -> nnx.Module:
    names = ("depth", "width", "patch", "mlp_ratio")  # shapes do not depend on the heads
    config = DiTConfig(**{name: model[name] for name in names}, heads=1, scan_blocks=False)
    sizes = {name: model[name] for name in ("in_channels", "out_channels", "num_classes")}
    return DiT(config, image_size=model["patch"], **sizes, rngs=nnx.Rngs(0))


def infer(shapes: Shapes, config: dict) -> Model:
    return _model(
        shapes,
        depth=depth_of(shapes, "blocks."),
        heads=None,
        patch_embed="x_embedder.proj.weight",
        table="y_embedder.embedding_table.weight",
        hidden="blocks.0.mlp.fc1.weight",
        final="final_layer.linear.weight",
        positions="pos_embed",
    )


def rules(model: Model) -> list[Rule]:
    found = [
        *affine("patch_embed", "x_embedder.proj", kernel=patches(model["patch"])),
        *affine("timestep_embed/first", "t_embedder.mlp.0"),
        *affine("timestep_embed/second", "t_embedder.mlp.2"),
        Rule("label_embed/table/embedding", ("y_embedder.embedding_table.weight",), SAME),
        *affine("final/modulation", "final_layer.adaLN_modulation.1"),
        *affine("final/out", "final_layer.linear"),
    ]
    for index in range(model["depth"]):
        ours, theirs = f"stack/blocks/{index}", f"blocks.{index}"
        found += [
            *affine(f"{ours}/modulation", f"{theirs}.adaLN_modulation.1"),
            *affine(f"{ours}/attention/qkv", f"{theirs}.attn.qkv"),
            *affine(f"{ours}/attention/out", f"{theirs}.attn.proj"),
            *affine(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
            *affine(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
        ]
    return found


def _positions(name: str, model: Model) -> dict:
    if model["image_size"] is None:
        return {}
    side = model["image_size"] // model["patch"]
    return {name: sincos_positions(model["width"], side, side)[None]}


DIT = Layout(
    name="dit",
    kind="dit",
    signature=("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"),
    infer=infer,
    shapes=shapes_of(build),
    rules=rules,
    constants=functools.partial(_positions, "pos_embed"),
)


def infer_diffusers(shapes: Shapes, config: dict) -> Model:
    block = "transformer_blocks.0"
    model = _model(
        shapes,
        depth=depth_of(shapes, "transformer_blocks."),
        heads=config.get("num_attention_heads"),
        patch_embed="pos_embed.proj.weight",
        table=f"{block}.norm1.emb.class_embedder.embedding_table.weight",
        hidden=f"{block}.ff.net.0.proj.weight",
        final="proj_out_2.weight",
        positions="pos_embed.pos_embed",
    )
    return model | {"image_size": model["image_size"] or config.get("sample_size")}


def rules_diffusers(model: Model) -> list[Rule]:
    blocks = [f"transformer_blocks.{index}" for index in range(model["depth"])]
    embedders = [f"{block}.norm1.emb" for block in blocks]
    copied = functools.partial(copies, count=len(blocks))
    found = [
        *affine("patch_embed", "pos_embed.proj", kernel=patches(model["patch"])),
        *affine("timestep_embed/first", *[f"{e}.timestep_embedder.linear_1" for e in embedders], change=copied),
        *affine("timestep_embed/second", *[f"{e}.timestep_embedder.linear_2" for e in embedders], change=copied),
        Rule(
            "label_embed/table/embedding",
            tuple(f"{e}.class_embedder.embedding_table.weight" for e in embedders),
            copied(SAME),
        ),
        *affine("final/modulation", "proj_out_1"),
        *affine("final/out", "proj_out_2"),
    ]
    for index, theirs in enumerate(blocks):
        ours = f"stack/blocks/{index}"
        found += [
            *affine(f"{ours}/modulation", f"{theirs}.norm1.linear"),
            *affine(f"{ours}/attention/qkv", *[f"{theirs}.attn1.to_{part}" for part in "qkv"]),
            *affine(f"{ours}/attention/out", f"{theirs}.attn1.to_out.0"),
            *affine(f"{ours}/mlp/up", f"{theirs}.ff.net.0.proj"),
            *affine(f"{ours}/mlp/down", f"{theirs}.ff.net.2"),
        ]
    return found


def config_diffusers(model: Model) -> dict:
    heads = model["heads"] or 0
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": model["width"] // heads if heads else 0,
        "in_channels": model["in_channels"],
        "out_channels": model["out_channels"],
        "num_layers": model["depth"],
        "sample_size": model["image_size"],
        "patch_size": model["patch"],
        "num_embeds_ada_norm": model["num_classes"],
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


DIFFUSERS_DIT = Layout(
    name="diffusers-dit",
    kind="dit",
    signature=("pos_embed.proj.weight", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"),
    infer=infer_diffusers,
    shapes=shapes_of(build),
    rules=rules_diffusers,
    config=config_diffusers,
    constants=functools.partial(_positions, "pos_embed.pos_embed"),
    written=False,
)
