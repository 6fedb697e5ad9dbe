"""Weights of the FID Inception network: as pytorch-fid and torch-fidelity publish them, or converted."""

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_file
from trm_diffusion.models.inception import BATCH_NORM, Weights, fold_batch_norms, layer_shapes, state_shapes
from trm_diffusion.readers.records import read_json
from trm_diffusion.weights.forms import CONV, SAME, Rule, affine
from trm_diffusion.weights.layout import Layout
from trm_diffusion.weights.source import open_source

PUBLISHED = "pt_inception-2015-12-05-6726825d"


def load_inception(path: str) -> tuple[Weights, str]:
    """Weights for `inception_features` from a .safetensors or .pth file or a converted directory, and their sha256.

    The sha256 is that of the published file, also for a converted directory.

    Raises:
      UserError: the file does not exist or has another format, or tensors are missing or have other shapes.
    """
    source = open_source(path)
    state = source.tensors
    digest = sha256_of_file(source.files[0])
    manifest = source.files[0].parent / "manifest.json"
    if rules()[0].ours in state and manifest.exists():
        state = {
            name: tensor
            for rule in rules()
            if rule.ours in state
            for name, tensor in zip(rule.theirs, rule.form.theirs(state[rule.ours]), strict=True)
        }
        record = read_json(manifest, {"files": [{"sha256": str}], "sha256?": str})
        if record.get("sha256", digest) != digest:
            raise UserError(f"--inception={path}: {source.files[0]} is damaged; convert the weights again")
        digest = record["files"][0]["sha256"]
    expected = state_shapes()
    wrong = [name for name, shape in expected.items() if name not in state or state[name].shape != shape]
    if wrong:
        name = wrong[0]
        found = f"has {state[name].shape}" if name in state else "is missing"
        raise UserError(
            f"--inception={path} is not the FID Inception network: {name} {found}, expected {expected[name]} "
            f"({len(wrong)} tensors differ); use {PUBLISHED}.pth of pytorch-fid, or the same weights as .safetensors"
        )
    return fold_batch_norms(state), digest


def rules() -> list[Rule]:
    """Batch norms are not folded into their convolutions, so that the published tensors can be exported again."""
    found = [*affine("fc", "fc")]
    for layer in layer_shapes():
        path = layer.replace(".", "/")
        found.append(Rule(f"{path}/conv/kernel", (f"{layer}.conv.weight",), CONV))
        ours = ("scale", "bias", "mean", "variance")
        found += [Rule(f"{path}/norm/{a}", (f"{layer}.bn.{b}",), SAME) for a, b in zip(ours, BATCH_NORM, strict=True)]
    return found


def _our_shapes(model: dict) -> dict[str, tuple[int, ...]]:
    del model  # there is only one
    shapes = state_shapes()
    return {rule.ours: rule.form.ours(np.broadcast_to(np.int8(0), shapes[rule.theirs[0]])).shape for rule in rules()}


INCEPTION = Layout(
    name="fid-inception",
    kind="inception",
    signature=("Conv2d_1a_3x3.bn.running_mean", "Mixed_7c.branch_pool.conv.weight", "fc.bias"),
    infer=lambda shapes, config: {},
    shapes=_our_shapes,
    rules=lambda model: rules(),
    unused=(".num_batches_tracked",),
)
