"""What a training run compiles: the loop runs it, and `aot` compiles the same for other devices."""

from collections.abc import Callable
from typing import Any

import jax

from cogvideox_jax.training import state
from cogvideox_jax.training.setup import Functions
from cogvideox_jax.xla import compiler_options


def jit_train(functions: Functions) -> Callable[..., Any]:
  """(state, batch, key) -> (state, metrics). The state stays where it is, in the same buffers."""
  places = state.shardings_of(functions.abstract)
  device, *_ = jax.tree.leaves(places)[0].device_set
  return jax.jit(
    functions.train,
    out_shardings=(places, None),
    donate_argnums=0,
    compiler_options=compiler_options(device),
  )
