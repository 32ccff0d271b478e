"""Solvers from noise to latents: DDIM, and stochastic DPM-Solver++ 2M (arXiv:2211.01095).

A step of either solver is a weighted sum of four arrays: the latents, the clean latents that v
implies now, those that it implied one step ago, and new noise. So a solver is a table of weights,
made on the host in float64, and one `solver_step` runs any of them, also inside `jax.lax.scan`:

  def body(carry, step):
    x, x0 = carry
    row, timestep, key = step
    return solver_step(row, x, denoise(x, timestep), x0, jax.random.normal(key, x.shape)), None

  solver = ddim(schedule, steps)
  xs = (solver.weights, solver.timesteps, jax.random.split(key, len(solver.timesteps)))
  (x, _), _ = jax.lax.scan(body, (noise, jnp.zeros_like(noise)), xs)

The arithmetic is that of diffusers' CogVideoX schedulers. "v" below is what the network returns: it
is noise, or clean latents, if the schedule's config says so.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from cogvideox_jax.diffusion.noise import NoiseSchedule
from cogvideox_jax.errors import UserError


class Weights(NamedTuple):
  """The factors of a step's terms: an entry for each step, or those of one step."""

  x_to_x0: Float32[np.ndarray | Array, "*steps"]  # x0 = x * x_to_x0 - v * v_to_x0.
  v_to_x0: Float32[np.ndarray | Array, "*steps"]
  x: Float32[np.ndarray | Array, "*steps"]  # The next x is the sum of these four.
  x0: Float32[np.ndarray | Array, "*steps"]
  previous_x0: Float32[np.ndarray | Array, "*steps"]  # 0 at the first step, which has none.
  noise: Float32[np.ndarray | Array, "*steps"]


class Solver(NamedTuple):
  """The timesteps to visit, in this order, and the weights of the step from each."""

  timesteps: Int32[np.ndarray, "steps"]
  weights: Weights

  @property
  def stochastic(self) -> bool:
    """Whether any step adds noise; if none does, zeros may be passed as noise."""
    return bool(np.any(self.weights.noise))


def ddim(schedule: NoiseSchedule, steps: int, start: int = 0) -> Solver:
  """DDIM (arXiv:2010.02502) without noise: diffusers `CogVideoXDDIMScheduler`.

  Args:
    start: how many of the first timesteps to leave out, for video to video.
  """
  timesteps, alpha, alpha_next, _ = _path(schedule, steps, start)
  x = np.sqrt((1 - alpha_next) / (1 - alpha))
  x0 = np.sqrt(alpha_next) - np.sqrt(alpha) * x
  return _solver(schedule, timesteps, alpha, x=x, x0=x0, previous_x0=0 * x, noise=0 * x)


def dpm(schedule: NoiseSchedule, steps: int, start: int = 0) -> Solver:
  """DPM-Solver++ 2M SDE: diffusers `CogVideoXDPMScheduler`. For `start` see `ddim`.

  The published formulas use logarithms of signal-to-noise ratios, which are infinite at both ends
  of the path. These use the exponentials, which are finite everywhere: `decay` is e^-h.
  """
  timesteps, alpha, alpha_next, is_last = _path(schedule, steps, start)
  decay = _decay(alpha, alpha_next)
  x = np.sqrt((1 - alpha_next) / (1 - alpha)) * decay
  x0 = (1 - decay**2) * np.sqrt(alpha_next)
  noise = np.sqrt((1 - alpha_next) * (1 - decay**2))

  # Extrapolate x0 along its last change, except where a ratio is infinite: after a step from pure
  # noise its weight is 0, and the step that leaves the schedule is of first order.
  extrapolation = np.zeros_like(x)
  second = np.flatnonzero((alpha[:-1] > 0) & ~is_last[1:]) + 1
  behind = _decay(alpha[second - 1], alpha[second])
  extrapolation[second] = np.log(decay[second]) / np.log(behind) / 2
  return _solver(
    schedule,
    timesteps,
    alpha,
    x=x,
    x0=x0 * (1 + extrapolation),
    previous_x0=-x0 * extrapolation,
    noise=noise,
  )


SOLVERS = {"ddim": ddim, "dpm": dpm}


def solver_step(
  weights: Weights,  # Those of this step.
  x: Float[Array, "*shape"],
  v: Float[Array, "*shape"],  # The network's output at x, guided.
  previous_x0: Float[Array, "*shape"],  # The x0 that the last step returned; zeros at the first.
  noise: Float[Array, "*shape"],  # Standard normal.
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
  """Returns x at the next timestep, and the clean latents x0 that v implies at this one."""
  x0 = x * weights.x_to_x0 - v * weights.v_to_x0
  x = x * weights.x + x0 * weights.x0 + previous_x0 * weights.previous_x0 + noise * weights.noise
  return x, x0


def spaced_timesteps(
  steps: int, train_steps: int, spacing: str = "trailing", offset: int = 0
) -> Int32[np.ndarray, "visited"]:
  """Returns evenly spaced timesteps, from noisy to clean, rounded as numpy does.

  "trailing" includes the last timestep: 999, 979 ... 19. "leading" includes the first, before
  `offset` is added: 980, 960 ... 0. "linspace" includes both.

  For 62 of the step counts up to 1000 (61, 103, 121, ...), rounding adds one more trailing
  timestep, -1, which indexes the last one. diffusers does the same.

  Raises:
    UserError: steps is not in 1..train_steps.
  """
  if not 1 <= steps <= train_steps:
    raise UserError(
      f"{steps} sampling steps were asked for.\n"
      f"The model knows {train_steps} timesteps: ask for 1 to {train_steps} steps, usually 50."
    )
  match spacing:
    case "trailing":
      spaced = np.arange(train_steps, 0, -train_steps / steps).round() - 1
    case "leading":
      spaced = np.arange(steps)[::-1] * (train_steps // steps) + offset
    case _:
      spaced = np.linspace(0, train_steps - 1, steps).round()[::-1]
  return spaced.astype(np.int32)


def _path(schedule: NoiseSchedule, steps: int, start: int):
  """Returns the timesteps, and for each: alpha, alpha where its step ends, whether that is outside.

  A step ends `train_steps // steps` below its timestep, which is not always the next timestep of
  the path. If it ends below 0, outside the schedule, no noise is left, or that of timestep 0.
  """
  alphas, config = schedule
  timesteps = spaced_timesteps(steps, len(alphas), config.spacing, config.steps_offset)[start:]
  ends = timesteps - len(alphas) // steps
  final = 1.0 if config.ends_clean else alphas[0]
  alpha_next = np.where(ends >= 0, alphas[np.maximum(ends, 0)], final)
  return timesteps, alphas[timesteps], alpha_next, ends < 0


def _decay(alpha: Float[np.ndarray, "n"], alpha_next: Float[np.ndarray, "n"]):
  """Returns the root of the ratio of the signal-to-noise ratios at alpha and alpha_next: 0 to 1."""
  return np.sqrt(alpha * (1 - alpha_next) / (alpha_next * (1 - alpha)))


def _solver(schedule: NoiseSchedule, timesteps, alpha: Float[np.ndarray, "n"], **weights) -> Solver:
  match schedule.config.prediction:
    case "v_prediction":
      weights.update(x_to_x0=np.sqrt(alpha), v_to_x0=np.sqrt(1 - alpha))
    case "epsilon":
      if not alpha.all():
        raise UserError("A model that predicts noise cannot start from pure noise: zero SNR.")
      weights.update(x_to_x0=1 / np.sqrt(alpha), v_to_x0=np.sqrt((1 - alpha) / alpha))
    case _:
      weights.update(x_to_x0=0 * alpha, v_to_x0=-1 + 0 * alpha)
  return Solver(timesteps, Weights(**{k: w.astype(np.float32) for k, w in weights.items()}))
