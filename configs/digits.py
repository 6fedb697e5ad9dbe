"""Scanned digits, 8x8, in pixel space: a small DiT with recursion, trained on two CPU cores in minutes."""

from trm_diffusion.config import default_config


def get_config():
    c = default_config()
    c.name = "digits"

    c.data.source = "digits"  # scikit-learn's 1,797 scanned digits; nothing to download
    c.data.image_size = 8  # pixels a side
    c.data.channels = 1  # greyscale
    c.data.num_classes = 10

    c.model.depth = 4
    c.model.width = 96
    c.model.heads = 4
    c.model.patch = 2  # 16 tokens an image
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.model.recursion.blocks = "middle"  # one block recurses, the paper's smallest setting
    c.model.recursion.rank = 16

    c.diffusion.objective = "rectified_flow"

    c.train.updates = 1000
    c.train.batch_size = 128
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100
    c.optim.clip_norm = 1.0
    c.optim.ema_decays = (0.995,)  # about the last 200 updates

    c.sample.sampler = "heun"
    c.sample.diffusion_steps = 20
    c.sample.guidance = 1.5
    c.evaluate.kind = "digits"
    c.evaluate.num_samples = 2000

    c.log.every = 50
    c.log.samples_every = 500
    c.checkpoint.every = 500
    return c
