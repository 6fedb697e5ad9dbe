"""A short run with many checkpoints, for tests that kill or stop it."""

from trm_diffusion.config import default_config

UPDATES = 60


def get_config():
    c = default_config()
    c.model.update(depth=2, width=16, heads=2, patch=4, dtype="float32")
    c.model.recursion.update(blocks="1", rank=4, routing_group=2)
    c.train.update(updates=UPDATES, batch_size=8)
    c.optim.update(lr=1e-2, ema_decays=(0.9,))
    c.sample.update(diffusion_steps=2, per_class=1, batch_size=8)
    c.evaluate.update(kind="digits", num_samples=20)
    c.log.update(every=4, samples_every=0, tensorboard=False)
    c.checkpoint.every = 3
    c.data.workers = 1
    return c
