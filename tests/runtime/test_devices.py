"""The compilation cache: its directory, and a second start that compiles nothing. The compiler options."""

import collections
import os

import jax
import pytest
from etils import epath
from jax._src import compilation_cache

from tests.jobs.tiny import tiny_config
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime import devices
from trm_diffusion.runtime.libtpu import DIRECTORY, run_with_libtpu
from trm_diffusion.runtime.signals import StopRequest

FIELDS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def settings_as_before():
    before = {field: getattr(jax.config, field) for field in FIELDS}
    yield
    for field, value in before.items():
        jax.config.update(field, value)
    compilation_cache.reset_cache()


def test_where_it_lies(tmp_path):
    workdir = epath.Path(tmp_path / "runs/a")
    devices.use_compilation_cache("", workdir)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "runs/.compilation_cache")
    devices.use_compilation_cache(str(tmp_path / "b"), workdir)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "b")
    devices.use_compilation_cache("", workdir)  # as if the environment variable were set
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "b")
    assert jax.config.jax_enable_compilation_cache
    devices.use_compilation_cache("none", workdir)
    assert not jax.config.jax_enable_compilation_cache


def test_a_second_start_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "LEAST_COMPILE_SECONDS", 0.0)  # cache tiny programs too
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))

    def start(name: str) -> collections.Counter:
        jax.clear_caches()
        events.clear()
        workdir = epath.Path(tmp_path / "runs" / name)
        devices.use_compilation_cache("", workdir)
        with StopRequest() as stop:
            train(tiny_config(train__updates=2), workdir, stop)
        return events.copy()

    first, second = start("a"), start("b")
    assert first["cache_misses"] >= 2  # the initial state and the training step
    assert second["cache_misses"] == 0
    assert second["cache_hits"] == second["compile_requests_use_cache"] >= 2


@pytest.mark.skipif(DIRECTORY not in os.environ, reason="needs libtpu, in the directory that TRM_LIBTPU names")
def test_parameters_are_gathered_once_and_not_passed_around():
    collectives = run_with_libtpu(["-m", "tests.runtime.gathered_product"])
    assert collectives == {"all-gather": {"count": 1, "bytes": 2 * 1152 * 4608 * 31 / 32}}  # in bfloat16
