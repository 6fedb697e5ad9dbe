"""Liveness against the plain reference."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.recursion import reference
from tests.models.recursion.small import HEADS, SMALL, as_reference, build, inputs, run, run_reference

FORMS = {
    "paper": (False, dict()),
    "joint": (True, dict(experts=3, experts_per_token=2)),
    "alive": (True, dict(base_every_step=True, base_input="carry", state="gated", attention_qk_norm=True)),
    "halting": (False, dict(halting="convergence", halting_epsilon=0.6)),
}


def relative(change, to):
    return np.linalg.norm(change) / np.linalg.norm(to)


@pytest.mark.parametrize("form", FORMS)
def test_liveness_equals_reference(form):
    joint, fields = FORMS[form]
    config, steps = dataclasses.replace(SMALL, latent_steps=4, **fields), 4
    graphdef, state = build(config, qk_norm=form == "joint")
    data = inputs()
    plain, none = run(graphdef, state, data, steps=steps, joint=joint)
    qkv, report = jax.jit(lambda state: run(graphdef, state, data, steps=steps, joint=joint, observe=True))(state)
    assert none.observed is None
    np.testing.assert_allclose(qkv, plain, rtol=1e-5, atol=1e-5)

    arguments = as_reference(graphdef, state, data, joint=joint)
    expected = run_reference(arguments, config, steps=steps)
    x, (kernel, bias) = arguments["x"], arguments["base"]
    states = [x, *(after for _, after in expected.trajectory)]
    states.append(states[-1])
    own = [(arguments["forms"]["query_scale"], arguments["forms"]["key_scale"])] if config.attention_qk_norm else []
    of_base = [arguments["norms"]] if arguments["norms"] else []

    def entropy(qkv, norms):
        text = [None if not joint else [part[b] for part in arguments["context"]] for b in range(len(qkv))]
        return np.mean(
            [reference.attention_entropy(one, HEADS, norms, words) for one, words in zip(qkv, text, strict=True)]
        )

    entropies = [*(entropy(qkv, own + of_base) for qkv, _ in expected.trajectory), entropy(expected.qkv, of_base)]
    found, close = report.observed.liveness, dict(rtol=1e-5, atol=1e-5)
    pairs = list(zip(states[:-1], states[1:], strict=True))
    np.testing.assert_allclose(found.change, [relative(b - a, a) for a, b in pairs], **close)
    np.testing.assert_allclose(found.drift, [relative(b - x, x) for _, b in pairs], **close)
    np.testing.assert_allclose(found.update, [relative(u, x @ kernel + bias) for u in expected.updates], **close)
    np.testing.assert_allclose(found.entropy, entropies, **close)
    assert found.change[0] > 0.1 and found.change[-1] == 0 and 0 < found.entropy[0] < 1
