"""Gradients against torch's, and bfloat16 against float32, on the reference's small models."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from einops import rearrange
from flax import nnx
from goldens.folder import Folder
from goldens.networks import channels_last, run_transformer

from cogvideox_jax.conversion import names, tensors
from cogvideox_jax.models import vae
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.graphs import graph_of

FOLDER = Folder(Path(__file__).parent / "data" / "goldens")
KINDS = ("2b", "5b", "5b_i2v", "15", "15_i2v")


BUFFERS = {"patch_embed.pos_embedding"}  # The reference does not train it unless told to.


def relative(ours, theirs, least: float = 0.0) -> float:
  """The norm of the difference, divided by that of `theirs` or by `least`, whichever is larger."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), least))


def worst(grads, rows, shapes, reference: torch.nn.Module) -> tuple[float, str]:
  """The largest relative difference over all parameters, and its name.

  Some gradients are zero but for rounding, such as that of the keys' bias where nothing rotates the
  keys. So no difference is divided by less than a thousandth of the median gradient.
  """
  theirs = {name: x.grad.numpy() for name, x in reference.named_parameters()}
  ours = dict(tensors.AsFile(grads, rows, shapes))
  assert ours.keys() - BUFFERS == theirs.keys()
  least = 1e-3 * float(np.median([np.linalg.norm(x) for x in theirs.values()]))
  return max((relative(ours[name], x, least), name) for name, x in theirs.items())


def torch_inputs(stored):
  inputs = {
    name: torch.from_numpy(stored[f"in.{name}"])
    for name in ("hidden_states", "encoder_hidden_states", "timestep", "ofs")
    if f"in.{name}" in stored
  }
  if "in.rope_cos" in stored:
    tables = stored["in.rope_cos"], stored["in.rope_sin"]
    inputs["image_rotary_emb"] = tuple(map(torch.from_numpy, tables))
  return inputs


@pytest.mark.parametrize(
  "kind",
  [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("5b", "15"))) for kind in KINDS],
)  # Their image-to-video models hold all that these do.
def test_gradients_of_the_transformer(kind):
  name = f"transformer_{kind}"
  config, params = FOLDER.model(name)
  stored = FOLDER.case(f"{name}_default").stored
  weight = np.random.default_rng(0).normal(size=stored["out.sample"].shape).astype(np.float32)

  path = FOLDER.path / FOLDER.index["models"][name]["dir"]
  reference = CogVideoXTransformer3DModel.from_pretrained(path)
  out = reference(**torch_inputs(stored), return_dict=False)[0]
  (out * torch.from_numpy(weight)).sum().backward()

  def loss(params):
    out = run_transformer(config, params, stored, stored["aux.time_proj"])
    return (out * weight).sum()

  grads = jax.grad(loss)(jax.tree.map(jnp.asarray, params))
  shapes = tensors.abstract_params(DiT, config)
  error, where = worst(grads, names.transformer(config), shapes, reference)
  assert error < 1e-4, where


@pytest.mark.parametrize("case", ["f1", pytest.param("f17", marks=pytest.mark.slow)])
def test_gradients_of_the_vae(case):
  config, params = FOLDER.model("vae")
  frames = FOLDER.case(f"vae_encode_{case}").stored["in.sample"]
  weight = np.random.default_rng(0).normal(size=frames.shape).astype(np.float32)

  path = FOLDER.path / FOLDER.index["models"]["vae"]["dir"]
  reference = AutoencoderKLCogVideoX.from_pretrained(path)
  restored = reference.decode(reference.encode(torch.from_numpy(frames)).latent_dist.mean).sample
  (restored * torch.from_numpy(weight)).sum().backward()

  graph = graph_of(vae.VAE, config)

  def loss(params):
    model = nnx.merge(graph, params)
    mean, _ = vae.encode(model, jnp.asarray(channels_last(frames)))
    return (vae.decode(model, mean) * channels_last(weight)).sum()

  grads = jax.grad(loss)(jax.tree.map(jnp.asarray, params))
  # The log-variances are not in this loss.
  half = config.latent_channels
  for parameter in (reference.encoder.conv_out.conv.weight, reference.encoder.conv_out.conv.bias):
    assert not parameter.grad[half:].any()
  shapes = tensors.abstract_params(vae.VAE, config)
  error, where = worst(grads, names.vae(config), shapes, reference)
  assert error < 1e-4, where


@pytest.mark.parametrize(
  "kind",
  [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("5b", "15"))) for kind in KINDS],
)  # As above.
def test_the_transformer_in_bfloat16_is_near_its_float32(kind):
  config, params = FOLDER.model(f"transformer_{kind}")
  stored = FOLDER.case(f"transformer_{kind}_default").stored
  time = stored["aux.time_proj"]
  half = run_transformer(config, params, stored, time, dtype=jnp.bfloat16)
  assert 0 < relative(half, stored["out.sample"]) < 3e-2


@pytest.mark.slow
def test_the_vae_in_bfloat16_is_near_its_float32():
  config, params = FOLDER.model("vae")
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  model = nnx.merge(graph_of(vae.VAE, config), params)
  stored = FOLDER.case("vae_decode_z5").stored
  z = jnp.asarray(channels_last(stored["in.z"]), jnp.bfloat16)
  frames = rearrange(vae.decode(model, z), "b F H W c -> b c F H W")
  assert 0 < relative(frames, stored["out.sample"]) < 3e-2
