"""Classifier-free guidance (arXiv:2207.12598) with a constant scale or one that changes."""

import numpy as np
from jaxtyping import Array, Float, Int

from cogvideox_jax.errors import UserError


def classifier_free(
  v_negative: Float[Array, "*shape"],
  v_positive: Float[Array, "*shape"],
  scale: float | Float[Array, ""],
) -> Float[Array, "*shape"]:
  """Extrapolates from the negative prompt's v (scale 0) through the prompt's (scale 1)."""
  return v_negative + scale * (v_positive - v_negative)


def constant_scales(
  scale: float, timesteps: Int[np.ndarray, "steps"]
) -> Float[np.ndarray, "steps"]:
  """Returns the same scale for every step."""
  return np.full(len(timesteps), scale, np.float64)


def ramp_scales(
  scale: float, timesteps: Int[np.ndarray, "visited"]
) -> Float[np.ndarray, "visited"]:
  """Returns what `dynamic_scales` was meant to be: a late ramp from 1 to nearly 1 + scale."""
  done = np.arange(len(timesteps)) / len(timesteps)
  return 1 + scale * (1 - np.cos(np.pi * done**5)) / 2


def dynamic_scales(
  scale: float, timesteps: Int[np.ndarray, "visited"], steps: int
) -> Float[np.ndarray, "visited"]:
  """Returns the published samplers' scale for every timestep, between 1 and 1 + scale.

  It was meant as a ramp over the index of the step, but the released code uses the timestep instead
  of the index, so it is a wave (SAT, diffusers `use_dynamic_cfg`). The published scores were made
  with it. Its angles reach millions of radians, so it needs float64.

  Args:
    steps: how many steps were asked for; a solver may visit one timestep more.
  """
  angles = np.pi * ((steps - timesteps.astype(np.float64)) / steps) ** 5
  return 1 + scale * (1 - np.cos(angles)) / 2


def scales(
  dynamic: bool | str, scale: float, timesteps: Int[np.ndarray, "visited"], steps: int
) -> Float[np.ndarray, "visited"]:
  """Returns the scale of every step.

  Args:
    dynamic: False for a constant scale, True or "wave" for `dynamic_scales`, "ramp" for
      `ramp_scales`.

  Raises:
    UserError: `dynamic` is none of these.
  """
  match dynamic:
    case False:
      return constant_scales(scale, timesteps)
    case True | "wave":
      return dynamic_scales(scale, timesteps, steps)
    case "ramp":
      return ramp_scales(scale, timesteps)
  raise UserError(f"use_dynamic_cfg={dynamic!r}: must be False, True, 'wave' or 'ramp'.")
