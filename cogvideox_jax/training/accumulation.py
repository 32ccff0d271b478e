"""Computes a global batch in microbatches, one after the other, and sums what each gives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def sum_over(function: Callable[[Any], Any], microbatches: Any) -> Any:
  """Returns the sum of a function over the microbatches, which are computed one after the other.

  Args:
    function: takes a microbatch and returns a tree of arrays.
    microbatches: a tree of arrays [microbatches, ...].
  """
  first = jax.tree.map(lambda x: x[0], microbatches)
  if len(jax.tree.leaves(microbatches)[0]) == 1:
    return function(first)

  def add(total: Any, microbatch: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, function(microbatch)), None

  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first))
  return jax.lax.scan(add, zeros, microbatches)[0]
