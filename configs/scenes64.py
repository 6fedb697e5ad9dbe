"""Text to image on one accelerator: scenes of eight shapes, 64x64, with captions, and an MMDiT with recursion."""

from trm_diffusion.config import default_config


def get_config():
    c = default_config()
    c.name = "scenes64"

    c.data.source = "scenes"
    c.data.image_size = 64
    c.data.channels = 3
    c.data.num_classes = 0  # captions instead of labels
    c.data.workers = 8

    c.model.architecture = "mmdit"
    c.model.depth = 12
    c.model.width = 384
    c.model.heads = 6
    c.model.patch = 4  # 256 tokens an image
    c.model.qk_norm = True
    c.model.dtype = "bfloat16"
    c.model.mmdit.position_max_size = 16  # the whole grid, no cropping
    c.model.mmdit.position_base_size = 16
    c.model.mmdit.mask_padding = True
    c.model.text.length = 21  # the longest caption has 20 words
    c.model.text.features = 256
    c.model.text.pooled_features = 256
    c.model.text.vocabulary = 128
    c.model.recursion.blocks = "middle"
    c.model.recursion.rank = 64

    c.diffusion.objective = "rectified_flow"

    c.train.updates = 100_000
    c.train.batch_size = 256
    c.optim.lr = 5e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 1000
    c.optim.clip_norm = 1.0
    c.optim.ema_decays = (0.9995,)

    c.sample.sampler = "ab2"
    c.sample.diffusion_steps = 50
    c.sample.guidance = 3.0
    c.sample.per_class = 6
    c.sample.batch_size = 64
    c.evaluate.kind = "scenes"
    c.evaluate.num_samples = 6000

    c.log.every = 100
    c.log.samples_every = 5000
    c.checkpoint.every = 2000
    return c
