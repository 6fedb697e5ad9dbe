"""A fake of the pretrained text encoders, which need packages that these tests do not install."""

import zlib

import numpy as np

from trm_diffusion.models.text import Text


class FakeEncoder:
    """Random values that depend only on the text and on `weights`, the name of the weights."""

    weights = "first"

    def __init__(self, config):
        self.config = config
        sizes = {name: getattr(config, name) for name in ("recipe", "length", "features", "pooled_features")}
        self.encoding = sizes | {"dtype": config.pretrained_dtype, "encoders": [{"weights_sha256": self.weights}]}
        self.origin = {"pretrained": config.pretrained, "revision": config.revision, "commit": None}

    def __call__(self, texts):
        return Text(*map(np.stack, zip(*map(self.one, texts), strict=True)))

    def one(self, text: str) -> Text:
        config, rng = self.config, np.random.default_rng(zlib.crc32(f"{self.weights} {text}".encode()))
        states = rng.standard_normal((config.length, config.features), np.float32)
        mask = np.arange(config.length) <= len(text.split())
        return Text(states, mask, rng.standard_normal(config.pooled_features, np.float32))

    def written_by(self):
        return {"fake": "1"}
