"""An image as a condition: a small picture to enlarge, concatenated to the noisy image along channels."""

import jax
import jax.numpy as jnp
import numpy as np

from trm_diffusion.conditions.base import ROWS_SHOWN, Condition, SampleRequest
from trm_diffusion.data.texts import ConditionedSource

FACTOR = 4


class EnlargedSource(ConditionedSource):
    mirrored = ("image", "small")

    def condition(self, element, rng=None):
        height, width, channels = self.sample_shape
        small = element["image"].reshape(height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels).mean((1, 3))
        return {"small": np.repeat(np.repeat(small, FACTOR, 0), FACTOR, 1)}


class LowResolution(Condition):
    name = "small image"
    draws = "small images"
    instead = "omit the flag to draw those of its data"

    @classmethod
    def matches(cls, config):
        return config.name == "enlarge"

    @classmethod
    def check_config(cls, config):
        pass

    def wrap(self, source):
        return EnlargedSource(source)

    @property
    def record_shapes(self):
        data = self.config.data
        return {"small": jax.ShapeDtypeStruct((data.image_size, data.image_size, data.channels), np.float32)}

    def from_batch(self, batch):
        return batch["small"]

    @property
    def null(self):
        return np.zeros(self.record_shapes["small"].shape, np.float32)

    @property
    def input_channels(self):
        return 2 * self.config.data.channels

    def apply(self, network, noisy, times, condition, **options):
        labels = jnp.zeros(len(noisy), jnp.int32)  # constant: the picture is the whole condition
        return network(jnp.concatenate([noisy, condition], axis=-1), times, labels, **options)

    def encode(self, wanted):
        return np.stack(wanted)

    def request(self, prompts=()):
        if prompts:
            self.require("texts", "--prompt")
        source = self.source()
        small = self.encode([source[index]["small"] for index in range(ROWS_SHOWN)])
        return SampleRequest(np.repeat(small, self.config.sample.per_class, axis=0), {"small": small})
