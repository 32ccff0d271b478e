"""What XLA is told of a program beside its defaults, by kind of device: found by compiling for it.

benchmarks/README.md has what each option changes, by the compiler's own estimate.
"""

from typing import Any

# By default a product with weights that are split over devices becomes a loop that sends pieces of
# them round, and adds up products of pieces in bfloat16: less exact, and up to twice as long.
_WHOLE_PRODUCTS = {
  "xla_tpu_enable_windowed_einsum_for_all_gather": False,
  "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}
# KiB of vector memory that one fused operation may take, by `device_kind`: by default 16 MiB, in
# which the tiles of large products are small. The more, the longer the compiler takes: for 2B's
# sampling step on a v5e 15 s of a core with 16 MiB, 40 s with 48, and 79 s with 96 for no gain.
_VECTOR_MEMORY = {
  "TPU v5 lite": 49_152,
  "TPU v5": 49_152,
  "TPU v6 lite": 98_304,
  "TPU7x": 65_536,
}


def compiler_options(device: Any) -> dict[str, bool | int]:
  """For `jax.jit` of the steps of training and sampling.

  device: a `jax.Device`, or one of a topology that is compiled for without it.
  """
  if device.platform != "tpu":
    return {}
  options: dict[str, bool | int] = dict(_WHOLE_PRODUCTS)
  if device.device_kind in _VECTOR_MEMORY:
    options["xla_tpu_scoped_vmem_limit_kib"] = _VECTOR_MEMORY[device.device_kind]
  return options
