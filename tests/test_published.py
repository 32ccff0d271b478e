"""The published models: their configs make networks of their sizes."""

import importlib
import math

import jax
import pytest
from typed_config import typed

from cogvideox_jax.config import checks
from cogvideox_jax.conversion import component_fields, tensors
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.t5 import T5Config, T5Encoder
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_config import VAEConfig

PUBLISHED = {
  "2b": 1_693_783_872,
  "5b": 5_570_283_072,
  "5b_i2v": 5_625_087_552,
  "1_5_5b": 5_570_676_352,
  "1_5_5b_i2v": 5_571_594_880,
}


def count(model, config) -> int:
  shapes = jax.tree.leaves(tensors.abstract_params(model, config))
  return sum(math.prod(leaf.shape) for leaf in shapes)


def config_of(name: str):
  return typed(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_published_transformer_has_as_many_parameters(name, parameters):
  config = config_of(name)
  checks.check(config, "")
  assert count(DiT, config.model) == parameters


def test_the_vae_and_the_text_encoder_have_as_many_parameters():
  assert count(VAE, VAEConfig()) == 215_583_907
  assert count(T5Encoder, T5Config()) == 4_762_310_656


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("2b", {"num_layers": 30, "use_rotary_positional_embeddings": False, "patch_size_t": None}),
    ("5b", {"num_attention_heads": 48, "use_rotary_positional_embeddings": True}),
    ("5b_i2v", {"in_channels": 32, "use_learned_positional_embeddings": True}),
    ("1_5_5b", {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": None}),
    ("1_5_5b_i2v", {"in_channels": 32, "ofs_embed_dim": 512, "sample_frames": 81}),
  ],
)
def test_a_config_is_written_as_the_published_file_has_it(name, fields):
  config = config_of(name).model
  written = component_fields.write_transformer(config)
  assert fields.items() <= written.items()
  assert "position_rule" not in written  # diffusers' own fields say it.
  assert component_fields.read_transformer(written, "") == config
