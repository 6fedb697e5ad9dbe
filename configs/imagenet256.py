"""Class-conditional ImageNet at 256x256: DiT-XL/2 on 32x32x4 latents, with the paper's recursion.

Options, after a colon: model=S/2 (any DiT size), recursion=off|middle|all|4.8.12 (block indices, joined by dots),
T=2 (latent steps), M=2 (experts). For example configs/imagenet256.py:model=S/2,recursion=off
"""

from trm_diffusion.config import default_config, variant
from trm_diffusion.errors import UserError
from trm_diffusion.models.dit import dit_size
from trm_diffusion.models.recursion.config import recursive_blocks


def get_config(argument: str = ""):
    options = variant(argument, model="XL/2", recursion="middle", T="2", M="2")
    c = default_config()
    c.name = f"imagenet256_{options['model'].replace('/', '_')}_{options['recursion']}"

    try:
        c.model.update(dit_size(options["model"]))  # depth, width, heads, patch
        c.model.recursion.latent_steps = int(options["T"])  # T
        c.model.recursion.experts = int(options["M"])  # M
        blocks = {"off": "none"}.get(options["recursion"], options["recursion"].replace(".", ","))
        recursive_blocks(blocks, c.model.depth)
    except ValueError as error:
        raise UserError(str(error)) from None
    c.model.recursion.blocks = blocks  # the paper: one middle layer, or several
    c.model.recursion.rank = 128  # paper
    c.model.recursion.temperature = 5.0  # paper
    c.model.dtype = "bfloat16"  # compute dtype; parameters stay float32
    c.model.remat = "selective"  # trm_diffusion/models/remat.py compares the policies

    c.data.source = "latents"  # prepared latents; synthetic needs no data
    c.data.image_size = 32  # latent cells a side
    c.data.channels = 4  # of Stable Diffusion's autoencoder
    c.data.num_classes = 1000

    c.diffusion.objective = "ddpm"  # as in DiT: eps-prediction, 1,000 steps, linear betas
    c.diffusion.learned_sigma = True  # as in DiT: learned-range variance, hybrid loss

    c.train.updates = 400_000  # DiT's ablation length; its published XL/2 took 7,000,000
    c.train.batch_size = 256
    c.optim.lr = 1e-4  # constant, as in DiT
    c.optim.ema_decays = (0.9999,)
    c.optim.ema_warmup = False  # as in DiT

    c.sample.sampler = "ddpm"
    c.sample.diffusion_steps = 250
    c.sample.guidance = 1.5  # DiT's setting for its best FID
    c.sample.guidance_channels = "all"  # DiT's published figures used dit3
    c.sample.classes = (207, 360, 387, 974, 88, 979, 417, 279)  # the classes that DiT shows
    c.sample.per_class = 4
    c.sample.batch_size = 64

    c.mesh.fsdp = -1  # shard the state over as many devices of a slice as possible

    c.log.every = 100
    c.log.samples_every = 10_000
    c.checkpoint.every = 5_000
    c.checkpoint.keep = 2
    c.checkpoint.keep_every = 100_000
    return c
