"""Noise schedules, and the steps of both schedulers along fixed trajectories."""

import math
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from .draws import recorded_draws
from .folder import GoldensFolder

# The published scheduler_config.json files, which differ in snr_shift_scale alone.
PUBLISHED: dict[str, Any] = {
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "num_train_timesteps": 1000,
  "prediction_type": "v_prediction",
  "rescale_betas_zero_snr": True,
  "set_alpha_to_one": True,
  "timestep_spacing": "trailing",
  "clip_sample": False,
  "clip_sample_range": 1.0,
  "sample_max_value": 1.0,
  "steps_offset": 0,
  "trained_betas": None,
}
SNR_SHIFTS = {"2b": 3.0, "5b": 1.0}
# Settings that the classes support and no published model uses.
OTHERS: dict[str, Any] = {
  **PUBLISHED,
  "rescale_betas_zero_snr": False,
  "set_alpha_to_one": False,
  "steps_offset": 1,
  "snr_shift_scale": 2.0,
}
ABOUT = {
  "in.start": "where the trajectory begins",
  "in.timesteps": "those of the steps",
  "tab.alphas_cumprod": "float64",
  "rng.noise_used": "[step, ...] the noise that entered each step",
  "out.prev_sample": "[step, ...]; the model's output is 0.8 sin(1.3 x + 0.002 t) + 0.3 x cos(t / "
  "300)",
  "out.pred_x0": "[step, ...]",
}


def make(folder: GoldensFolder) -> None:
  sizes, draws = folder.sizes, folder.draws
  shape = (2, 3, sizes.lat_ch, 5, 4)
  for version, shift in SNR_SHIFTS.items():
    config = {**PUBLISHED, "snr_shift_scale": shift}
    noised(folder, version, config, shape)
    for steps in (8, 7):
      start = draws.normal(f"sched/{version}/{steps}", *shape)
      ddim(folder, f"ddim_{version}_{steps}steps", config, steps, start)
      generator = draws.generator(f"generator/sched/{version}/{steps}/dpm")
      dpm(folder, f"dpm_{version}_{steps}steps", config, steps, start, generator)
  for prediction, spacing in (("epsilon", "leading"), ("sample", "linspace")):
    config = {**OTHERS, "prediction_type": prediction, "timestep_spacing": spacing}
    start = draws.normal(f"sched/{prediction}", *shape)
    ddim(folder, f"ddim_alt_{prediction}", config, 5, start)


def noised(folder: GoldensFolder, version: str, config: dict[str, Any], shape: tuple) -> None:
  scheduler = CogVideoXDDIMScheduler(**config)
  x0 = folder.draws.normal(f"sched/{version}/x0", *shape)
  noise = folder.draws.normal(f"sched/{version}/n", *shape)
  timesteps = torch.tensor([999, 37])
  folder.add_case(
    f"sched_tables_{version}",
    "table",
    {
      "tab.betas": scheduler.betas,
      "tab.alphas_cumprod": scheduler.alphas_cumprod,
      "in.original": x0,
      "in.noise": noise,
      "in.timesteps": timesteps,
      "out.add_noise": scheduler.add_noise(x0, noise, timesteps),
      "out.velocity": scheduler.get_velocity(x0, noise, timesteps),
    },
    {
      "tab.betas": "float64",
      "tab.alphas_cumprod": "float64, after the shift and the rescaling",
      "in.": "clean latents, noise, and the timestep of each clip",
      "out.add_noise": "sqrt(alpha) x0 + sqrt(1 - alpha) noise",
      "out.velocity": "sqrt(alpha) noise - sqrt(1 - alpha) x0",
    },
    call=config,
  )


def analytic_model(x: Tensor, timestep: int) -> Tensor:
  """A fixed function that takes the place of a network."""
  return 0.8 * torch.sin(1.3 * x + 0.002 * timestep) + 0.3 * x * math.cos(timestep / 300)


def ddim(
  folder: GoldensFolder, name: str, config: dict[str, Any], steps: int, start: Tensor
) -> None:
  scheduler = CogVideoXDDIMScheduler(**config)
  scheduler.set_timesteps(steps)
  x, samples, clean = start, [], []
  for timestep in scheduler.timesteps:
    found = scheduler.step(analytic_model(x, int(timestep)), timestep, x)
    x = found.prev_sample
    samples.append(x)
    clean.append(found.pred_original_sample)
  _add(folder, name, scheduler, config, start, samples, clean, {})


def dpm(
  folder: GoldensFolder,
  name: str,
  config: dict[str, Any],
  steps: int,
  start: Tensor,
  generator: torch.Generator,
) -> None:
  """A step that looks back at the one before draws twice, and uses the second draw."""
  scheduler = CogVideoXDPMScheduler(**config)
  scheduler.set_timesteps(steps)
  x, x0, before = start, None, None
  samples, clean, used = [], [], []
  for timestep in scheduler.timesteps:
    output = analytic_model(x, int(timestep))
    with recorded_draws() as draws:
      x, x0 = scheduler.step(
        output, x0, timestep, before, x, generator=generator, return_dict=False
      )
    before = timestep
    samples.append(x)
    clean.append(x0)
    used.append(draws[-1][1])
  _add(folder, name, scheduler, config, start, samples, clean, {"rng.noise_used": used})


def _add(
  folder: GoldensFolder,
  name: str,
  scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
  config: dict[str, Any],
  start: Tensor,
  samples: list[Tensor],
  clean: list[Tensor],
  drawn: dict[str, list[Tensor]],
) -> None:
  by_step = {"out.prev_sample": samples, "out.pred_x0": clean, **drawn}
  tensors = {
    "in.start": start,
    "in.timesteps": scheduler.timesteps,
    "tab.alphas_cumprod": scheduler.alphas_cumprod,
    **{key: torch.stack(values) for key, values in by_step.items()},
  }
  call = {**config, "num_inference_steps": len(samples), "class": type(scheduler).__name__}
  folder.add_case(name, "scheduler", tensors, ABOUT, call=call)
