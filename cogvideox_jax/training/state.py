"""Everything that a training step changes, made on a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from cogvideox_jax import sharding

Params = dict[str, Any]  # Nested by the keys of a parameter's path; see nnx.to_pure_dict.


class TrainState(NamedTuple):
  """What is saved, restored, donated to each step and returned by it."""

  step: Int[Array, ""]  # Updates done.
  params: Params  # The fp32 masters.
  opt_state: optax.OptState
  ema: Params  # Moving average of `params`: what is sampled from.


def new_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first update. The average starts at the weights.

  It holds its own copy of them: buffers donated twice crash a step.
  """
  return TrainState(jnp.int32(0), params, tx.init(params), jax.tree.map(jnp.copy, params))


def create(
  make_params: Callable[[Any], Params],
  argument: Any,
  tx: optax.GradientTransformation,
  like: TrainState,
) -> TrainState:
  """Makes a state straight onto a mesh, so that no device ever holds all of it.

  The shardings are given by name: a bare `jax.jit(tx.init)` leaves the moments unsharded.

  Args:
    make_params: traced; given `argument`, such as a key, or arrays that are on the mesh already.
    like: what `abstract` returns.
  """

  def make(argument: Any) -> TrainState:
    return new_state(make_params(argument), tx)

  return jax.jit(make, out_shardings=shardings_of(like))(argument)


def abstract(
  params: Params, tx: optax.GradientTransformation, mesh: Mesh, rules: sharding.Rules
) -> TrainState:
  """Shapes, types and shardings of a state; `params` are arrays, or their shapes."""
  shapes = jax.eval_shape(lambda params: new_state(params, tx), params)
  places = sharding.shardings(shapes, mesh, rules)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
  )


def shardings_of(state: TrainState) -> TrainState:
  """The sharding of each array of a state, or of an abstract one."""
  return jax.tree.map(lambda x: x.sharding, state)
