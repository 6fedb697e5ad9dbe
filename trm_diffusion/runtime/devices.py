"""Which device a job runs on, and where its compiled programs are kept."""

import jax
from etils import epath
from jax.sharding import Mesh

from trm_diffusion.errors import UserError

LEAST_COMPILE_SECONDS = 0.5  # what compiles in less is as quickly compiled as read, from a bucket above all
V5P = ("TPU v5", "TPU v5p")  # its names as a device kind


def require_platform(platform: str) -> None:
    """Restricts JAX to cpu, cuda or tpu; "" allows any. Raises UserError where there is no such device."""
    if not platform:
        return
    jax.config.update("jax_platforms", platform)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX has no plugin for the platform at all
        reason = (str(error).splitlines() or ["JAX has no plugin for it"])[0]
        raise UserError(f"--platform={platform}: no such device here ({reason}); see --mode=doctor") from None


def use_compilation_cache(choice: str, workdir: epath.Path) -> None:
    """Keeps compiled programs on disk, so that a resumed job and its neighbours start at once.

    choice: a directory, or "none" for no cache; "" is what the environment says (JAX_COMPILATION_CACHE_DIR), or else
    .compilation_cache beside the workdir, which the runs there share.
    """
    if choice == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    directory = choice or jax.config.jax_compilation_cache_dir or workdir.parent / ".compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_SECONDS)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the programs of a mesh are compiled with, beyond the compiler's defaults.

    On v5p an operation may use 32 MiB of vector memory, not 16: by the compiler's schedule of a DiT-XL/2 step of two
    blocks that is 6% faster, most of it in one product of the MLP's backward pass. With 64 MiB nothing is left to fetch
    operands ahead of their use, and the schedule is as slow as with 16.

    On TPUs that share the parameters out (fsdp), these are gathered before the products that need them. The compiler
    may otherwise pass the shards around in a loop, with one small product for each (a windowed einsum): with 32 shards
    of DiT-XL/2's width these contract 36 features, and the matrix unit idles. By the compiler's own cycles, for 8
    images on each of 32 v5p chips, four MLPs forward and backward take 17.9 ms that way, and 3.4 ms gathered.
    """
    device, options = mesh.devices.flat[0], {}
    if device.device_kind in V5P:
        options["xla_tpu_scoped_vmem_limit_kib"] = "32768"
    if device.platform == "tpu" and mesh.shape["fsdp"] > 1:
        options["xla_jf_spmd_threshold_for_windowed_einsum_mib"] = "1000000"  # never: no operand is so large
    return options
