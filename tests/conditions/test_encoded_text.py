"""Encoded text of synthetic data, which is noise; tests/jobs/test_encode_text.py covers the encoders."""

import numpy as np

from tests.conditions.batches import batch_of
from tests.jobs.tiny import text_config
from trm_diffusion.experiment import build
from trm_diffusion.jobs.train_step import make_train_step


def test_encoded_text_trains_and_is_sampled():
    config = text_config(
        data__source="synthetic", data__num_classes=1, model__text__encoder="encoded", model__text__pooled_features=3,
        train__trainable="recursion",
    )  # fmt: skip
    experiment = build(config)
    state, batch = experiment.init_state(), batch_of(config)
    assert set(batch) == {"image", "states", "mask", "pooled"} and batch["pooled"].shape == (8, 3)
    assert all("/recursion/" in name for name in state.trainable) and state.frozen
    _, metrics = make_train_step(experiment)(state, batch)
    assert np.isfinite(metrics["loss"])
    request = experiment.condition.request()
    assert request.captions is None and request.condition.states.shape == (20, 5, 8)
