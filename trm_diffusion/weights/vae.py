"""The autoencoder's published layouts: diffusers' AutoencoderKL, and that of Stable Diffusion's single files."""

from collections.abc import Callable, Iterator

from flax import nnx

from trm_diffusion.models.vae import SD, SD3, VAE, VAEConfig
from trm_diffusion.weights.forms import CONV, LINEAR, POINTWISE, Form, Rule, affine, norm
from trm_diffusion.weights.layout import Layout, Model, Shapes, depth_of, shapes_of


def _model(shapes: Shapes, config: dict, level: str, block: str) -> Model:
    """`level` and `block` name a level of the encoder and a residual block in it, up to their numbers."""
    count = depth_of(shapes, level)
    channels = [shapes[f"{level}{index}.{block}0.conv2.weight"][0] for index in range(count)]
    latent_channels = shapes["decoder.conv_in.weight"][1]
    known = SD3 if latent_channels == SD3.latent_channels else SD
    return dict(
        channels=channels,
        blocks=depth_of(shapes, f"{level}0.{block}"),
        image_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=latent_channels,
        quant_conv="quant_conv.weight" in shapes,
        groups=config.get("norm_num_groups", SD.groups),
        scale=config.get("scaling_factor", known.scale),
        shift=config.get("shift_factor", known.shift) or 0.0,
    )


def config_of(model: Model) -> VAEConfig:
    return VAEConfig(**model | {"channels": tuple(model["channels"])})


def build(model: Model) -> nnx.Module:
    return VAE(config_of(model | {"groups": 1}), rngs=nnx.Rngs(0))  # shapes do not depend on the groups


def _residual(ours: str, theirs: str, shortcut: str | None) -> Iterator[Rule]:
    for name in ("1", "2"):
        yield from norm(f"{ours}/norm{name}", f"{theirs}.norm{name}")
        yield from affine(f"{ours}/conv{name}", f"{theirs}.conv{name}", kernel=CONV)
    if shortcut:
        yield from affine(f"{ours}/shortcut", f"{theirs}.{shortcut}", kernel=CONV)


def _middle(
    ours: str, resnets: tuple[str, str], attention: str, parts: tuple[str, ...], kernel: Form
) -> Iterator[Rule]:
    normed, *qkv, out = (f"{attention}.{part}" for part in parts)
    yield from _residual(f"{ours}/first", resnets[0], None)
    yield from norm(f"{ours}/attention/norm", normed)
    yield from affine(f"{ours}/attention/qkv", *qkv, kernel=kernel)
    yield from affine(f"{ours}/attention/out", out, kernel=kernel)
    yield from _residual(f"{ours}/second", resnets[1], None)


def _rules(
    model: Model,
    *,
    middle: Callable[[str, str], Iterator[Rule]],
    level: Callable[[str, int, int], tuple[str, str, str]],
    norm_out: str,
    shortcut: str,
) -> list[Rule]:
    """All rules, in terms of what differs between the layouts.

    middle: our path and theirs -> rules of the middle. level: "encoder" or "decoder", the level's index and the number
    of levels -> the prefix of its residual blocks' names, and the name of its resampling convolution.
    """
    widths = list(model["channels"])
    found = []
    for side, blocks, order in (("encoder", model["blocks"], widths), ("decoder", model["blocks"] + 1, widths[::-1])):
        found += [
            *affine(f"{side}/conv_in", f"{side}.conv_in", kernel=CONV),
            *middle(f"{side}/middle", side),
            *norm(f"{side}/norm_out", f"{side}.{norm_out}"),
            *affine(f"{side}/conv_out", f"{side}.conv_out", kernel=CONV),
        ]
        for index, width in enumerate(order):
            begins, resample = level(side, index, len(order))
            for block in range(blocks):
                changes = block == 0 and order[max(0, index - 1)] != width
                ours = f"{side}/levels/{index}/blocks/{block}"
                found += _residual(ours, f"{begins}{block}", shortcut if changes else None)
            if index < len(order) - 1:
                found += affine(f"{side}/levels/{index}/resample/conv", resample, kernel=CONV)
    if model["quant_conv"]:
        for name in ("quant_conv", "post_quant_conv"):
            found += affine(name, name, kernel=CONV)
    return found


def rules_diffusers(model: Model) -> list[Rule]:
    def middle(ours, side):
        block = f"{side}.mid_block"
        parts = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        resnets = (f"{block}.resnets.0", f"{block}.resnets.1")
        return _middle(ours, resnets, f"{block}.attentions.0", parts, LINEAR)

    def level(side, index, count):
        way, resample = {"encoder": ("down", "downsamplers"), "decoder": ("up", "upsamplers")}[side]
        block = f"{side}.{way}_blocks.{index}"
        return f"{block}.resnets.", f"{block}.{resample}.0.conv"

    return _rules(model, middle=middle, level=level, norm_out="conv_norm_out", shortcut="conv_shortcut")


def rules_single_file(model: Model) -> list[Rule]:
    def middle(ours, side):
        resnets = (f"{side}.mid.block_1", f"{side}.mid.block_2")
        return _middle(ours, resnets, f"{side}.mid.attn_1", ("norm", "q", "k", "v", "proj_out"), POINTWISE)

    def level(side, index, count):
        if side == "encoder":
            return f"encoder.down.{index}.block.", f"encoder.down.{index}.downsample.conv"
        block = f"decoder.up.{count - 1 - index}"  # counted from fine to coarse
        return f"{block}.block.", f"{block}.upsample.conv"

    return _rules(model, middle=middle, level=level, norm_out="norm_out", shortcut="nin_shortcut")


def config_diffusers(model: Model) -> dict:
    levels = len(model["channels"])
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": model["image_channels"],
        "out_channels": model["image_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(model["channels"]),
        "layers_per_block": model["blocks"],
        "latent_channels": model["latent_channels"],
        "norm_num_groups": model["groups"],
        "scaling_factor": model["scale"],
        "shift_factor": model["shift"],
        "use_quant_conv": model["quant_conv"],
        "use_post_quant_conv": model["quant_conv"],
    }


DIFFUSERS_VAE = Layout(
    name="diffusers-vae",
    kind="vae",
    signature=("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"),
    infer=lambda shapes, config: _model(shapes, config, "encoder.down_blocks.", "resnets."),
    shapes=shapes_of(build),
    rules=rules_diffusers,
    config=config_diffusers,
    renamed=(
        (".attentions.0.query.", ".attentions.0.to_q."),
        (".attentions.0.key.", ".attentions.0.to_k."),
        (".attentions.0.value.", ".attentions.0.to_v."),
        (".attentions.0.proj_attn.", ".attentions.0.to_out.0."),
    ),
)

SINGLE_FILE_VAE = Layout(
    name="single-file-vae",
    kind="vae",
    signature=("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"),
    infer=lambda shapes, config: _model(shapes, config, "encoder.down.", "block."),
    shapes=shapes_of(build),
    rules=rules_single_file,
    prefixes=("first_stage_model.", ""),
    neighbours=("model.", "text_encoders.", "cond_stage_model.", "conditioner.", "model_ema."),
)
