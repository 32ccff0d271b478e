"""Runs attention on a mesh whose devices split the tokens or the heads of a row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from cogvideox_jax.errors import UserError
from cogvideox_jax.sharding import Rules, check_tokens, describe_sizes, shard_count


def shard_attention(attention: Callable[..., Any], mesh: Mesh, rules: Rules) -> Callable[..., Any]:
  """Returns an attention that each device computes for its own rows and heads, over whole rows.

  Devices that split the tokens of a row swap them for heads before attention, and swap back after
  it (Ulysses, arXiv:2309.14509). Heads that do not divide are filled up with zeros: 2B's 30 become
  32, which costs less than to gather all keys and values (benchmarks/attention.md).

  Args:
    attention: (q, k, v, segment_ids) -> values, as models/attention.py.

  The function that is returned raises:
    UserError: the tokens, or the heads that `tensor` splits, do not divide over the mesh.
  """
  token_axes = rules["tokens"]
  shards = shard_count(mesh, token_axes)

  def swap_tokens_for_heads(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % shards), (0, 0)))
    return jax.lax.all_to_all(x, token_axes, split_axis=2, concat_axis=1, tiled=True)

  def attend_whole(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    q_whole, k_whole, v_whole = map(swap_tokens_for_heads, (q, k, v))
    out = attention(q_whole, k_whole, v_whole, segment_ids)
    out = jax.lax.all_to_all(out, token_axes, split_axis=1, concat_axis=2, tiled=True)
    return out[:, :, : q.shape[2]]

  split = PartitionSpec(rules["rows"], token_axes, rules.get("heads"))
  sharded = jax.shard_map(
    attend_whole if shards > 1 else attention,
    mesh=mesh,
    in_specs=(split, split, split, PartitionSpec(rules["rows"])),
    out_specs=split,
    check_vma=False,  # The kernel's outputs do not say over which axes they vary.
  )

  def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    check_tokens(q.shape[1], mesh, rules)
    _check_heads(q.shape[2], mesh, rules)
    return sharded(q, k, v, segment_ids)

  return attend


def _check_heads(heads: int, mesh: Mesh, rules: Rules) -> None:
  """Raises a UserError if a device would get a fraction of a head.

  The sharding of the weights does not find this, because their columns may divide nevertheless.
  """
  axes = rules.get("heads", ())
  if heads % shard_count(mesh, axes):
    raise UserError(
      f"{heads} heads do not divide over {' x '.join(axes)} of the mesh "
      f"({describe_sizes(mesh.shape)}).\n"
      f"Change the mesh along {', '.join(axes)}, or config.sharding."
    )
