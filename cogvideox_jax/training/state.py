"""Defines the state that a training step changes, and tells trained from frozen parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from cogvideox_jax import sharding
from cogvideox_jax.training.guard import IN_A_ROW, SKIPPED, Guard, GuardState
from cogvideox_jax.types import Params
from cogvideox_jax.xla import options_to_draw

# One optimizer for all parameters, or several, each by the name of the subtree that it moves.
Optimizer = optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
NOTHING: Params = {}


class TrainState(NamedTuple):
  """The state that each step is given, as donated buffers, and returns.

  A checkpoint holds everything except `frozen`.
  """

  step: Int[Array, ""]  # Steps taken; each is one update, unless the guard skipped it.
  params: Params  # The trained parameters, as fp32 masters.
  opt_state: Any  # The optimizer's state; if there are several, their states by name.
  ema: Params  # The moving average of `params`, or of a subtree, which is sampled from.
  frozen: Params = NOTHING  # Parameters that are only read: no gradient, moment or average.
  guard: GuardState | Params = NOTHING  # What tells bad steps; nothing if there is no guard.

  def saved(self) -> "TrainState":
    """Returns the state without its frozen parameters, which a checkpoint leaves out."""
    return self._replace(frozen=NOTHING)


def everything(params: Params) -> Params:
  """Returns all parameters: what is averaged unless a training says otherwise."""
  return params


class Updates(NamedTuple):
  """How the updates of a training move its parameters."""

  optimizer: Optimizer
  ema_decay: float  # The decay that the moving average reaches.
  averaged: Callable[[Params], Params] = everything  # Picks the parameters that are averaged.
  guard: Guard | None = None  # Tells which steps change nothing.

  def begin(self, params: Params, frozen: Params = NOTHING) -> TrainState:
    """Returns the state before the first update. The average starts at the weights.

    The average gets buffers of its own, because a step must not be given one buffer twice.
    """
    ema = jax.tree.map(jnp.copy, self.averaged(params))
    guard = self.guard.begin() if self.guard else NOTHING
    return TrainState(jnp.int32(0), params, self.moments(params), ema, frozen, guard)

  def moments(self, params: Params) -> Any:
    """Returns the state of the optimizer, or of each optimizer by name, before any update."""
    if isinstance(self.optimizer, Mapping):
      return {name: tx.init(params[name]) for name, tx in self.optimizer.items()}
    return self.optimizer.init(params)

  def apply(self, state: TrainState, grads: Params) -> TrainState:
    """Returns the state after one more update.

    Args:
      grads: the gradient of each parameter. If there are several optimizers, a subtree without
        gradients keeps its parameters and moments, so that a discriminator may start late.
    """
    if isinstance(self.optimizer, Mapping):
      params, opt_state = dict(state.params), dict(state.opt_state)
      for name, gradient in grads.items():
        params[name], opt_state[name] = _move(
          self.optimizer[name], gradient, opt_state[name], params[name]
        )
    else:
      params, opt_state = _move(self.optimizer, grads, state.opt_state, state.params)
    ema = average(state.ema, self.averaged(params), state.step, self.ema_decay)
    return TrainState(state.step + 1, params, opt_state, ema, state.frozen, state.guard)

  def apply_unless_bad(
    self, state: TrainState, grads: Params, metrics: Params
  ) -> tuple[TrainState, Params]:
    """Returns the state after a step, whose update is done unless the guard finds it bad.

    A step that is skipped changes the number of the step and what the guard remembers, but neither
    parameters nor moments nor their average, of any optimizer.

    Args:
      metrics: those of the step, by which the guard decides.

    Returns:
      The state, and the metrics with those of the guard.
    """
    if self.guard is None or not self.guard.acts:
      return self.apply(state, grads), metrics
    assert isinstance(state.guard, GuardState)
    good = self.guard.is_good(state.guard, metrics)
    # A branch, because a select would be compiled into the update and change how it rounds.
    moved = jax.lax.cond(good, self.apply, _skip, state.saved(), grads)
    guard = self.guard.after(state.guard, metrics, good)
    moved = moved._replace(frozen=state.frozen, guard=guard)
    return moved, {**metrics, SKIPPED: guard.skipped, IN_A_ROW: guard.in_a_row}


def _skip(state: TrainState, grads: Params) -> TrainState:
  """Returns the state after a step that is not done."""
  return state._replace(step=state.step + 1)


def updates_done(state: TrainState) -> Int[Array, ""]:
  """Returns how many steps have updated the weights: all but those that the guard skipped."""
  return state.step - state.guard.skipped if isinstance(state.guard, GuardState) else state.step


def _move(
  tx: optax.GradientTransformation, grads: Params, opt_state: optax.OptState, params: Params
) -> tuple[Params, optax.OptState]:
  """Returns the parameters and the optimizer's state after an update."""
  updates, opt_state = tx.update(grads, opt_state, params)
  return cast(Params, optax.apply_updates(params, updates)), opt_state


def average(ema: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
  """Returns the moving average of the weights after an update.

  The decay grows from 0.1 to `decay` (ours; as TensorFlow's averages). With a fixed decay
  the initial weights would dominate the average for about 1 / (1 - decay) updates.

  Args:
    step: updates done before this one.
  """
  decay_now = jnp.minimum(decay, (1 + step) / (10 + step))
  return cast(Params, optax.incremental_update(params, ema, step_size=1 - decay_now))


def create(
  make_params: Callable[[Any], Params],
  argument: Any,
  updates: Updates,
  like: TrainState,
  frozen: Params = NOTHING,
) -> TrainState:
  """Makes a state directly on a mesh, so that no device ever holds all of it.

  The shardings are passed to `jax.jit`, because a bare `jax.jit(tx.init)` does not shard moments.

  Args:
    make_params: makes the parameters; it is traced.
    argument: what `make_params` takes: a key, or arrays that are on the mesh already.
    like: what `abstract` returns.
    frozen: arrays of the host or of devices, which are copied onto the mesh.
  """

  def make(argument: Any) -> TrainState:
    return updates.begin(make_params(argument))

  shardings = shardings_of(like.saved())
  options = options_to_draw(jax.tree.leaves(shardings)[0].mesh.devices.flat[0])
  made = jax.jit(make, out_shardings=shardings, compiler_options=options)(argument)
  return with_frozen(made, frozen, like)


def with_frozen(state: TrainState, frozen: Params, like: TrainState) -> TrainState:
  """Returns a state, such as a restored one, with frozen parameters on the shardings of `like`."""
  sharded = jax.tree.map(lambda x, target: jax.device_put(x, target.sharding), frozen, like.frozen)
  return state._replace(frozen=sharded)


def abstract(
  params: Params, updates: Updates, mesh: Mesh, rules: sharding.Rules, frozen: Params = NOTHING
) -> TrainState:
  """Returns the shapes, types and shardings of a state.

  Args:
    params: arrays, or their shapes.
    frozen: arrays, or their shapes.
  """
  shapes = jax.eval_shape(updates.begin, params, frozen)
  shardings = sharding.shardings(shapes, mesh, rules)
  return jax.tree.map(
    lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes, shardings
  )


def shardings_of(state: TrainState) -> TrainState:
  """Returns the sharding of each array of a state, or of an abstract one."""
  return jax.tree.map(lambda x: x.sharding, state)
