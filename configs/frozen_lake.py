"""FrozenLake on two CPU cores: a small DiT draws a shortest path into the lake that it is given as a context image.

Options, after a colon: size=4 (cells a side, 4 to 16), recursion=off, paper or live, as in configs/maze.py. For example
configs/frozen_lake.py:size=6,recursion=live

Needs requirements-frozen-lake.txt.
"""

from trm_diffusion.config import default_config, variant
from trm_diffusion.errors import UserError

CELL = 4  # pixels a side of a cell
RECURSION = {
    "off": dict(blocks="none"),
    "paper": dict(blocks="all"),
    "live": dict(blocks="all", base_every_step=True, base_input="carry"),
}


def get_config(argument: str = ""):
    options = variant(argument, size="4", recursion="off")
    if options["recursion"] not in RECURSION:
        raise UserError(f"recursion={options['recursion']} is none of {', '.join(RECURSION)}")
    if not options["size"].isdecimal():
        raise UserError(f"size={options['size']}: give the number of cells a side")
    c = default_config()
    c.name = f"frozen_lake{options['size']}_{options['recursion']}"

    c.data.source = "frozen_lake"  # drawn on the fly; test layouts do not occur in training
    c.data.image_size = CELL * int(options["size"])
    c.data.channels = 3  # the lake with the path
    c.data.context_channels = 3  # the lake
    c.data.num_classes = 1  # lakes have no labels

    c.model.depth = 4
    c.model.width = 64
    c.model.heads = 4
    c.model.patch = CELL  # a token a cell
    c.model.qk_norm = True
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.model.recursion.latent_steps = 4
    c.model.recursion.rank = 16
    c.model.recursion.update(RECURSION[options["recursion"]])

    c.diffusion.objective = "rectified_flow"
    c.diffusion.time_distribution = "uniform"
    c.diffusion.shift = 8.0  # 16 pixels show the same cell, so only much noise hides the path

    c.train.updates = 4000
    c.train.batch_size = 64
    c.train.label_dropout = 0.0  # a path without its lake is none, so there is nothing to guide from
    c.optim.lr = 1.5e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100
    c.optim.clip_norm = 1.0
    c.optim.ema_decays = (0.995,)  # about the last 200 updates

    c.sample.sampler = "euler"
    c.sample.diffusion_steps = 16
    c.sample.per_class = 4  # tries at each lake
    c.evaluate.kind = "frozen_lake"
    c.evaluate.num_samples = 1024

    c.log.every = 50
    c.log.samples_every = 1000
    c.checkpoint.every = 500
    return c
