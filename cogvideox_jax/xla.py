"""Compiler options for each kind of device.

Those of TPUs were found by compiling; benchmarks/compile.md shows what each option changes, by the
compiler's own estimate.
"""

from typing import Any

# By default XLA turns a product with sharded weights into a loop that sends the shards round and
# adds up their products in bfloat16, which is less exact and takes up to twice as long.
_WHOLE_PRODUCTS = {
  "xla_tpu_enable_windowed_einsum_for_all_gather": False,
  "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}
# KiB of vector memory that one fused operation may take, by `device_kind`. The default of 16 MiB
# leaves only small tiles for large products. More memory makes the compiler slower: 2B's sampling
# step for a v5e takes it 15 s of a core with 16 MiB, 40 s with 48, and 79 s with 96, for no gain.
_VECTOR_MEMORY = {
  "TPU v5 lite": 49_152,
  "TPU v5": 49_152,
  "TPU v6 lite": 98_304,
  "TPU7x": 65_536,
}


def options_to_draw(device: Any) -> dict[str, int]:
  """The compiler options of a program that draws a network's weights, which runs once.

  On a CPU it is compiled with little optimization: the tiny VAE's in 11 s of a core instead of 47,
  to the same bits (measured; without any optimization some bits differ).
  """
  return {"xla_backend_optimization_level": 1} if device.platform == "cpu" else {}


def compiler_options(device: Any) -> dict[str, bool | int]:
  """The compiler options of the steps of training and sampling, for `jax.jit`.

  device: a `jax.Device`, or one of a topology for ahead-of-time compilation.
  """
  if device.platform != "tpu":
    return {}
  options: dict[str, bool | int] = dict(_WHOLE_PRODUCTS)
  if device.device_kind in _VECTOR_MEMORY:
    options["xla_tpu_scoped_vmem_limit_kib"] = _VECTOR_MEMORY[device.device_kind]
  return options
