"""How the devices share one denoising step."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from jax.sharding import Mesh, NamedSharding

from cogvideox_jax import sharding
from cogvideox_jax.models.backends import attention_for, filled
from cogvideox_jax.models.layers import Attention
from cogvideox_jax.sharded_attention import shard_attention


class StepSharding(NamedTuple):
  """Devices share the rows first, then the tokens of a row.

  The step's arguments and results are replicated: each device has all of them.
  """

  attention: Attention
  rows: Callable[[Any], Any]  # Shardings of packed rows; see `sharding.batch_shardings`.
  row_tokens: Callable[[int], int]  # The length to pad a row of so many tokens to.
  replicated: NamedSharding


def shard_step(rows: int, devices: Sequence[Any]) -> StepSharding:
  """Shares so many packed rows among devices.

  Returns the same object for the same arguments, so that each program is compiled once.
  """
  return _shard_step(rows, tuple(devices))


@cache
def _shard_step(rows: int, devices: tuple[Any, ...]) -> StepSharding:
  mesh, rules = sharding.mesh_of_rows(rows, devices), sharding.rules_named("fsdp")
  attend = attention_for(devices[0])
  return StepSharding(
    attend if len(devices) == 1 else shard_attention(attend, mesh, rules),
    partial(sharding.batch_shardings, mesh=mesh, rules=rules),
    partial(_row_tokens, mesh=mesh, rules=rules),
    sharding.replicated(mesh),
  )


def _row_tokens(tokens: int, mesh: Mesh, rules: sharding.Rules) -> int:
  """The least length from `tokens` on that both the mesh and the blocks of attention divide."""
  longer = filled(sharding.padded_tokens(tokens, mesh, rules), mesh.devices.flat[0])
  return tokens if longer == tokens else _row_tokens(longer, mesh, rules)
