"""Noise schedules, solvers, timesteps and guidance."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from cogvideox_jax.conversion import component_fields
from cogvideox_jax.diffusion import guidance, noise, solvers

from .compared import EXACT, Compared
from .folder import Case

SOLVERS = {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}


def _schedule(case: Case) -> noise.NoiseSchedule:
  return noise.noise_schedule(component_fields.read_noise(case.call, case.name))


def scheduler(case: Case) -> Iterator[Compared]:
  """Along the trajectory of a fixed function that stands for a network."""
  stored, schedule = case.stored, _schedule(case)
  make = {"ddim": solvers.ddim, "dpm": solvers.dpm}[SOLVERS[case.call["class"]]]
  solver = make(schedule, case.call["num_inference_steps"])
  yield Compared("in.timesteps", solver.timesteps, 0.0)
  if "tab.alphas_cumprod" in stored:
    yield Compared("tab.alphas_cumprod", schedule.alphas_cumprod, EXACT)
  x = x0 = jnp.asarray(stored["in.start"])
  path, clean = [], []
  for step, timestep in enumerate(solver.timesteps.tolist()):
    v = 0.8 * jnp.sin(1.3 * x + 0.002 * timestep) + 0.3 * x * math.cos(timestep / 300)
    weights = solvers.Weights(*(column[step] for column in solver.weights))
    added = stored.get("rng.noise_used", np.zeros((step + 1, *x.shape), np.float32))[step]
    x, x0 = solvers.solver_step(weights, x, v, x0, jnp.asarray(added))
    path.append(x)
    clean.append(x0)
  yield Compared("out.prev_sample", jnp.stack(path), EXACT)
  if "out.pred_x0" in stored:
    yield Compared("out.pred_x0", jnp.stack(clean), EXACT)


def noise_schedule(case: Case) -> Iterator[Compared]:
  stored, schedule = case.stored, _schedule(case)
  alpha = schedule.alpha(jnp.asarray(stored["in.timesteps"]))[:, None, None, None, None]
  x0, drawn = jnp.asarray(stored["in.original"]), jnp.asarray(stored["in.noise"])
  yield Compared("tab.alphas_cumprod", schedule.alphas_cumprod, EXACT)
  yield Compared("tab.betas", noise.betas(schedule.config), EXACT)
  yield Compared("out.add_noise", noise.add_noise(x0, drawn, alpha), EXACT)
  yield Compared("out.velocity", noise.velocity(x0, drawn, alpha), EXACT)


def timesteps_and_guidance(case: Case) -> Iterator[Compared]:
  scale = case.call["guidance_scale"]
  for key in case.stored:
    _, table, steps = key.split(".")
    ours = solvers.spaced_timesteps(int(steps), 1000)
    if table == "dynamic_cfg":
      ours = guidance.dynamic_scales(scale, ours, int(steps))
    yield Compared(key, ours, EXACT)
