"""Text to image on emoji: OpenMoji's glyphs with their names, 32x32. Needs requirements-emoji.txt.

Credit for the glyphs and any image that shows them: designed by OpenMoji (https://openmoji.org), licence CC BY-SA 4.0.
"""

from trm_diffusion.config import default_config


def get_config():
    c = default_config()
    c.name = "emoji"

    c.data.source = "emoji"  # 1,914 glyphs, one name each: a test of the pipeline; the model memorises them
    c.data.image_size = 32
    c.data.channels = 3
    c.data.num_classes = 0  # captions instead of labels

    c.model.architecture = "mmdit"
    c.model.depth = 6
    c.model.width = 192
    c.model.heads = 6
    c.model.patch = 4  # 64 tokens an image
    c.model.qk_norm = True
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.model.mmdit.position_max_size = 8  # the whole grid, no cropping
    c.model.mmdit.position_base_size = 8
    c.model.mmdit.mask_padding = True
    c.model.text.length = 9  # the longest name has 8 words
    c.model.text.vocabulary = 1792  # 1,759 words and the special tokens
    c.model.recursion.blocks = "middle"
    c.model.recursion.rank = 32

    c.diffusion.objective = "rectified_flow"

    c.train.updates = 20_000
    c.train.batch_size = 64
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 500
    c.optim.clip_norm = 1.0
    c.optim.ema_decays = (0.999,)

    c.sample.sampler = "ab2"
    c.sample.diffusion_steps = 30
    c.sample.guidance = 3.0
    c.sample.per_class = 6
    c.sample.batch_size = 60

    c.log.every = 50
    c.log.samples_every = 1000
    c.checkpoint.every = 500
    return c
