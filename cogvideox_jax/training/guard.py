"""Keeps a bad step from changing the weights. It decides on the devices, so that no host waits.

A step is bad if one of its metrics is not finite, or if a watched one is a spike: far above the
upper quartile of the last good steps. The quartile of a window is not moved by a few wrong numbers
in it, and the few steps of a run's beginning suffice for it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from cogvideox_jax.types import Params

RECENT = 64  # Good steps that the scale of a metric is measured on.
QUARTILE = 0.75
# Until so many good steps are known, a spike must exceed the square of the multiple, because a
# scale of few steps is inexact.
EARLY = 8
IN_A_ROW = "skipped_in_a_row"  # A metric: how many steps were skipped up to this one; 0: it counts.
SKIPPED = "skipped_steps"  # A metric: how many steps of the run were skipped.


class GuardState(NamedTuple):
  """What the guard remembers. It is saved, so that a resumed run decides as one never stopped."""

  recent: Float32[Array, "watched recent"]  # Good steps' values, the newest last; inf: none yet.
  skipped: Int32[Array, ""]  # Steps skipped in the whole run,
  in_a_row: Int32[Array, ""]  # and since the last good one.


class Guard(NamedTuple):
  """What the guard of a training watches."""

  # Metric -> what counts as its scale even if the recent values are smaller. Of a norm of the
  # gradient it is the norm that gradients are clipped to, since smaller ones do no harm.
  watched: dict[str, float]
  spike: float  # How many times its scale a watched metric may be; 0: any number.
  acts: bool = True  # Whether bad steps are skipped; otherwise the state only stays as it is.

  def begin(self) -> GuardState:
    """Returns the state before the first step."""
    return begin(len(self.watched))

  def is_good(self, state: GuardState, metrics: Params) -> Bool[Array, ""]:
    """Returns whether a step with these metrics may change the weights."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in metrics.values()]).all()
    if not self.spike:
      return finite
    scale, known = _upper_quartile(state.recent)
    floors = jnp.array([*self.watched.values()], jnp.float32)
    multiple = jnp.where(known < EARLY, self.spike**2, self.spike)
    return finite & (self._values(metrics) <= multiple * jnp.maximum(scale, floors)).all()

  def after(self, state: GuardState, metrics: Params, good: Bool[Array, ""]) -> GuardState:
    """Returns the guard's state after a step."""
    values = self._values(metrics)[:, None]
    # A metric that this step does not have keeps its values.
    moves = good & (values != -jnp.inf)
    shifted = jnp.concatenate([state.recent[:, 1:], values], axis=1)
    return GuardState(
      jnp.where(moves, shifted, state.recent),
      state.skipped + jnp.where(good, 0, 1),
      jnp.where(good, 0, state.in_a_row + 1),
    )

  def _values(self, metrics: Params) -> Float32[Array, " watched"]:
    """Returns the watched metrics; -inf for those that this step does not have."""
    return jnp.stack(
      [jnp.asarray(metrics.get(name, -jnp.inf), jnp.float32) for name in self.watched]
    )


def begin(watched: int) -> GuardState:
  """Returns the state of a guard before the first step that it sees."""
  recent = jnp.full((watched, RECENT), jnp.inf, jnp.float32)
  return GuardState(recent, jnp.int32(0), jnp.int32(0))


def _upper_quartile(
  recent: Float32[Array, "watched recent"],
) -> tuple[Float32[Array, " watched"], Int32[Array, " watched"]]:
  """Returns the upper quartile of each row's finite numbers, and how many these are.

  Without finite numbers it is inf. It counts instead of sorting, which is a few vector operations.
  """
  known = jnp.isfinite(recent).sum(axis=1)
  ranks = (recent[:, None, :] <= recent[:, :, None]).sum(axis=2)
  enough = ranks >= QUARTILE * known[:, None]
  return jnp.where(enough, recent, jnp.inf).min(axis=1), known
