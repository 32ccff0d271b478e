"""The schedule, the decay and the clipping of updates."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cogvideox_jax.config.schema import OptimizerConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import optimizer, state


def config(**changes):
  values = {
    "learning_rate": 1e-2,
    "warmup_steps": 10,
    "final_fraction": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.5,
    "clip_norm": 1.0,
    "ema_decay": 0.99,
  }
  return OptimizerConfig(**values | changes)


def test_the_rate_rises_to_its_peak_and_falls_along_a_cosine():
  rate = optimizer.learning_rate(config(), steps=110)
  rates = np.array([rate(step) for step in range(111)])
  np.testing.assert_allclose(rates[:11], 1e-2 * np.arange(1, 12) / 11, rtol=1e-6)
  cosine = 1e-3 + (1e-2 - 1e-3) * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
  np.testing.assert_allclose(rates[10:], cosine, rtol=1e-5)


def test_without_warm_up_the_first_update_is_at_the_peak():
  assert float(optimizer.learning_rate(config(warmup_steps=0), steps=5)(0)) == pytest.approx(1e-2)


@pytest.mark.parametrize("warmup", [5, 6, -1])
def test_a_warm_up_longer_than_the_run_is_refused(warmup):
  with pytest.raises(UserError, match=r"warmup_steps is .*train.steps is 5"):
    optimizer.learning_rate(config(warmup_steps=warmup), steps=5)


def test_decay_pulls_kernels_and_nothing_else():
  tx = optimizer.make_optimizer(config(), optax.constant_schedule(1e-2))
  params = {name: jnp.full(3, 2.0) for name in ("kernel", "bias", "scale")}
  zero = {name: jnp.zeros(3) for name in params}
  updates, _ = tx.update(zero, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -1e-2 * 0.5 * 2.0, rtol=1e-6)
  np.testing.assert_array_equal(updates["bias"], 0)
  np.testing.assert_array_equal(updates["scale"], 0)


def test_the_global_norm_of_the_gradient_is_clipped():
  tx = optimizer.make_optimizer(config(weight_decay=0.0, eps=1.0, b1=0.0), lambda _: 1.0)
  params = {"a": {"kernel": jnp.zeros(1)}, "b": {"kernel": jnp.zeros(1)}}
  grads = {"a": {"kernel": jnp.array([30.0])}, "b": {"kernel": jnp.array([40.0])}}
  updates, _ = tx.update(grads, tx.init(params), params)
  # Clipped to (0.6, 0.8); Adam's first step is g / (|g| + eps).
  np.testing.assert_allclose(updates["a"]["kernel"], -0.6 / 1.6, rtol=1e-5)
  np.testing.assert_allclose(updates["b"]["kernel"], -0.8 / 1.8, rtol=1e-5)


def test_the_average_forgets_the_drawn_weights_first_and_then_keeps_its_decay():
  drawn, trained = {"kernel": jnp.ones(3)}, {"kernel": jnp.zeros(3)}

  def kept(step, decay):
    return float(state.average(drawn, trained, jnp.int32(step), decay)["kernel"][0])

  np.testing.assert_allclose([kept(0, 0.99), kept(90, 0.99)], [0.1, 0.91], rtol=1e-6)
  np.testing.assert_allclose([kept(890, 0.99), kept(10**6, 0.99)], [0.99, 0.99], rtol=1e-6)
  ema = drawn
  for step in range(100):
    ema = state.average(ema, trained, jnp.int32(step), 0.9999)
  assert float(ema["kernel"][0]) < 1e-9  # A fixed decay would keep .99 of what was drawn.


@pytest.mark.parametrize(
  ("wanted", "steps", "warmup"),
  [(1 / 32, 1600, 50), (1 / 15, 1500, 100), (1 / 32, 20, 0), (0.5, 5, 2), (0, 5, 0), (4, 5, 4)],
)
def test_a_warm_up_below_1_is_a_fraction_of_the_run(wanted, steps, warmup):
  given = config(warmup_steps=wanted)
  assert optimizer.warmup_steps(given, steps) == warmup
  rate = optimizer.learning_rate(given, steps)
  expected = optimizer.learning_rate(config(warmup_steps=warmup), steps)
  assert [float(rate(step)) for step in range(5)] == [float(expected(step)) for step in range(5)]
