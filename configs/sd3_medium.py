"""Stable Diffusion 3 medium at 1024x1024, frozen; the paper's recursion is trained in layers 4, 8 and 12.

Options, after a colon: recursion=off|middle|all|4.8.12 (block indices, joined by dots), T=2 (latent steps), M=2
(experts). By default the data are synthetic latents and text encodings; docs/text.md goes from captioned images to
GenEval and DPG-Bench.
"""

from trm_diffusion.config import default_config, variant
from trm_diffusion.errors import UserError
from trm_diffusion.models.mmdit import SD3_MEDIUM
from trm_diffusion.models.recursion.config import recursive_blocks


def get_config(argument: str = ""):
    options = variant(argument, recursion="4.8.12", T="2", M="2")
    c = default_config()
    c.name = f"sd3_medium_{options['recursion']}"

    c.model.architecture = "mmdit"
    c.model.update(SD3_MEDIUM)  # depth, width, heads, patch
    c.model.mmdit.position_max_size = 192
    c.model.mmdit.position_base_size = 64
    c.model.text.encoder = "encoded"
    c.model.text.recipe = "sd3"  # CLIP-L, CLIP-G and T5-XXL, combined as published
    c.model.text.pretrained = ""  # local copy of the published pipeline that has all three, or its hub id
    c.model.text.pretrained_dtype = "float32"  # of the encoders; bfloat16 halves their 22 GB
    c.model.text.length = 333  # 77 tokens of the two CLIP encoders, then 256 of T5
    c.model.text.features = 4096
    c.model.text.pooled_features = 2048
    try:
        c.model.recursion.latent_steps = int(options["T"])  # paper: 2
        c.model.recursion.experts = int(options["M"])  # paper: 2
        blocks = {"off": "none"}.get(options["recursion"], options["recursion"].replace(".", ","))
        recursive_blocks(blocks, c.model.depth)
    except ValueError as error:
        raise UserError(str(error)) from None
    c.model.recursion.blocks = blocks  # paper: one middle layer, or layers 4, 8 and 12
    c.model.recursion.rank = 128  # paper
    c.model.recursion.temperature = 5.0  # paper
    c.model.recursion.routing_group = 1
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data.source = "synthetic"
    c.data.image_size = 128  # latent cells a side, 8 pixels each
    c.data.channels = 16
    c.data.num_classes = 0  # captions instead of labels
    c.data.text = ""  # directory written by --mode=encode; use it with config.data.source=latents

    c.diffusion.objective = "rectified_flow"
    c.diffusion.shift = 3.0  # SD3's value at this resolution

    c.train.trainable = "recursion"  # gates and experts; the base stays frozen
    c.train.updates = 5_000
    c.train.batch_size = 16
    c.optim.lr = 1e-4
    c.optim.clip_norm = 1.0
    c.optim.ema_decays = (0.999,)

    c.sample.sampler = "euler"
    c.sample.diffusion_steps = 28
    c.sample.guidance = 7.0
    c.sample.per_class = 1
    c.sample.batch_size = 16

    c.mesh.fsdp = -1  # shard the state over as many devices of a slice as possible

    c.log.every = 20
    c.checkpoint.every = 500
    return c
