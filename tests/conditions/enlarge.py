"""Trains, samples and analyses a model of `LowResolution`: python -m tests.conditions.enlarge

Run in a copy of the package that has this kind of condition; see test_contract.py. Writes to ./run.
"""

from pathlib import Path

import numpy as np
from etils import epath

import trm_diffusion
from tests.jobs.tiny import tiny_config
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.analyze import analyze
from trm_diffusion.jobs.export_images import export
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime.signals import StopRequest


def main() -> None:
    assert Path(trm_diffusion.__file__).is_relative_to(Path.cwd())
    config = tiny_config(name="enlarge", data__flip=True, train__updates=2, sample__guidance=3.0)
    workdir, stop = epath.Path("run"), StopRequest()
    assert build(config).model.shapes["patch_embed/kernel"].shape[0] == 4 * 4 * 2
    train(config, workdir, stop)
    sample(config, workdir, stop)
    analyze(config, workdir, stop)
    drawn = np.load("run/samples/grid_0000002.npz")
    assert drawn["images"].shape == (10, 8, 8, 1) and drawn["small"].shape == (10, 8, 8, 1)
    assert np.isfinite(drawn["images"]).all()
    try:
        export(config, workdir, stop, 4)
    except UserError as error:
        assert "--num draws labels; this model draws small images" in str(error)
    else:
        raise AssertionError("labels were drawn")


if __name__ == "__main__":
    main()
