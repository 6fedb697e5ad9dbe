"""A run that is killed or stopped, and then resumed, equals an uninterrupted run."""

import json
import random
import signal
import time

import chex
import pytest
from etils import epath

from tests.jobs.resume_experiment import UPDATES, get_config
from tests.jobs.tiny import command, finished
from trm_diffusion.config import resolve
from trm_diffusion.experiment import build
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.logging import WALL_CLOCK_FIELDS

KILLS = 5


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A directory of runs that holds `whole`, the experiment run without interruption."""
    directory = tmp_path_factory.mktemp("resume")
    finished(start(directory, "whole"))
    return directory


def start(directory, run: str, *flags: str):
    return command("--config=tests/jobs/resume_experiment.py", f"--workdir={directory}/{run}", *flags)


def wait_until(process, condition, seconds: float = 300.0) -> bool:
    """Whether the condition came true before the job ended; fails the test if neither happens in time."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if condition():
            return True
        if time.monotonic() > end:
            process.kill()
            pytest.fail(f"nothing happened in {seconds:.0f} s: {process.communicate()[1][-2000:]}")
        time.sleep(0.01)
    return False


def steps_saved(run) -> set[int]:
    checkpoints = run / "checkpoints"
    return {int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()} if checkpoints.exists() else set()


def assert_same_run(directory, one: str, other: str) -> None:
    """Equal parameters, optimiser state and EMA, to the bit, and equal metrics except wall-clock fields.

    This also covers the data order: another order of records would give other parameters.
    """
    abstract = build(resolve(get_config())).abstract_state
    states, lines = [], []
    for run in (directory / one, directory / other):
        with Checkpoints(epath.Path(run / "checkpoints")) as checkpoints:
            assert checkpoints.latest_step() == UPDATES
            states.append(checkpoints.restore(UPDATES, abstract)[0])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if k not in WALL_CLOCK_FIELDS} for line in records])
    chex.assert_trees_all_equal(*states)
    assert lines[0] == lines[1] and len(lines[0]) == UPDATES // 4


def test_killed_at_random_moments(experiment):
    seed = random.randrange(10**6)
    print(f"seed of the kill moments: {seed}")
    rng, run, killed = random.Random(seed), experiment / "killed", 0
    for kill in range(KILLS):
        process, before = start(experiment, "killed"), steps_saved(run)
        # The first kill may come before any checkpoint; the others come after some progress.
        moment = (lambda before=before: steps_saved(run) - before) if kill else (run / "config.json").exists
        if wait_until(process, moment):
            time.sleep(rng.uniform(0.0, 0.2))
            process.kill()
        _, err = process.communicate(timeout=300)  # returns once no surviving worker holds the job's pipes
        assert process.returncode in (-signal.SIGKILL, 0), err[-2000:]
        if process.returncode == 0:  # the run is complete, with nothing left to kill
            break
        killed += 1
    assert killed >= 2, f"only {killed} kills hit a running job"
    finished(start(experiment, "killed"))
    assert_same_run(experiment, "whole", "killed")


def test_asked_to_stop_while_training(experiment):
    process = start(experiment, "stopped")
    assert wait_until(process, lambda: steps_saved(experiment / "stopped")), process.communicate()[1][-2000:]
    process.send_signal(signal.SIGTERM)
    _, err = finished(process, code=75)
    assert "start the same command again" in err.splitlines()[-1]
    with open(experiment / "stopped" / "metrics.jsonl", "a") as file:
        file.write('{"step": 59, "lo')  # a line torn by a crash
    (experiment / "stopped" / "checkpoints" / "59.orbax-checkpoint-tmp-1").mkdir()  # and an interrupted save
    finished(start(experiment, "stopped"))
    assert_same_run(experiment, "whole", "stopped")


def test_asked_to_stop_while_evaluating(experiment):
    flags = ("--mode=evaluate", "--config.evaluate.num_samples=200000", "--config.sample.batch_size=8")
    process = start(experiment, "whole", *flags)
    while "drawing" not in (line := process.stderr.readline()):
        assert line, "the job ended before it drew anything"
    process.send_signal(signal.SIGTERM)
    _, err = finished(process, code=75)
    assert "start the same command again" in err.splitlines()[-1]
    finished(start(experiment, "whole", "--mode=evaluate"))
