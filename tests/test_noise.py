"""The noise schedule against diffusers' tables, and its conversions against one another."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from cogvideox_jax.diffusion import noise

CASES = Path(__file__).parent / "data/goldens/cases"
SNR_SHIFTS = {"2b": 3.0, "5b": 1.0}


def schedule_of(model: str) -> noise.NoiseSchedule:
  config = noise.NoiseConfig(
    steps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    snr_shift=SNR_SHIFTS[model],
    zero_terminal_snr=True,
  )
  return noise.noise_schedule(config)


@pytest.mark.parametrize("model", SNR_SHIFTS)
def test_schedule_matches_diffusers(model):
  case = load_file(CASES / f"sched_tables_{model}.safetensors")
  alphas = schedule_of(model).alphas_cumprod
  np.testing.assert_allclose(alphas, case["tab.alphas_cumprod"], rtol=0, atol=1e-14)
  assert alphas[-1] == 0
  assert np.all(np.diff(alphas) < 0)


@pytest.mark.parametrize("model", SNR_SHIFTS)
def test_noised_latents_and_velocity_match_diffusers(model):
  case = load_file(CASES / f"sched_tables_{model}.safetensors")
  timesteps = jnp.asarray(case["in.timesteps"].astype(np.int32))
  alpha = schedule_of(model).alpha(timesteps).reshape(-1, 1, 1, 1, 1)
  x0, drawn = jnp.asarray(case["in.original"]), jnp.asarray(case["in.noise"])
  np.testing.assert_allclose(noise.add_noise(x0, drawn, alpha), case["out.add_noise"], atol=1e-6)
  np.testing.assert_allclose(noise.velocity(x0, drawn, alpha), case["out.velocity"], atol=1e-6)


def test_without_zero_terminal_snr_some_signal_is_left():
  config = noise.NoiseConfig(1000, 0.00085, 0.012, snr_shift=1.0, zero_terminal_snr=False)
  last = noise.noise_schedule(config).alphas_cumprod[-1]
  assert last == pytest.approx(np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))


def test_snr_shift_divides_the_signal_to_noise_ratio():
  plain, shifted = (
    noise.noise_schedule(noise.NoiseConfig(1000, 0.00085, 0.012, s, False)).alphas_cumprod
    for s in (1.0, 3.0)
  )
  np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) / 3)


def test_x0_follows_from_the_noised_latents_and_v():
  x0, drawn = jax.random.normal(jax.random.key(0), (2, 5, 7))
  alpha = jnp.linspace(0, 1, 5)[:, None]
  x, v = noise.add_noise(x0, drawn, alpha), noise.velocity(x0, drawn, alpha)
  np.testing.assert_allclose(noise.x0_from_v(x, v, alpha), x0, atol=1e-6)
