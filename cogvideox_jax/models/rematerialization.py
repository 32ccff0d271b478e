"""What a block's backward pass finds saved of its forward pass; it computes the rest again.

The layers name their results with `jax.ad_checkpoint.checkpoint_name`, and each entry of REMAT
saves some of the names. `config.remat` is a key of REMAT.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

# The names: a block's input, the outputs of attention with their logsumexp, the mean and inverse
# standard deviation of layer norms, the outputs of all linear layers, and those of the MLP's last.
BLOCK_INPUT, ATTENTION, STATISTICS = "block", "attention", "statistics"
LINEAR, MLP_OUT = "linear", "mlp_out"

Run = Callable[..., Any]


class Rematerialization(NamedTuple):
  """A policy, and how much of the forward pass it repeats in a training step."""

  wrap: Callable[[Run], Run]  # Applies the policy to the function that runs a block.
  linear: float  # Share of the FLOPs of a block's linear layers that are computed again.
  attention: int  # How often attention's forward pass runs again.


def _save(*names: str) -> Callable[[Run], Run]:
  return _with_policy(jax.checkpoint_policies.save_only_these_names(*names))


def _with_policy(policy: Callable[..., Any] | None) -> Callable[[Run], Run]:
  # Blocks run in scans, and XLA shares nothing between the forward scan and the backward one, so
  # nothing need prevent CSE.
  return partial(jax.checkpoint, prevent_cse=False, policy=policy)


REMAT: dict[str, Rematerialization] = {
  "none": Rematerialization(lambda run: run, linear=0, attention=0),
  "full": Rematerialization(_with_policy(None), linear=1, attention=1),
  # Attention's kernel runs once.
  "attention": Rematerialization(_save(ATTENTION, STATISTICS), linear=1, attention=0),
  # With the block's input it keeps 3 arrays of tokens x width for each layer.
  "branches": Rematerialization(_save(ATTENTION, STATISTICS, MLP_OUT), linear=2 / 3, attention=0),
  # It keeps 11 such arrays.
  "linear": Rematerialization(_save(ATTENTION, STATISTICS, LINEAR), linear=0, attention=0),
  # As `attention`, but the saved arrays, with each block's input, wait in the host's memory.
  "offload": Rematerialization(
    _with_policy(
      jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[STATISTICS],
        names_which_can_be_offloaded=[BLOCK_INPUT, ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
      )
    ),
    linear=1,
    attention=0,
  ),
}
