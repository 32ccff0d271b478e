"""The compiler options of the steps, and that both steps are compiled with them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from small_run import make_config, make_inputs

from cogvideox_jax.inference import denoising
from cogvideox_jax.models.kernels import segment_attention
from cogvideox_jax.training import meshes, step_functions
from cogvideox_jax.xla import compiler_options


def test_tpus_multiply_whole_weights_and_others_get_no_options():
  for kind in segment_attention.BLOCK_SIZES:
    options = compiler_options(SimpleNamespace(platform="tpu", device_kind=kind))
    assert options["xla_tpu_enable_windowed_einsum_for_all_gather"] is False
    assert options["xla_tpu_enable_windowed_einsum_for_reduce_scatter"] is False
  assert compiler_options(jax.devices()[0]) == {}


def test_the_training_step_is_compiled_with_them(tmp_path, monkeypatch):
  config = make_config(make_inputs(epath.Path(tmp_path)))
  mesh, rules = meshes.make_mesh(config, "tiny")
  functions = step_functions.make_functions(config, "tiny", mesh, rules)
  batch = meshes.abstract_batch(config, "tiny", mesh, rules)
  key = jax.eval_shape(jax.random.key, 0)
  monkeypatch.setattr(
    step_functions, "compiler_options", lambda device: {"xla_no_such_option": True}
  )
  lowered = step_functions.jit_train(functions).lower(functions.abstract, batch, key)
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
    lowered.compile()


def test_the_sampling_step_is_compiled_with_them(monkeypatch):
  def step(latents, previous_x0, *, graphdef=None, config=None, step_sharding=None):
    return latents + 1, previous_x0 + 1

  monkeypatch.setattr(denoising, "compiler_options", lambda device: {"xla_no_such_option": True})
  monkeypatch.setattr(denoising, "denoise_step", step)
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
    denoising.jit_step(jax.devices()[0])(jnp.ones(2), jnp.ones(2))
