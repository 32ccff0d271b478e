"""The networks alone: transformer, with and without LoRA files, VAE, text encoder."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from cogvideox_jax.conversion import lora, tensors
from cogvideox_jax.inference.packed_rows import clip_layout
from cogvideox_jax.models import vae
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT, patchify, timestep_sinusoid, unpatchify
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.position_encoding import rotation
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.tiling import Side, Tiling
from cogvideox_jax.types import TEXT

from .compared import EXACT, NETWORK, SINUSOID, Compared
from .folder import Case, CaseError, Stored

# How a case of LoRA files applies one -> our weight of the adapter.
LORA_WEIGHTS = {"scale1": 1.0, "kwscale0.5": 0.5, "adapterweight2": 2.0, "fused1": 1.0}


def channels_last(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, 1, -1)


def channels_first(x: Any) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, 1)


def text_encoder(case: Case) -> Iterator[Compared]:
  config, params = case.model()
  model = nnx.merge(graph_of(T5Encoder, config), params)
  ids = jnp.asarray(case.stored["in.input_ids"])
  yield Compared("out.no_mask", model(ids), NETWORK)
  if "out.masked" in case.stored:
    mask = jnp.asarray(case.stored["in.attention_mask"])
    yield Compared("out.masked", model(ids, mask), NETWORK)


def vae_encode(case: Case) -> Iterator[Compared]:
  model, tiling, tolerance = _vae(case)
  stored = case.stored
  frames = jnp.asarray(channels_last(stored["in.sample"]))
  mean, logvar = vae.encode(model, frames, tiling=tiling)
  ours = {"mean": mean, "logvar": logvar, "std": jnp.exp(logvar / 2)}
  ours["moments"] = jnp.concatenate([mean, logvar], axis=-1)
  if "rng.eps" in stored:
    eps = jnp.asarray(channels_last(stored["rng.eps"]))
    ours["z"] = vae.sample_posterior(mean, logvar, eps)
  for name, array in ours.items():
    if f"out.{name}" in stored:
      yield Compared(f"out.{name}", channels_first(array), tolerance(f"out.{name}"))


def vae_decode(case: Case) -> Iterator[Compared]:
  model, tiling, tolerance = _vae(case)
  z = jnp.asarray(channels_last(case.stored["in.z"]))
  frames = vae.decode(model, z, tiling=tiling)
  yield Compared("out.sample", channels_first(frames), tolerance("out.sample"))


def _vae(case: Case) -> tuple[vae.VAE, Tiling | None, Callable[[str], float]]:
  """The model, how its videos are tiled, and the tolerance of a tensor."""
  config, params = case.model()
  call, tiling = case.call, None
  if call.get("tiling"):
    height, width = (
      Side(
        call[f"tile_sample_min_{side}"],
        call[f"tile_latent_min_{side}"],
        call[f"tile_overlap_factor_{side}"],
      )
      for side in ("height", "width")
    )
    tiling = Tiling(height, width)
    if tiling != config.tiling:
      raise CaseError(f"the reference tiles as {tiling}, the model's config says {config.tiling}")
  floors = case.entry["noise_floor"]
  model = nnx.merge(graph_of(vae.VAE, config), params)
  return model, tiling, lambda key: max(NETWORK, 4 * floors.get(key, max(floors.values())))


def transformer(case: Case) -> Iterator[Compared]:
  config, params = case.model()
  stored = case.stored
  own = timestep_sinusoid(jnp.asarray(stored["in.timestep"]), config.width)
  yield Compared("aux.time_proj", own, SINUSOID)
  if "in.rope_cos" in stored:
    yield from _rotary_inputs(config, stored)
  given = run_transformer(config, params, stored, stored["aux.time_proj"])
  yield Compared("out.sample", given, NETWORK)
  yield Compared("out.sample with our sinusoid", run_transformer(config, params, stored, own), 2e-4)


def run_transformer(
  config, params, stored: Stored, time: Any, dtype: Any = jnp.float32
) -> jax.Array:
  """The network on a case's inputs, laid out as the reference's output.

  time: [B,D] the sinusoid of the timestep.
  """
  latents = jnp.asarray(rearrange(stored["in.hidden_states"], "b f c h w -> b f h w c"))
  text = jnp.asarray(stored["in.encoder_hidden_states"])
  rows, length = text.shape[:2]
  layout = clip_layout(latents.shape[1:], length, config.patch)
  grid = tuple(layout.grids[0, 1].tolist())
  if config.positions != "sincos" and "in.rope_cos" not in stored:
    # The reference was given no rotation, as if all patches stood where there is none.
    config = dataclasses.replace(config, positions="rope_index")
    nowhere = np.where(layout.experts[..., None] == TEXT, layout.coordinates, 0)
    layout = layout._replace(coordinates=nowhere)
  vision = jnp.stack([patchify(clip, config.patch) for clip in latents])
  model = nnx.merge(graph_of(DiT, config, dtype=dtype), params)
  v = jax.jit(model.__call__, static_argnames="attention")(
    jnp.pad(vision, ((0, 0), (length, 0), (0, 0))),
    text[:, None],
    repeat(jnp.asarray(time), "b d -> b s d", s=2),
    jax.tree.map(lambda x: repeat(jnp.asarray(x), "1 ... -> b ...", b=rows), layout),
    attention=attention,
    ofs=jnp.asarray(stored.get("in.ofs", [2.0])[0]),
  )
  clips = [unpatchify(clip, config.patch, grid) for clip in v[:, length:]]
  return rearrange(jnp.stack(clips), "b f h w c -> b f c h w")


def _rotary_inputs(config, stored: Stored) -> Iterator[Compared]:
  """The tables that the reference was given: ours are made inside the network."""
  _, frames, _, height, width = stored["in.hidden_states"].shape
  layout = jax.tree.map(jnp.asarray, clip_layout((frames, height, width), 0, config.patch))
  tables = rotation(config, layout)
  for name, table in zip(("cos", "sin"), tables, strict=True):
    yield Compared(f"in.rope_{name}", np.repeat(table[0], 2, axis=-1), EXACT)


def low_rank(case: Case) -> Iterator[Compared]:
  """out.FILE.HOW: with a LoRA file's updates, at the weight that HOW says; out.base: without."""
  config, params = case.model()
  stored = case.stored
  for key in sorted(stored):
    if not key.startswith("out."):
      continue
    changed = params
    if key != "out.base":
      file, how = key.removeprefix("out.").split(".", 1)
      updates = lora.read(case.folder.path / "lora" / f"{file}.safetensors")
      changed = tensors.materialize(lora.fuse(params, config, updates, LORA_WEIGHTS[how]))
    yield Compared(key, run_transformer(config, changed, stored, stored["aux.time_proj"]), NETWORK)
