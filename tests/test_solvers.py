"""The solvers against diffusers' schedulers, step by step and along whole paths."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule
from cogvideox_jax.diffusion.solvers import ddim, dpm, solver_step, spaced_timesteps
from cogvideox_jax.errors import UserError

CASES = Path(__file__).parent / "data/goldens/cases"
SCHEDULES = {
  model: noise_schedule(NoiseConfig(1000, 0.00085, 0.012, snr_shift, zero_terminal_snr=True))
  for model, snr_shift in [("2b", 3.0), ("5b", 1.0)]
}
MAKERS = {"ddim": ddim, "dpm": dpm}


def analytic_v(x, timestep):
  """The stand-in for a network that the reference cases were made with."""
  return 0.8 * jnp.sin(1.3 * x + 0.002 * timestep) + 0.3 * x * jnp.cos(timestep / 300)


def solve(solver, denoise, x, drawn):
  """Runs a whole path under jit and scan; returns x and x0 of every step."""

  def body(carry, step):
    (x, x0), (weights, timestep, noise) = carry, step
    carry = solver_step(weights, x, denoise(x, timestep), x0, noise)
    return carry, carry

  steps = (solver.weights, solver.timesteps.astype(np.float32), drawn)
  return jax.jit(lambda x: jax.lax.scan(body, (x, jnp.zeros_like(x)), steps)[1])(x)


# 7 steps do not divide 1000: then a step does not end at the next timestep.
@pytest.mark.parametrize(
  ("kind", "model", "steps"),
  [("ddim", "2b", 7), ("ddim", "5b", 8), ("dpm", "2b", 7), ("dpm", "5b", 8)],
)
def test_whole_path_matches_diffusers(kind, model, steps):
  case = load_file(CASES / f"{kind}_{model}_{steps}steps.safetensors")
  solver = MAKERS[kind](SCHEDULES[model], steps)
  np.testing.assert_array_equal(solver.timesteps, case["in.timesteps"])
  drawn = case.get("rng.noise_used", np.zeros_like(case["out.prev_sample"]))
  xs, x0s = solve(solver, analytic_v, jnp.asarray(case["in.start"]), drawn)
  np.testing.assert_allclose(xs, case["out.prev_sample"], atol=1e-5)
  np.testing.assert_allclose(x0s, case["out.pred_x0"], atol=1e-5)


def published_dpm_weights(alphas, steps):
  """DPM-Solver++ 2M SDE as it is written, in log signal-to-noise ratios, infinities and all."""

  def log_snr(alpha):
    return np.log(np.sqrt(alpha / (1 - alpha)))

  timesteps, rows = spaced_timesteps(steps, len(alphas)), []
  for i, t in enumerate(timesteps):
    end = t - len(alphas) // steps
    here, there = alphas[t], np.float64(1) if end < 0 else alphas[end]
    h = log_snr(there) - log_snr(here)
    x = np.sqrt((1 - there) / (1 - here)) * np.exp(-h)
    x0 = -np.expm1(-2 * h) * np.sqrt(there)
    noise = np.sqrt(1 - there) * np.sqrt(1 - np.exp(-2 * h))
    half = 0.0
    if i > 0 and end >= 0:
      half = h / (log_snr(here) - log_snr(alphas[timesteps[i - 1]])) / 2
    rows.append((x, x0 * (1 + half), -x0 * half, noise))
  return np.array(rows)


@pytest.mark.parametrize("model", SCHEDULES)
def test_dpm_equals_its_published_form_at_any_number_of_steps(model):
  for steps in [1, 2, 3, 6, 50, 61, 103, 121, 500, 999, 1000]:
    weights = dpm(SCHEDULES[model], steps).weights
    ours = np.stack([weights.x, weights.x0, weights.previous_x0, weights.noise], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
      published = published_dpm_weights(SCHEDULES[model].alphas_cumprod, steps)
    np.testing.assert_allclose(ours, published, atol=1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_perfect_network_leads_to_the_clean_latents(kind):
  schedule = SCHEDULES["5b"]
  clean, noise = jax.random.normal(jax.random.key(0), (2, 3, 4))

  def denoise(x, timestep):
    alpha = schedule.alpha(timestep.astype(jnp.int32))
    return (jnp.sqrt(alpha) * x - clean) / jnp.sqrt(1 - alpha)

  drawn = jax.random.normal(jax.random.key(1), (50, 3, 4))
  xs, _ = solve(MAKERS[kind](schedule, 50), denoise, noise, drawn)
  np.testing.assert_allclose(xs[-1], clean, atol=1e-5)


def test_only_dpm_adds_noise():
  assert dpm(SCHEDULES["5b"], 5).stochastic
  assert not ddim(SCHEDULES["5b"], 5).stochastic


def test_timesteps_match_diffusers():
  case = load_file(CASES / "timesteps_and_dynamic_cfg.safetensors")
  tables = {name: table for name, table in case.items() if name.startswith("tab.timesteps.")}
  assert len(tables) > 20
  for name, table in tables.items():
    np.testing.assert_array_equal(spaced_timesteps(int(name.split(".")[-1]), 1000), table)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_step_count_that_the_schedule_cannot_give_is_the_users_mistake(steps):
  with pytest.raises(UserError, match=f"{steps} sampling steps"):
    ddim(SCHEDULES["5b"], steps)
