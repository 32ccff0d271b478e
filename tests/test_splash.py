"""The TPU's attention kernel, interpreted, against the plain path; and compiled for a TPU."""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import dense_attention, drawn, row, value_and_grads

from cogvideox_jax.models import attention as plain
from cogvideox_jax.models import splash
from cogvideox_jax.models.backends import attention_for

SEPARATE = splash.Chip(block=128, partial_bytes=0)  # Kernels of their own for the two gradients.
FUSED = splash.Chip(block=128, partial_bytes=2**30)


def interpreted(chip):
  return partial(splash.attention, chip=chip, interpret=True)


# One clip, many clips, with padding and without; the tokens make no whole blocks.
ROWS = np.stack([row(300, 211, 1, 88, n=700), row(700, n=700), row(n=700), row(*[9] * 60, n=700)])


@pytest.mark.parametrize("chip", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_equals_the_plain_path_in_values_and_gradients(chip):
  q, k, v = drawn(ROWS)
  ours = value_and_grads(interpreted(chip), q, k, v, ROWS)
  for a, b in zip(ours, value_and_grads(dense_attention, q, k, v, ROWS), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_is_as_near_as_its_rounding():
  q, k, v = drawn(ROWS[:1], jnp.bfloat16)
  ours = value_and_grads(interpreted(SEPARATE), q, k, v, ROWS[:1])
  exact = (x.astype(jnp.float32) for x in (q, k, v))
  for a, b in zip(ours, value_and_grads(dense_attention, *exact, ROWS[:1]), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2)
