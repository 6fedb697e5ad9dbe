"""Mazes on two CPU cores: a small DiT draws the path through a maze that it is given as a context image.

Options, after a colon: rooms=4 (a side, 3 to 15); recursion=off, paper or live; yardstick=no or yes. "paper" recurses
in every block with T = 4, as the paper's equations say; "live" adds the base projection in every latent step, of the
state that it carries. The yardstick has two blocks instead of four and trains for minutes, to compare forms.
For example configs/maze.py:rooms=5,recursion=live,yardstick=yes
"""

from trm_diffusion.config import default_config, variant
from trm_diffusion.errors import UserError

RECURSION = {
    "off": dict(blocks="none"),
    "paper": dict(blocks="all"),
    "live": dict(blocks="all", base_every_step=True, base_input="carry"),
}


def get_config(argument: str = ""):
    options = variant(argument, rooms="4", recursion="off", yardstick="no")
    if options["recursion"] not in RECURSION:
        raise UserError(f"recursion={options['recursion']} is none of {', '.join(RECURSION)}")
    if options["yardstick"] not in ("no", "yes"):
        raise UserError(f"yardstick={options['yardstick']} is neither no nor yes")
    if not options["rooms"].isdecimal():
        raise UserError(f"rooms={options['rooms']}: give the number of rooms a side")
    yardstick = options["yardstick"] == "yes"
    c = default_config()
    c.name = f"maze{options['rooms']}_{options['recursion']}{'_yardstick' if yardstick else ''}"

    c.data.source = "mazes"  # drawn on the fly; test layouts do not occur in training
    c.data.image_size = 2 * int(options["rooms"]) - 1  # cells a side: rooms and what lies between them
    c.data.channels = 1  # the path
    c.data.context_channels = 3  # open cells, start, goal
    c.data.num_classes = 1  # mazes have no labels

    c.model.depth = 2 if yardstick else 4
    c.model.width = 64
    c.model.heads = 4
    c.model.patch = 1  # a token a cell
    c.model.qk_norm = True
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.model.recursion.latent_steps = 4
    c.model.recursion.rank = 16
    c.model.recursion.update(RECURSION[options["recursion"]])

    c.diffusion.objective = "rectified_flow"
    c.diffusion.time_distribution = "uniform"
    c.diffusion.shift = 2.0  # the path must be found at noise that hides it

    c.train.updates = 1500 if yardstick else 6000
    c.train.batch_size = 64
    c.train.label_dropout = 0.0  # a maze without its context has no path, so there is nothing to guide from
    c.optim.lr = 1.5e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100
    c.optim.clip_norm = 1.0
    c.optim.ema_decays = (0.995,)  # about the last 200 updates

    c.sample.sampler = "euler"
    c.sample.diffusion_steps = 12
    c.sample.per_class = 4  # tries at each maze
    c.evaluate.kind = "mazes"
    c.evaluate.num_samples = 1024
    c.evaluate.min_solved = 0.0 if yardstick else 0.8

    c.log.every = 50
    c.log.samples_every = 1000
    c.checkpoint.every = 500
    return c
