"""How much arithmetic a program of the transformer is: from its sizes alone.

A multiply-add is 2 FLOPs. What counts as the model's work are the linear layers of the blocks and
attention inside each clip; recomputation, padding of blocks and the small layers before and after
the blocks (under 1%) do not.
"""

import math
from collections.abc import Sequence
from typing import Any

from cogvideox_jax.config.schema import StageConfig
from cogvideox_jax.inference.inputs import Size
from cogvideox_jax.models.dit_config import DiTConfig

FORWARD_PRODUCTS = 2  # Of tokens x tokens in attention: scores, and the weighted sum.
BACKWARD_PRODUCTS = 5  # The scores again, the weights' gradient, and those of q, k and v.


def clip_tokens(model: DiTConfig, num_frames: int, height: int, width: int) -> int:
  """Text and vision tokens of a clip of so many pixels; a patch in time is filled up."""
  frames = -(-((num_frames - 1) // 4 + 1) // model.patch[0])
  return model.text_length + frames * math.prod(
    side // 8 // patch for side, patch in zip((height, width), model.patch[1:], strict=True)
  )


def longest_clip(model: DiTConfig, stage: StageConfig) -> Size:
  """Of the stage's clips with the most tokens."""
  sizes = [Size(max(stage.durations), height, width) for height, width in stage.sizes]
  return max(sizes, key=lambda size: clip_tokens(model, *size))


def clips_of_row(model: DiTConfig, stage: StageConfig) -> list[int]:
  """Tokens of each clip of a row: as many of the longest as fit, and one shorter for the rest.

  The dearest row there is, since attention goes with the square.
  """
  longest = clip_tokens(model, *longest_clip(model, stage))
  whole, rest = divmod(stage.row_tokens, longest)
  return [longest] * whole + [rest] * bool(rest)


def linear_flops(model: DiTConfig, tokens: int) -> float:
  """Of a forward pass."""
  return model.depth * 24 * tokens * model.width**2


def attention_flops(model: DiTConfig, clips: Sequence[int], products: float) -> float:
  """Of so many products of tokens x tokens inside each clip."""
  return model.depth * products * 2 * sum(tokens**2 for tokens in clips) * model.width


def forward_flops(model: DiTConfig, clips: Sequence[int]) -> float:
  linear = linear_flops(model, sum(clips))
  return linear + attention_flops(model, clips, FORWARD_PRODUCTS)


def traced_flops(jaxpr: Any) -> float:
  """Of a traced function's products and convolutions; without loops, of branches the dearest."""
  total = 0.0
  for equation in jaxpr.eqns:
    inner = [
      getattr(value, "jaxpr", value)
      for given in equation.params.values()
      for value in (given if isinstance(given, tuple | list) else [given])
      if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    inner_flops = [traced_flops(each) for each in inner]
    if equation.primitive.name == "cond":
      total += max(inner_flops)
    elif equation.primitive.name == "custom_vjp_call":
      total += inner_flops[0]
    else:
      total += sum(inner_flops)
    if equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval
      outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
      total += 2 * equation.outvars[0].aval.size * kernel.size / outputs
    elif equation.primitive.name == "dot_general":
      ((contracted, _), _) = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
  return total
