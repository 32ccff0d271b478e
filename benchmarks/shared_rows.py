"""How devices that share a row exchange it for attention if they do not divide the heads.

python benchmarks/shared_rows.py --json

Compiles forward and backward passes of 2B's 30 heads over a row of 75,776 tokens on 4, 8 and 16
TPUs; no TPU is needed. Two ways: heads padded to a multiple of the devices and exchanged for
tokens, as in training; and keys and values gathered on all devices. A sum that reads the same
arrays replaces the attention kernel, because the compiler does not report the kernel's cycles.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measure
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cogvideox_jax import sharding
from cogvideox_jax.aot.report import compile_lowered
from cogvideox_jax.aot.topology import open_topology
from cogvideox_jax.sharded_attention import shard_attention

TOKENS, HEADS, HEAD_DIM = 75_776, 30, 64
TOPOLOGIES = ("v5e:2x2", "v5e:2x4", "v5e:4x4")
SPLIT = PartitionSpec(None, "context")


def stand_in(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Reads what attention reads. As in attention, each gradient needs the other two arrays."""
  del segment_ids
  return q * (k * v).sum(1, keepdims=True)


def filled_up(mesh: Mesh) -> Callable[..., jax.Array]:
  return shard_attention(stand_in, mesh, sharding.rules_named("fsdp"))


def gathered(mesh: Mesh) -> Callable[..., jax.Array]:
  def attend(q, k, v, segment_ids):
    k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
    return stand_in(q, k, v, segment_ids)

  specs = (SPLIT, SPLIT, SPLIT, PartitionSpec())
  return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)


def compile_for(topology: str, exchange: Callable[[Mesh], Callable[..., jax.Array]]) -> Any:
  mesh = sharding.mesh_of_rows(1, open_topology(topology).devices)
  x = jax.ShapeDtypeStruct(
    (1, TOKENS, HEADS, HEAD_DIM), jnp.bfloat16, sharding=NamedSharding(mesh, SPLIT)
  )
  ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32, sharding=sharding.replicated(mesh))
  attend = exchange(mesh)

  def both_ways(q, k, v, ids, g):
    return jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)[1](g)

  memory, costs = compile_lowered(jax.jit(both_ways).lower(x, x, x, ids, x))
  return {
    "cycles": costs.cycles,
    "moved": sum(traffic.bytes for traffic in costs.collectives.values()),
    "temporaries": memory.temporaries,
  }


def main() -> None:
  args = measure.arguments(__doc__).parse_args()
  result: dict[str, Any] = measure.device("jax", "libtpu")
  for topology in TOPOLOGIES:
    for exchange in (filled_up, gathered):
      result[f"{topology} {exchange.__name__}"] = compile_for(topology, exchange)
  measure.report(result, args.json)


if __name__ == "__main__":
  main()
