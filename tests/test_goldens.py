"""Reference tensors of diffusers and transformers, through the public code, conversion included.

tests/data/goldens/README.md says what they are. Tolerances, in float32: networks 2e-5 when they are
fed the stored timestep sinusoid, whose own rounding takes 2e-4; the VAE 2e-5, or 4 times what the
reference's float32 differs from its float64; schedulers and tables 1e-5.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange, repeat
from flax import nnx
from safetensors.numpy import load_file

from cogvideox_jax.conversion import configs, diffusers
from cogvideox_jax.diffusion import guidance, noise, solvers
from cogvideox_jax.inference.denoising import row_layout
from cogvideox_jax.models import positions
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT, patchify, timestep_sinusoid, unpatchify
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.vae import VAE, decode, encode
from cogvideox_jax.types import TEXT, VISION

FOLDER = Path(__file__).parent / "data" / "goldens"
INDEX = json.loads((FOLDER / "index.json").read_text())
CASES = INDEX["cases"]


def cases(kind: str, beginning: str = "") -> list[str]:
  names = [name for name, case in CASES.items() if case["kind"] == kind]
  return [name for name in names if name.startswith(beginning)]


def tensors(case: str) -> dict[str, jax.Array | np.ndarray]:
  """Of a case; float64 ones stay on the host."""
  stored = load_file(FOLDER / CASES[case]["file"])
  return {k: x if x.dtype == np.float64 else jnp.asarray(x) for k, x in stored.items()}


@functools.cache
def loaded(load, model: str):
  return load(FOLDER / INDEX["models"][model]["dir"])


def close(actual, expected, atol: float):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_every_reference_model_counts_as_many_parameters():
  loads = {
    "CogVideoXTransformer3DModel": diffusers.load_transformer,
    "AutoencoderKLCogVideoX": diffusers.load_vae,
    "T5EncoderModel": diffusers.load_text_encoder,
  }
  for name, model in INDEX["models"].items():
    _, params = loaded(loads[model["class"]], name)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == model["num_params"], name


@pytest.mark.parametrize("case", cases("t5"))
def test_text_encoder(case):
  config, params = loaded(diffusers.load_text_encoder, CASES[case]["model"])
  model = nnx.merge(graph_of(T5Encoder, config), params)
  stored = tensors(case)
  close(model(stored["in.input_ids"]), stored["out.no_mask"], 2e-5)


@functools.cache
def vae(model: str) -> VAE:
  config, params = loaded(diffusers.load_vae, model)
  return nnx.merge(graph_of(VAE, config), params)


def vae_tolerance(case: str, tensor: str) -> float:
  return max(2e-5, 4 * CASES[case]["noise_floor"][tensor])


@pytest.mark.parametrize("case", cases("vae_encode"))
def test_vae_encode(case):
  stored = tensors(case)
  frames = rearrange(stored["in.sample"], "b c F H W -> b F H W c")
  for ours, name in zip(encode(vae(CASES[case]["model"]), frames), ("mean", "logvar"), strict=True):
    expected = rearrange(stored[f"out.{name}"], "b c f h w -> b f h w c")
    close(ours, expected, vae_tolerance(case, "out.moments"))


@pytest.mark.parametrize("case", cases("vae_decode"))
def test_vae_decode(case):
  stored = tensors(case)
  z = rearrange(stored["in.z"], "b c f h w -> b f h w c")
  frames = decode(vae(CASES[case]["model"]), z)
  expected = rearrange(stored["out.sample"], "b c F H W -> b F H W c")
  close(frames, expected, vae_tolerance(case, "out.sample"))


@pytest.mark.parametrize("case", cases("transformer"))
def test_transformer(case):
  config, params = loaded(diffusers.load_transformer, CASES[case]["model"])
  stored = tensors(case)
  latents = rearrange(stored["in.hidden_states"], "b f c h w -> b f h w c")
  text = stored["in.encoder_hidden_states"]
  rows, length = text.shape[:2]
  layout = row_layout(latents.shape[1:], length, config.patch)
  grid = tuple(layout.grids[0, 1].tolist())
  coordinates = layout.coordinates
  if config.positions != "sincos" and "in.rope_cos" not in stored:
    # The reference was given no rotation, as if all patches stood where there is none.
    config = dataclasses.replace(config, positions="rope_index")
    coordinates = np.where(layout.experts[..., None] == TEXT, coordinates, 0)
  vision = jnp.stack([patchify(clip, config.patch) for clip in latents])
  run = jax.jit(nnx.merge(graph_of(DiT, config), params).__call__, static_argnames="attention")
  for time, tolerance in [
    (stored["aux.time_proj"], 2e-5),
    (timestep_sinusoid(stored["in.timestep"], config.width), 2e-4),
  ]:
    v = run(
      jnp.pad(vision, ((0, 0), (length, 0), (0, 0))),
      text[:, None],
      repeat(time, "b d -> b s d", s=2),
      *(repeat(x, "1 ... -> b ...", b=rows) for x in (layout.segment_ids, layout.experts)),
      *(repeat(x, "1 ... -> b ...", b=rows) for x in (coordinates, layout.grids)),
      attention=attention,
    )
    v = [unpatchify(clip, config.patch, grid) for clip in v[:, length:]]
    close(jnp.stack(v), rearrange(stored["out.sample"], "b f c h w -> b f h w c"), tolerance)


@pytest.mark.parametrize("case", cases("table", "rope_tables"))
def test_rotary_tables(case):
  """At real sizes. The reference stores its separable tables axis by axis, each angle twice."""
  call, stored = CASES[case]["call"], tensors(case)
  head_dim, entries = call["head_dim"], CASES[case]["values"]["rope"]
  size = max(max(entry["grid"]) for entry in entries)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def tables(rule, base, coordinates, grids):
    where = positions.rotary_positions(rule, coordinates, grids, base)
    return positions.rotary_table(where, jnp.full(where.shape[:2], VISION), head_dim)

  edges = np.zeros((3, size, 3), np.int32)  # Along t at h = w = 0, along h, along w.
  for axis in range(3):
    edges[axis, :, axis] = np.arange(size)
  for entry in entries:
    key, grid = entry["key"], entry["grid"]
    published = key.startswith("tab.rope10")
    rule, base = ("rope", call["base10"]) if published else ("rope_index", call["base15"])
    grids = np.broadcast_to(np.array(grid, np.int32), edges.shape)
    ends = np.cumsum([head_dim // 8, head_dim // 16 * 3])
    ours = tables(rule, tuple(base), edges, grids)
    for name, table in zip(("cos", "sin"), ours, strict=True):
      for axis, part in enumerate(np.split(np.asarray(table), ends, axis=-1)):
        pairs = np.repeat(part[axis, : grid[axis]], 2, axis=-1)
        close(pairs, stored[f"{key}.{name}_{'thw'[axis]}"], 1e-5)


def schedule_of(case: str) -> noise.NoiseSchedule:
  return noise.noise_schedule(configs.read_noise(CASES[case]["call"], case))


@pytest.mark.parametrize("case", cases("scheduler", "ddim"))
def test_ddim(case):
  """Along the trajectory of a fixed function that stands for a network."""
  stored = tensors(case)
  solver = solvers.ddim(schedule_of(case), CASES[case]["call"]["num_inference_steps"])
  np.testing.assert_array_equal(solver.timesteps, stored["in.timesteps"])
  close(solver.weights.x_to_x0**2, stored["tab.coef"][:, 0], 1e-5)
  close(solver.weights.x, stored["tab.coef"][:, 2], 1e-5)
  close(solver.weights.x0, stored["tab.coef"][:, 3], 1e-5)
  x = x0 = stored["in.start"]
  for step, timestep in enumerate(solver.timesteps.tolist()):
    v = 0.8 * jnp.sin(1.3 * x + 0.002 * timestep) + 0.3 * x * math.cos(timestep / 300)
    weights = solvers.Weights(*(column[step] for column in solver.weights))
    x, x0 = solvers.solver_step(weights, x, v, x0, jnp.zeros_like(x))
    close(x, stored["out.prev_sample"][step], 1e-5)
    close(x0, stored["out.pred_x0"][step], 1e-5)


@pytest.mark.parametrize("case", cases("table", "sched_tables"))
def test_noise_schedule(case):
  stored = tensors(case)
  schedule = schedule_of(case)
  close(schedule.alphas_cumprod, stored["tab.alphas_cumprod"], 1e-12)
  alpha = schedule.alpha(stored["in.timesteps"])[:, None, None, None, None]
  x0, drawn = stored["in.original"], stored["in.noise"]
  close(noise.add_noise(x0, drawn, alpha), stored["out.add_noise"], 1e-5)
  close(noise.velocity(x0, drawn, alpha), stored["out.velocity"], 1e-5)


@pytest.mark.parametrize("case", cases("table", "timesteps_and_dynamic_cfg"))
def test_timesteps_and_dynamic_guidance(case):
  scale = CASES[case]["call"]["guidance_scale"]
  for name, expected in tensors(case).items():
    _, table, steps = name.split(".")
    ours = solvers.trailing_timesteps(int(steps), 1000)
    if table == "dynamic_cfg":
      ours = guidance.dynamic_scales(scale, ours, int(steps))
    close(ours, expected, 1e-5)
