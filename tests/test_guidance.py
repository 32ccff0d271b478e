"""Guidance, and the published wave of its scale."""

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from cogvideox_jax.diffusion.guidance import classifier_free, constant_scales, dynamic_scales
from cogvideox_jax.diffusion.solvers import spaced_timesteps

CASES = Path(__file__).parent / "data/goldens/cases"


def test_dynamic_scales_match_diffusers():
  case = load_file(CASES / "timesteps_and_dynamic_cfg.safetensors")
  tables = {name: table for name, table in case.items() if name.startswith("tab.dynamic_cfg.")}
  assert len(tables) > 20
  for name, table in tables.items():
    steps = int(name.split(".")[-1])
    scales = dynamic_scales(6.0, spaced_timesteps(steps, 1000), steps)
    np.testing.assert_allclose(scales, table, atol=1e-9)


def test_constant_scales_have_one_for_every_timestep():
  np.testing.assert_array_equal(constant_scales(6.0, spaced_timesteps(61, 1000)), [6.0] * 62)


def test_guidance_goes_from_the_negative_through_the_positive():
  negative, positive = jax.random.normal(jax.random.key(0), (2, 3, 4))
  np.testing.assert_allclose(classifier_free(negative, positive, 0.0), negative)
  np.testing.assert_allclose(classifier_free(negative, positive, 1.0), positive, rtol=1e-5)
  np.testing.assert_allclose(
    classifier_free(negative, positive, 6.0), 6 * positive - 5 * negative, rtol=1e-5, atol=1e-5
  )
