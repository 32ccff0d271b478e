"""Counts the FLOPs of the transformer's programs from its sizes.

A multiply-add is 2 FLOPs. The model's FLOPs are those of the blocks' linear layers and of attention
inside each clip. They do not include recomputation, padding of blocks, and the small layers before
and after the blocks (under 1%).
"""

import math
from collections.abc import Sequence
from typing import Any

from cogvideox_jax.config.schema import StageConfig
from cogvideox_jax.inference.size import Size
from cogvideox_jax.models.dit_config import DiTConfig

# Products of tokens x tokens in attention. Forward: scores, and the weighted sum of values.
# Backward: the scores again, dp, dq, dk and dv.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5


def clip_tokens(model: DiTConfig, num_frames: int, height: int, width: int) -> int:
  """Text and vision tokens of a clip; its latent frames are padded to whole patches.

  num_frames, height, width: in pixels.
  """
  frames = -(-((num_frames - 1) // 4 + 1) // model.patch[0])
  return model.text_length + frames * math.prod(
    side // 8 // patch for side, patch in zip((height, width), model.patch[1:], strict=True)
  )


def longest_clip(model: DiTConfig, stage: StageConfig) -> Size:
  """The size of the stage's clips with the most tokens."""
  sizes = [Size(max(stage.durations), height, width) for height, width in stage.sizes]
  return max(sizes, key=lambda size: clip_tokens(model, *size))


def clips_of_row(model: DiTConfig, stage: StageConfig) -> list[int]:
  """Tokens of each clip of the most expensive row: the longest clips, and one for what is left.

  Attention grows with the square of a clip's length.
  """
  longest = clip_tokens(model, *longest_clip(model, stage))
  whole, rest = divmod(stage.row_tokens, longest)
  return [longest] * whole + [rest] * bool(rest)


def linear_flops(model: DiTConfig, tokens: int) -> int:
  """FLOPs of the linear layers of all blocks in a forward pass."""
  return model.depth * 24 * tokens * model.width**2


def attention_flops(model: DiTConfig, clips: Sequence[int], products: int) -> int:
  """FLOPs of attention in all blocks; products: of tokens x tokens inside each clip."""
  return model.depth * products * 2 * sum(tokens**2 for tokens in clips) * model.width


def forward_flops(model: DiTConfig, clips: Sequence[int]) -> int:
  """The model's FLOPs in a forward pass; clips: the tokens of each."""
  linear = linear_flops(model, sum(clips))
  return linear + attention_flops(model, clips, FORWARD_PRODUCTS)


def traced_flops(jaxpr: Any) -> float:
  """FLOPs of a traced function's products and convolutions, on all devices.

  Of several branches the most expensive counts. The function may hold no loops.
  """
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
    elif equation.primitive.name == "shard_map":
      mesh, axes = equation.params["mesh"], equation.params["newly_manual_axes"]
      total += inner_flops[0] * math.prod(mesh.shape[axis] for axis in axes)
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
