"""PyTorch files: weights come out exactly of every unambiguous form; others are one line, and run no code."""

import argparse
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from trm_diffusion.errors import UserError
from trm_diffusion.weights.source import open_source

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    "steps": torch.tensor(3),
    "half": torch.ones(2, dtype=torch.float16),
}


def read(path, content, **options):
    torch.save(content, path, **options)
    return open_source(str(path)).tensors


def check(tensors):
    assert tensors.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy())


@pytest.mark.parametrize("zipped", [True, False])  # False: the format before PyTorch 1.6
@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS},
        {"module.": WEIGHTS},
        {"_orig_mod.module.": WEIGHTS},
        {
            "model": {name: -tensor for name, tensor in WEIGHTS.items()},
            "ema": WEIGHTS,
            "opt": {
                "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}},
                "param_groups": [{"lr": 1e-4}],
            },
            "args": argparse.Namespace(model="DiT-XL/2", data_path="/data", image_size=256),
        },
        {"ema": {"model": {name: torch.nn.Parameter(tensor, False) for name, tensor in WEIGHTS.items()}}, "epoch": 3},
    ],
)
def test_unambiguous_forms_are_read(tmp_path, content, zipped):
    prefix = next(iter(content))
    if prefix.endswith("."):
        content = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    check(read(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped))


def test_dtypes_that_numpy_lacks_are_kept_exactly(tmp_path):
    values = torch.tensor([0.5, -1.5, 3.0])
    kinds = {
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
    }
    tensors = read(tmp_path / "x.pt", {name: values.to(getattr(torch, name)) for name in kinds})
    for name, dtype in kinds.items():
        assert tensors[name].dtype == dtype
        np.testing.assert_array_equal(tensors[name].astype(np.float32), values.numpy())


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(2)], "holds a list, not a dict of tensors by name"),
        (torch.ones(2), "holds a Tensor, not a dict"),
        ({"epoch": 3}, "holds no dict of tensors by name; its keys are epoch"),
        ({"ema": {}, "opt": {}}, "holds no dict of tensors by name; its keys are none"),
        ({}, "its keys are none"),
        ({3: torch.ones(2)}, "its keys are 3"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a is sparse_coo float32 on cpu"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor a is strided complex64"),
        (
            {"a": torch.ones(2, dtype=torch.float8_e5m2fnuz)},
            "tensor a is strided float8_e5m2fnuz|holds more than weights",
        ),
        ({"a": torch.ones(2, device="meta")}, "tensor a is strided float32 on meta"),
        ({"a": torch.nn.Linear(2, 2)}, "holds more than weights .*; where you trust the file, load it"),
    ],
)
def test_everything_else_is_one_line(tmp_path, content, says, zipped):
    with pytest.raises(UserError, match=f"x.pt.* ({says})") as caught:
        read(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["top", "args"])
def test_no_code_is_run(tmp_path, zipped, where):
    harm = Harmful(str(tmp_path / "harm"))
    content = {"ema": WEIGHTS, "args": argparse.Namespace(a=harm)} if where == "args" else {"a": harm}
    with pytest.raises(UserError, match="holds more than weights"):
        read(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_or_changed_file_is_one_line(tmp_path, zipped):
    torch.save(WEIGHTS, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "x.pt").read_bytes()
    for size in (0, 3, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "x.pt").write_bytes(data[:size])
        with pytest.raises(UserError, match="x.pt is truncated, or holds more than weights"):
            open_source(str(tmp_path / "x.pt"))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/nothing", "")
    with pytest.raises(UserError, match="x.pt is truncated"):
        open_source(str(tmp_path / "x.pt"))
