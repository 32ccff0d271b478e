"""Classifier-free guidance (arXiv:2207.12598), with a constant or a changing scale."""

import numpy as np
from jaxtyping import Array, Float, Int

from cogvideox_jax.errors import UserError


def classifier_free(
  v_negative: Float[Array, "*shape"],
  v_positive: Float[Array, "*shape"],
  scale: float | Float[Array, ""],
) -> Float[Array, "*shape"]:
  """Moves on from the negative prompt's v through the prompt's: 0 is the one, 1 the other."""
  return v_negative + scale * (v_positive - v_negative)


def constant_scales(
  scale: float, timesteps: Int[np.ndarray, "steps"]
) -> Float[np.ndarray, "steps"]:
  """The same scale at every step."""
  return np.full(len(timesteps), scale, np.float64)


def ramp_scales(
  scale: float, timesteps: Int[np.ndarray, "visited"]
) -> Float[np.ndarray, "visited"]:
  """What `dynamic_scales` was meant to be: a ramp from 1 to nearly 1 + scale, late in the path."""
  done = np.arange(len(timesteps)) / len(timesteps)
  return 1 + scale * (1 - np.cos(np.pi * done**5)) / 2


def dynamic_scales(
  scale: float, timesteps: Int[np.ndarray, "visited"], steps: int
) -> Float[np.ndarray, "visited"]:
  """The published samplers' scale of every timestep, between 1 and 1 + scale.

  steps: how many were asked for, from which a solver may differ by one.

  Meant as a ramp over the index of the step, it was released with the timestep in its place, and
  so is a wave; the published scores were made with it (SAT, diffusers `use_dynamic_cfg`). Its
  angles reach millions of radians: float64 only.
  """
  angles = np.pi * ((steps - timesteps.astype(np.float64)) / steps) ** 5
  return 1 + scale * (1 - np.cos(angles)) / 2


def scales(
  dynamic: bool | str, scale: float, timesteps: Int[np.ndarray, "visited"], steps: int
) -> Float[np.ndarray, "visited"]:
  """The scale of every step: constant, or True or "wave", or "ramp".

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
