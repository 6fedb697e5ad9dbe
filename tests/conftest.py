"""Tests run on the CPU, compile as fast as possible (they check values, not speed), and refuse rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # the older emitters, which need no MLIR for each fusion
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()

import jax  # noqa: E402  after the flags it reads

jax.config.update("jax_numpy_rank_promotion", "raise")
