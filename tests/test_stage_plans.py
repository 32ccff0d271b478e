"""What each stage takes of a run by its config alone: steps, learning rates, positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from typed_config import typed

from cogvideox_jax.errors import UserError
from cogvideox_jax.models import positions
from cogvideox_jax.training import stages
from configs import base


def test_the_published_steps_are_shared_out_exactly_and_a_short_run_has_every_stage():
  published = base.get_config()
  ends = [(stage.name, stage.end) for stage in stages.plan(typed(published))]
  assert ends == [
    ("stage1", 400_000), ("stage2", 620_000), ("stage3", 740_000), ("stage4", 750_000)
  ]  # fmt: skip
  for steps, expected in ((8, [4, 6, 7, 8]), (4, [1, 2, 3, 4]), (75, [40, 62, 74, 75])):
    plan = stages.plan(typed(published, train__steps=steps))
    assert [stage.end for stage in plan] == expected
    assert [stage.start for stage in plan] == [0, *expected[:-1]]
  uneven = {"train__steps": 10, "stages__stage1__share": 1, "stages__stage2__share": 1}
  assert [stage.end for stage in stages.plan(typed(published, **uneven))] == [1, 2, 9, 10]
  with pytest.raises(UserError, match=r"config.train.steps is 3, but .* 4 stages"):
    stages.plan(typed(published, **uneven | {"train__steps": 3}))


def test_a_step_belongs_to_one_stage_and_a_checkpoint_to_the_stage_that_made_it():
  plan = stages.plan(typed(base.get_config(), train__steps=8))  # Ends at 4, 6, 7 and 8.
  going_on = [stages.going_on_at(plan, step).name[-1] for step in range(9)]
  assert "".join(going_on) == "111122344"
  assert "".join(stages.trained_last(plan, step).name[-1] for step in range(9)) == "111112234"


def test_each_stage_has_its_own_peak_warmup_and_cosine():
  config = typed(base.get_config(), train__steps=7500)  # Ends at 4000, 6200, 7400, 7500.
  peaks = {"stage1": 1e-4, "stage2": 1e-4, "stage3": 5e-5, "stage4": 1e-5}
  for stage in stages.plan(config):
    rate = stages.learning_rate(config, stage.name)
    values = np.asarray(rate(np.arange(stage.start, stage.end + 1)))
    assert values[0] > 0 and values[-1] == pytest.approx(0, abs=1e-12)
    assert values.max() == pytest.approx(peaks[stage.name])
    assert values.argmax() == stage.steps // 10
    assert (np.diff(values[: stage.steps // 10]) > 0).all()
    assert (np.diff(values[stage.steps // 10 :]) < 0).all()
  rate = stages.learning_rate(typed(base.get_config()), "stage2")
  assert float(rate(400_500)) == pytest.approx(501 / 1001 * 1e-4)  # Midway in the warm-up.


def test_positions_are_the_index_at_every_size_or_span_what_the_first_stage_did():
  for rule, extrapolated, interpolated in (
    ("sincos", "sincos", "sincos"), ("rope", "rope_index", "rope_scaled")
  ):  # fmt: skip
    published = base.get_config()
    published.model.positions = rule
    config = typed(published, train__growth="extrapolate")
    for name in config.stages:
      model = stages.stage_model(config, name)
      assert model.positions == extrapolated
      assert rule == "rope" or model.spatial_interpolation == 1.0
    config = typed(published, train__growth="interpolate")
    models = [stages.stage_model(config, name) for name in config.stages]
    assert {model.positions for model in models} == {interpolated}
    scales = [model.spatial_interpolation for model in models]
    assert scales == [1.0, 1.875, 3.0, 3.0]
    with published.unlocked():
      published.stages = {"stage2": published.stages.stage2}
    alone = typed(published)
    assert stages.stage_model(alone, "stage2") == alone.model


def test_grown_positions_are_those_of_the_published_rules():
  t, h, w = (axis.reshape(1, -1) for axis in np.indices((2, 30, 45)))
  coordinates = jnp.asarray(np.stack([t, h, w], axis=-1))
  grid = jnp.broadcast_to(jnp.array([2, 30, 45]), coordinates.shape)
  # The 5B at 480x720: its rule for the sample size gives the index itself.
  rope = positions.rotary_positions("rope", coordinates, grid, (30, 45))
  index = positions.rotary_positions("rope_index", coordinates, grid, (30, 45))
  np.testing.assert_array_equal(rope, index)
  # And for a sample size of 256x384, what interpolation makes of 480x720.
  rope = positions.rotary_positions("rope", coordinates, grid, (16, 24))
  scaled = positions.rotary_positions("rope_scaled", coordinates, grid, (0, 0), (1.875, 1.0))
  np.testing.assert_allclose(rope, scaled, atol=2e-6)
