"""Gates and experts as an adapter, stored without the base model that they were trained on; and merging them into it.

Experts can be merged into the base weights only if their update is a linear map of the base projection's input, the
same for every token: W x~ + B A x~ = (W + B A) x~. That holds in one case: one latent step, one expert, and h = x~
(`normalization` and `modulation` off), which is a plain LoRA. The paper's mechanism has h = Mod(LN(x~)), and attention
between latent steps, so it cannot be merged. Experts whose B is still zero can be dropped.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_arrays
from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.weights.convert import Weights

# Fields that affect only training, how something is computed, or when tokens stop. All others determine what gates and
# experts compute, and must be those that an adapter was trained with.
FREE = {
    "capacity_factor", "routing_group", "switch_loss_weight", "z_loss_weight", "balance_bias_rate",
    "truncated_latent_steps", "dispatch", "remat", "scan_latent_steps",
    "init_down", "init_up", "halting_epsilon", "halting_patience", "halting_prior", "halting_weight",
}  # fmt: skip
FUNCTION = tuple(field.name for field in dataclasses.fields(RecursionConfig) if field.name not in FREE)
MERGEABLE = {
    "latent_steps": 1, "experts": 1, "normalization": False, "modulation": False, "residual": "before_norm",
    "base_input": "modulated", "step_embedding": False, "looped": False, "alpha": None,
}  # fmt: skip


def is_adapter(name: str) -> bool:
    """Whether this parameter belongs to a gate or to experts."""
    return "/recursion/" in name


def adapter_of(weights: Weights, where: str) -> Weights:
    """Only the gates and experts, with a hash of the base model. Raises UserError if there are none."""
    specs = {name: spec for name, spec in weights.specs.items() if is_adapter(name)}
    if not specs:
        raise UserError(f"{where} has no gates and experts to export (config.model.recursion.blocks none)")
    record = weights.record | {"base_sha256": base_sha256(dict(weights.tensors()))}
    return dataclasses.replace(weights, kind="adapter", specs=specs, record=record)


def check_adapter(adapter: Weights, model: dict, where: str) -> None:
    """Raises UserError if an adapter was trained with a recursion that differs from that of `model`."""
    if adapter.kind != "adapter":
        raise UserError(f"config.init.adapter {where} holds a {adapter.kind}, not gates and experts")
    theirs, ours = recursion_of(adapter), model.get("recursion", {"blocks": "none"})
    for name in FUNCTION:
        if theirs[name] != ours.get(name):
            field = f"config.model.recursion.{name}"
            raise UserError(f"config.init.adapter {where} has {field} {theirs[name]!r}, not {ours.get(name)!r}")


def recursion_of(weights: Weights) -> dict | None:
    """The fields of `RecursionConfig` in a manifest; those newer than the manifest have their default."""
    recorded = weights.model.get("recursion")
    return None if recorded is None else dataclasses.asdict(RecursionConfig()) | recorded


def base_sha256(layers: Mapping[str, np.ndarray]) -> str:
    """A hash of every parameter except gates and experts: names, dtypes, shapes and bytes."""
    base = ((name, np.ascontiguousarray(layers[name])) for name in sorted(layers) if not is_adapter(name))
    return sha256_of_arrays((f"{name} {value.dtype} {value.shape}", value) for name, value in base)


def merged(weights: Weights, where: str) -> Weights:
    """A base model that computes the same without adapter, up to rounding. Raises UserError if there is none."""
    recursion = recursion_of(weights)
    if recursion is None:
        raise UserError(f"{where} has no gates and experts to merge")
    ups = [name for name in weights.specs if name.endswith("/recursion/pool/experts/up")]
    without_experts = recursion["base_input"] == "modulated" and not recursion["looped"]  # it is the base
    untrained = without_experts and not any(weights.read(name).any() for name in ups)
    unlike = [f"{name} {recursion[name]!r}" for name, value in MERGEABLE.items() if recursion[name] != value]
    if unlike and not untrained:
        raise UserError(
            f"{where} cannot be merged exactly with {', '.join(unlike)}: only a plain LoRA can "
            f"({', '.join(f'{name} {value!r}' for name, value in MERGEABLE.items())}); use --to-layout=adapter"
        )
    updates = {}
    for name in () if untrained else ups:
        block, down = name.partition("/recursion/")[0], name.removesuffix("up") + "down"
        kernels = (f"{block}/{stream}attention/qkv/kernel" for stream in ("", "visual/"))
        updates[next(kernel for kernel in kernels if kernel in weights.specs)] = (down, name)

    def read(name: str) -> np.ndarray:
        kernel = weights.read(name)
        if name not in updates:
            return kernel
        # Leading axes of size one are the pool of the only latent step, and the only expert.
        down, up = (weights.read(part).astype(np.float64) for part in updates[name])
        down, up = (part.reshape(3, -1, part.shape[-1]) for part in (down, up))  # [3, r, D]
        update = np.einsum("prd,pre->dpe", down, up).reshape(kernel.shape)
        return (kernel.astype(np.float64) + update).astype(kernel.dtype)

    specs = {name: spec for name, spec in weights.specs.items() if not is_adapter(name)}
    model = {name: value for name, value in weights.model.items() if name != "recursion"}
    return dataclasses.replace(weights, model=model, specs=specs, read=read)
