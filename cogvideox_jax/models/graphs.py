"""Models without their parameters: what `nnx.merge` joins with a plain dict of arrays."""

from typing import Any

from flax import nnx


def graph_of(model: type[nnx.Module], config: Any, **options: Any) -> nnx.GraphDef:
  """The structure of a model; allocates nothing."""
  return nnx.split(nnx.eval_shape(lambda: model(config, **options, rngs=nnx.Rngs(0))))[0]
