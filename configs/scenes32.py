"""Text to image on two CPU cores: scenes of coloured shapes, 32x32, with captions, and a small MMDiT with recursion."""

from trm_diffusion.config import default_config


def get_config():
    c = default_config()
    c.name = "scenes32"

    c.data.source = "scenes"  # rendered on the fly, with captions for GenEval's six tasks
    c.data.image_size = 32
    c.data.channels = 3
    c.data.num_classes = 0  # captions instead of labels

    c.model.architecture = "mmdit"
    c.model.depth = 5
    c.model.width = 128
    c.model.heads = 4
    c.model.patch = 4  # 64 tokens an image; an object is about 3 tokens wide
    c.model.qk_norm = True
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.model.mmdit.position_max_size = 8  # the whole grid, no cropping
    c.model.mmdit.position_base_size = 8
    c.model.mmdit.mask_padding = True
    c.model.text.length = 21  # the longest caption has 20 words
    c.model.text.vocabulary = 128
    c.model.recursion.blocks = "middle"
    c.model.recursion.rank = 32

    c.diffusion.objective = "rectified_flow"
    c.diffusion.time_distribution = "uniform"
    c.diffusion.shift = 2.0  # captions are informative only at noise that hides the large, flat objects

    c.train.updates = 14_000
    c.train.batch_size = 32
    c.optim.optimizer = "muon"  # docs/scenes.md compares it with AdamW
    c.optim.lr = 2e-3
    c.optim.muon_lr_ratio = 2.5
    c.optim.b2 = 0.99
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 500
    c.optim.clip_norm = 1.0
    c.optim.ema_decays = (0.999,)

    c.sample.sampler = "ab2"
    c.sample.diffusion_steps = 30
    c.sample.guidance = 3.0
    c.sample.per_class = 6
    c.sample.batch_size = 60
    c.evaluate.kind = "scenes"
    c.evaluate.num_samples = 1200  # 200 per task

    c.log.every = 50
    c.log.samples_every = 2000
    c.checkpoint.every = 500
    return c
