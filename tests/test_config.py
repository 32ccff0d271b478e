"""What a config may say: every mistake is named before any work."""

import math

import pytest
from ml_collections import ConfigDict
from typed_config import typed

from cogvideox_jax.config import checks
from cogvideox_jax.conversion import component_fields, diffusers
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.vae_config import VAEConfig
from configs import base, tiny, tiny_i2v, tiny_stages


def check(config: ConfigDict, model: str = "") -> None:
  checks.check(typed(config), model)


def changed(key: str, value) -> ConfigDict:
  config = tiny.get_config()
  with config.ignore_type():
    config.update_from_flattened_dict({key: value})
  return config


@pytest.mark.parametrize(
  "config", [base.get_config(), tiny.get_config(), tiny_i2v.get_config(), tiny_stages.get_config()]
)
def test_our_own_configs_pass(config):
  check(config)


@pytest.mark.parametrize(
  ("key", "value", "wanted"),
  [
    ("dtype", "float16", "bfloat16"),
    ("model.positions", "learned", "rope"),
    ("text.drop", "none", "zeros, empty"),
    ("text.drop_rate", 1.5, "from 0 to 1"),
    ("optimizer.b1", -0.1, "from 0 to 1"),
    ("optimizer.ema_decay", math.nan, "from 0 to 1"),
    ("optimizer.learning_rate", 0.0, "above 0"),
    ("optimizer.learning_rate", math.inf, "above 0"),
    ("train.steps", 0, "above 0"),
    ("log_every", 0, "above 0"),
    ("data.fps", -8.0, "above 0"),
    ("data.clips", -1, "at least 0"),
    ("preview.every", -1, "at least 0"),
    ("stages.tiny.rows", 0, "above 0"),
    ("stages.tiny.share", 0, "above 0"),
    ("stages.tiny.learning_rate", -1e-4, "at least 0"),
    ("stages.tiny.best", 0.0, "above 0"),
    ("stages.tiny.best", 1.5, "above 0 and at most 1"),
    ("stages.tiny.data", "stage1", "there is none"),
    ("train.growth", "stretch", "extrapolate, interpolate"),
    ("stages.tiny.durations", (1, 0), "above 0"),
    ("stages.tiny.durations", (1, 12), "12"),
    ("stages.tiny.durations", (), "(1, 9, 17)"),
    ("stages.tiny.durations", (1, 9.5), "(1, 9, 17)"),
    ("stages.tiny.sizes", (64, 64), "(64, 64)"),
    ("stages.tiny.sizes", ((64, 63),), "63"),
    ("preview.num_frames", 16, "16"),
    ("preview.width", 63, "63"),
    ("image.scale", "half", "scaled, raw, diffusers"),
    ("image.drop_rate", 1.5, "from 0 to 1"),
    ("image.draws", 0, "above 0"),
    ("image.log_sigma_mean", math.nan, "finite"),
    ("model.in_channels", 24, "16, or for a model that sees an image twice that, 32"),
    ("preview.images", ("a.png",), "must name 0"),
    ("model.in_channels", 32, "must name 2: one for each"),
    ("mesh.data", 0, "at least 1"),
    ("mesh.tensor", -1, "only one"),
  ],
)
def test_a_value_out_of_range_is_named(key, value, wanted):
  with pytest.raises(UserError) as caught:
    check(changed(key, value))
  message = str(caught.value)
  assert "config." + key.split(".")[0] in message
  assert wanted in message
  assert len(message.splitlines()) <= 8


def test_a_config_without_stages_is_refused():
  config = tiny.get_config()
  with config.unlocked():
    config.stages = ConfigDict()
  with pytest.raises(UserError, match=r"config\.stages"):
    check(config)


@pytest.mark.parametrize(
  ("key", "value", "wanted"),
  [
    ("stages.stage4.data", "stage9", "that has some: stage1, stage2, stage3"),
    ("stages.stage4.data", "stage4", "that has some: stage1, stage2, stage3"),
    ("stages.stage4.data", "stage2", "sizes are"),
    ("stages.stage4.durations", (1, 9), "config.stages.stage4.durations is (1, 9), but it reads"),
  ],
)
def test_a_stage_reads_the_clips_of_a_stage_that_has_such(key, value, wanted):
  config = tiny_stages.get_config()
  check(config)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as caught:
    check(config)
  assert wanted in str(caught.value)


def test_sizes_must_suit_the_vae_of_the_model(tmp_path):
  vae = VAEConfig(
    channels=(8, 8, 8), groups=4, scaling_factor=1.0
  )  # Compresses by 4; patches by 2.
  (tmp_path / "vae").mkdir()
  diffusers.write_fields(tmp_path / "vae", "config.json", component_fields.write_vae(vae))
  check(changed("stages.tiny.sizes", ((40, 56),)), str(tmp_path))
  with pytest.raises(UserError, match=r"config\.stages\.tiny.*44"):
    check(changed("stages.tiny.sizes", ((44, 56),)), str(tmp_path))


def with_learned_positions() -> ConfigDict:
  """The tiny config for clips of the sample size only: 17 frames, 8x8 latents."""
  config = changed("model.learned_positions", True)
  config.stages.tiny.update(sizes=((32, 32),), durations=(17,))
  return config


@pytest.mark.parametrize(
  ("key", "value", "wanted"),
  [
    ("stages.tiny.durations", (9, 17), "fix them to 17 frames of 32x32"),
    ("stages.tiny.sizes", ((32, 40),), "fix them to 17 frames of 32x32"),
    ("preview.num_frames", 9, "config.preview"),
    ("model.patch", (2, 2, 2), "config.model.patch of 1 in time"),
  ],
)
def test_learned_positions_allow_their_size_alone(key, value, wanted):
  config = with_learned_positions()
  check(config, "tiny")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=wanted):
    check(config, "tiny")


def test_sizes_are_not_checked_where_no_preview_is_made():
  config = changed("preview.num_frames", 16)
  config.preview.every = 0
  check(config)


def mixed(path, sources) -> ConfigDict:
  config = changed("data.path", path)
  with config.unlocked():
    for name, source in sources.items():
      config.data.mixture[name] = base.source(*source)
  return config


def test_a_mixture_may_leave_a_dataset_out_for_a_while():
  check(mixed("", {"a": ("x", 1), "b": ("y", 0)}))


@pytest.mark.parametrize(
  ("path", "sources", "wanted"),
  [
    ("z", {"a": ("x", 1)}, "config.data.path and config.data.mixture are both given"),
    ("", {"a": ("x", 0), "b": ("y", 0)}, "no dataset has a weight above 0"),
    ("", {"a": ("", 1)}, "config.data.mixture.a must have a path and a weight"),
    ("", {"a": ("x", -1)}, "config.data.mixture.a.weight is -1.0; it must be at least 0"),
  ],
)
def test_a_mixture_that_names_nothing_to_train_on_is_refused(path, sources, wanted):
  with pytest.raises(UserError) as caught:
    check(mixed(path, sources))
  assert wanted in str(caught.value)


def test_a_model_that_sees_an_image_gets_no_clip_that_is_this_image():
  config = tiny_i2v.get_config()
  checks.check(typed(config), "")
  with pytest.raises(UserError, match=r"stages\.tiny\.durations is \(1, 9\), .*\n.*Leave 1 out"):
    checks.check(typed(config, stages__tiny__durations=(1, 9)), "")
