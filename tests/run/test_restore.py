"""A run goes on from an older checkpoint only when asked, once, and with nothing lost; then it equals one that was not
interrupted."""

import shutil

import chex
import pytest
from etils import epath

from tests.commands import ROOT, ran
from tests.jobs.tiny import tiny_config
from trm_diffusion.config import to_dict
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.train import train
from trm_diffusion.run.restore import load_run
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.signals import StopRequest


def config_of(**overrides):
    return tiny_config(optim__schedule="constant", checkpoint__every=2, log__every=1, **overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six updates with checkpoints 4 and 6."""
    workdir = epath.Path(tmp_path_factory.mktemp("restore") / "whole")
    train(config_of(train__updates=6), workdir, StopRequest())
    return workdir


@pytest.fixture
def damaged(whole, tmp_path):
    """The same run with a bit of its newest checkpoint flipped."""
    workdir = epath.Path(shutil.copytree(whole, tmp_path / "damaged"))
    (arrays,) = (workdir / "checkpoints/6/state/ocdbt.process_0/d").iterdir()
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 16
    arrays.write_bytes(data)
    return workdir


def steps_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def state_of(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(checkpoints.latest_step(), build(config_of()).abstract_state)[0]


def test_an_older_checkpoint_is_used_only_when_asked(damaged, whole):
    again = config_of(train__updates=6, init__step=4)
    for _ in range(2):
        with pytest.raises(UserError, match="checkpoint 6 is damaged: state/.*newest sound checkpoint is 4"):
            train(config_of(train__updates=6), damaged, StopRequest())
        assert steps_in(damaged / "checkpoints") == ["4", "6"]
    train(again, damaged, StopRequest())
    chex.assert_trees_all_equal(state_of(damaged), state_of(whole))
    assert steps_in(damaged / "checkpoints") == ["4", "6"]
    assert steps_in(damaged / "checkpoints_set_aside") == ["6"]
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (damaged, whole)]
    assert [line.split(",")[0] for line in lines[0]] == [line.split(",")[0] for line in lines[1]]


def test_the_same_command_again_does_not_go_back_again(whole, tmp_path, capsys):
    run = epath.Path(shutil.copytree(whole, tmp_path / "run"))
    back = config_of(train__updates=8, init__step=4)
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Exception, match="stopped at update 5 of 8"):  # the scheduler's signal
        train(back, run, stop)
    assert steps_in(run / "checkpoints") == ["4", "5"] and steps_in(run / "checkpoints_set_aside") == ["6"]
    with pytest.raises(Exception, match="stopped at update 6 of 8"):  # the scheduler starts it again
        train(back, run, stop)
    with pytest.raises(UserError, match="config.init.step is 4, but .* has the checkpoints 5, 6; give one of them"):
        train(config_of(train__updates=8, init__step=4, optim__lr=1e-3), run, stop)
    with pytest.raises(Exception, match="stopped at update 6 of 8"):  # another command goes back again
        train(config_of(train__updates=8, init__step=5, optim__lr=1e-3), run, stop)
    assert steps_in(run / "checkpoints") == ["5", "6"] and steps_in(run / "checkpoints_set_aside") == ["6", "6_"]
    assert f"{run}/checkpoints_set_aside/6_" in capsys.readouterr().err


def test_an_older_checkpoint_is_sampled_without_moving_any(whole):
    _, state = load_run(config_of(train__updates=6, init__step=4), whole)
    assert int(state.step) == 4
    _, state = load_run(config_of(train__updates=6), whole)
    assert int(state.step) == 6 and steps_in(whole / "checkpoints") == ["4", "6"]


def test_a_step_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.init.step is 4, but .* holds no checkpoint"):
        train(config_of(init__step=4), epath.Path(tmp_path / "run"), StopRequest())
    assert not (tmp_path / "run/config.json").exists()


def test_damage_is_one_line_of_every_command(damaged, tmp_path):
    settings = to_dict(config_of(train__updates=6))
    (tmp_path / "tiny.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({settings!r})\n"
    )
    common = f"--config={tmp_path}/tiny.py --workdir={damaged}"
    modes = ("train", "sample", "evaluate --config.evaluate.kind=digits", "analyze")
    commands = [f"python -m trm_diffusion.main {common} --mode={mode}" for mode in modes]
    commands.append(f"python -m trm_diffusion.main --mode=convert --from={damaged} --to={tmp_path}/weights")
    for code, text in ran(commands, ROOT):
        lines = [line for line in text.splitlines() if not line.startswith("devices touched")]
        assert code == 2 and "Traceback" not in text, text
        assert lines[-1].startswith("error: checkpoint 6 is damaged: state/ocdbt.process_0/d/"), text
        assert len(lines) == 1, text
