"""From the same noise, our samplers and diffusers' schedulers go through the same states.

The schedulers are set to our noise levels:
    DDPM   improved DDPM's respacing is what diffusers calls "linspace", if no level falls on a half;
    DDIM   diffusers always steps down by T // n, so its n is chosen to give our stride, (T - 1) / (n - 1);
    Euler  our levels before the shift are passed as `sigmas`; diffusers' own end at 1 / T instead of 0.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

from tests.parity import official_dit
from tests.parity.common import assert_parity, bound, randomize
from trm_diffusion.diffusion.objective import DiffusionConfig
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.diffusion.samplers import draw_initial_noise, sample
from trm_diffusion.jobs.convert_weights import convert
from trm_diffusion.models.dit import DiT, DiTConfig
from trm_diffusion.weights.store import load_weights

TOLERANCE = 1e-3
SHAPE, STEPS, TIMESTEPS = (4, 4, 2), 10, 1000
KEYS = jax.random.split(jax.random.key(0), 3)


def network(x, times, sin, channels):
    """A smooth function of the noisy sample and its time, with `channels` channels, for JAX and PyTorch."""
    base = 0.8 * sin(1.3 * x + times / 250.0) + 0.1 * x
    return base if channels == SHAPE[-1] else (base, 0.7 * sin(2.0 * x))


def our_states(config, sampler, **options):
    """States [n + 1, B, H, W, C], from pure noise to the sample; and the network's times [n]."""
    objective = make_objective(config)
    channels = objective.output_channels(SHAPE[-1])

    def recorded(noisy, times):
        inputs = objective.network_times(times)
        output = network(noisy, inputs[:, None, None, None], jnp.sin, channels)
        output = output if channels == SHAPE[-1] else jnp.concatenate(output, axis=-1)
        return output, (noisy, inputs[0])

    noise = draw_initial_noise(KEYS, SHAPE)
    samples, (states, times) = sample(
        recorded, objective, noise, KEYS, sampler=sampler, diffusion_steps=STEPS, **options
    )
    return np.concatenate([states, samples[None]]), np.asarray(times)


def fresh_noise(step):
    """The noise that our samplers draw in diffusion step `step`."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step + 1))(KEYS)
    return torch.from_numpy(np.array(jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)))


def assert_same_way(states, times, step, channels=SHAPE[-1]):
    """step(output, time, state, index) -> the scheduler's next state, channels last like ours."""
    state = torch.from_numpy(states[0].copy())
    for index, time in enumerate(times):
        output = network(state, torch.tensor(float(time)), torch.sin, channels)
        state = step(output, time, state, index)
        assert np.abs(state.numpy() - states[index + 1]).max() <= TOLERANCE * np.abs(states[index + 1]).max()


@pytest.mark.parametrize("learned", [False, True], ids=["fixed_small", "learned_range"])
def test_ddpm(learned, monkeypatch):
    config = DiffusionConfig(objective="ddpm", learned_sigma=learned, timesteps=TIMESTEPS)
    states, times = our_states(config, "ddpm")
    scheduler = diffusers.DDPMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="linear",
        variance_type="learned_range" if learned else "fixed_small",
        timestep_spacing="linspace",
        clip_sample=False,
    )
    scheduler.set_timesteps(STEPS)
    np.testing.assert_array_equal(scheduler.timesteps, times)

    def step(output, time, state, index):
        module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
        monkeypatch.setattr(module, lambda *_, **__: fresh_noise(index).movedim(-1, 1))
        output = torch.cat(output, dim=-1) if learned else output
        moved = scheduler.step(output.movedim(-1, 1), int(time), state.movedim(-1, 1)).prev_sample
        return moved.movedim(1, -1)

    assert_same_way(states, times, step, channels=SHAPE[-1] * (1 + learned))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(eta):
    config = DiffusionConfig(objective="ddpm", timesteps=TIMESTEPS)
    states, times = our_states(config, "ddim", eta=eta)
    stride = (TIMESTEPS - 1) // (STEPS - 1)
    np.testing.assert_array_equal(np.diff(times), -stride)
    scheduler = diffusers.DDIMScheduler(
        beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule="linear", clip_sample=False
    )
    scheduler.set_timesteps(TIMESTEPS // stride)

    def step(output, time, state, index):
        noise = fresh_noise(index) if eta else None
        return scheduler.step(output, int(time), state, eta=eta, variance_noise=noise).prev_sample

    assert_same_way(states, times, step)


def test_flow_euler():
    shift = 3.0  # SD3's
    states, times = our_states(DiffusionConfig(objective="rectified_flow", shift=shift), "euler")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, STEPS + 1)[:-1])
    np.testing.assert_allclose(scheduler.timesteps, times, rtol=1e-6)

    def step(output, time, state, index):
        return scheduler.step(output, scheduler.timesteps[index], state).prev_sample

    assert_same_way(states, times, step)


def test_sit_takes_the_way_of_its_own_equations(tmp_path):
    """SiT goes from noise at its time 0 to data at 1 along its output, the first half of the channels."""
    theirs = randomize(official_dit.DiT(2, 32, 2, 2, 8, 4, 8, 10))
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "sit.safetensors")
    convert(str(tmp_path / "sit.safetensors"), str(tmp_path / "ours"), layout="sit")
    model = dict(depth=2, width=32, heads=2, patch=2, dtype="float32", scan_blocks=False)
    sizes = dict(image_size=8, in_channels=4, out_channels=8, num_classes=10)
    module = bound(lambda: DiT(DiTConfig(**model), **sizes, rngs=nnx.Rngs(0)), load_weights(tmp_path / "ours"))
    config = DiffusionConfig(objective="rectified_flow", convention="sit", learned_sigma=True)
    noise = draw_initial_noise(KEYS, (8, 8, 4))
    labels = np.array([1, 2, 3])
    ours, _ = sample(
        lambda noisy, times: (module(noisy, make_objective(config).network_times(times), labels)[0], None),
        make_objective(config), noise, KEYS, sampler="euler", diffusion_steps=STEPS,
    )  # fmt: skip
    state = torch.from_numpy(np.array(noise)).movedim(-1, 1)
    with torch.no_grad():
        for index in range(STEPS):
            times = torch.full((3,), index / STEPS)
            state = state + theirs(state, times, torch.from_numpy(labels))[:, :4] / STEPS
    assert_parity(ours, state, TOLERANCE)
