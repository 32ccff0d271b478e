"""Our transformer and diffusers' with the same weights and inputs, as programs to be timed."""

import math
import tempfile
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from einops import rearrange
from turns import TORCH_DEVICE, Run, check_agreement, synchronize

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.conversion.tensors import abstract_params
from cogvideox_jax.data.packing import pack, patchify, stack
from cogvideox_jax.diffusion.latents import LatentConfig
from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule
from cogvideox_jax.diffusion.objective import Objective
from cogvideox_jax.models.backends import attention_for
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.training import state, step
from cogvideox_jax.types import Batch, Example, Params

HEAD_DIM, TEXT_LENGTH, PATCH, CHANNELS = 64, 226, (1, 2, 2), 16
TIMESTEP = 500


class Case(NamedTuple):
  """The sizes of a run: clips and a transformer like those of the published 5B."""

  tokens: int  # The most tokens of a clip and its text.
  depth: int
  heads: int
  text_width: int
  batch: int  # Clips.
  dtype: str

  @property
  def grid(self) -> tuple[int, int, int]:
    """Patches (t, h, w) of the clip with the most tokens; among equals the longest, near 3:2."""
    most = self.tokens - TEXT_LENGTH
    sizes = [
      (t, h, w)
      for t in range(1, 14)
      for h in range(2, math.isqrt(most) + 1)
      for w in range(h, 2 * h + 1)
      if t * h * w <= most
    ]
    return max(sizes, key=lambda size: (math.prod(size), size[0], -abs(size[2] / size[1] - 1.5)))

  @property
  def row_tokens(self) -> int:
    return TEXT_LENGTH + math.prod(self.grid)

  @property
  def config(self) -> DiTConfig:
    t, h, w = self.grid
    return DiTConfig(
      depth=self.depth,
      heads=self.heads,
      head_dim=HEAD_DIM,
      time_width=512,
      in_channels=CHANNELS,
      out_channels=CHANNELS,
      patch=PATCH,
      text_width=self.text_width,
      text_length=TEXT_LENGTH,
      positions="rope",
      sample_frames=4 * t - 3,
      sample_height=2 * h,
      sample_width=2 * w,
      spatial_interpolation=1.875,
      temporal_interpolation=1.0,
    )

  @property
  def forward_flops(self) -> float:
    """FLOPs of the blocks' matrix products and of both of attention; the rest is negligible."""
    n, d = self.row_tokens, self.config.width
    return float(self.batch * self.depth * (24 * n * d**2 + 4 * n**2 * d))


class Inputs(NamedTuple):
  """The inputs of both transformers."""

  latents: np.ndarray  # b f h w c
  text: np.ndarray  # b l t
  weight: np.ndarray  # b f h w c; the loss is the sum of weight times output.


def draw_inputs(case: Case) -> Inputs:
  rng = np.random.default_rng(1)
  t, h, w = case.grid
  shape = (case.batch, t, PATCH[1] * h, PATCH[2] * w, CHANNELS)
  text = rng.standard_normal((case.batch, TEXT_LENGTH, case.text_width), np.float32)
  latents, weight = rng.standard_normal((2, *shape), np.float32)
  return Inputs(latents, text, weight)


def draw_params(network: type, config: Any) -> Params:
  """Draws weights, none of them zero, so that every path of the model affects the output."""
  rng = np.random.default_rng(0)

  def leaf(path, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return np.float32(centre) + np.float32(0.02) * rng.standard_normal(shape.shape, np.float32)

  return jax.tree.map_with_path(leaf, abstract_params(network, config))


def our_programs(case: Case, inputs: Inputs, params: Params) -> dict[str, Run]:
  """Compiles `forward`, and `backward`: a forward pass, then the gradients of all parameters."""
  network = _network(case)
  params = jax.tree.map(lambda x: jnp.asarray(x, case.dtype), params)
  batch = _batch_of(case, inputs)
  weight = np.pad(_patches(inputs.weight), ((0, 0), (TEXT_LENGTH, 0), (0, 0)))
  timesteps = jnp.full(batch.grids.shape[:2], TIMESTEP)

  def forward(params, batch):
    return step.denoiser(network, params, batch)(batch.mean, timesteps)

  def loss(params, batch, weight):
    return (forward(params, batch).astype(jnp.float32) * weight).sum()

  forward_run = jax.jit(forward).lower(params, batch).compile()
  backward_run = jax.jit(jax.grad(loss)).lower(params, batch, weight).compile()
  weight = jnp.asarray(weight)
  return {
    "forward": lambda: jax.block_until_ready(forward_run(params, batch)),
    "backward": lambda: jax.block_until_ready(backward_run(params, batch, weight)),
  }


def train_program(case: Case, inputs: Inputs, params: Params) -> Run:
  """The whole training step, on fp32 masters. Each run continues from the state of the last."""
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b2=0.95))
  updates = state.Updates(tx, ema_decay=0.9999)
  train_step = partial(
    step.train_step,
    network=_network(case),
    updates=updates,
    learning_rate=optax.constant_schedule(1e-4),
    objective=Objective(
      noise_schedule(NoiseConfig(1000, 0.00085, 0.012, 1.0, zero_terminal_snr=True)),
      LatentConfig(PATCH, scaling_factor=0.7, image_scale=0.7, image_drop_rate=0.0),
      explicit_uniform=True,
      weighting="clips",
    ),
    accumulation=step.Accumulation(
      split=lambda tree: jax.tree.map(lambda x: x[None], tree), pin=lambda grads: grads
    ),
  )
  begun = jax.jit(updates.begin)(params)
  batch, key = _batch_of(case, inputs), jax.random.key(0)
  compiled = jax.jit(train_step, donate_argnums=0).lower(begun, batch, key).compile()

  def run() -> None:
    nonlocal begun
    begun, _ = jax.block_until_ready(compiled(begun, batch, key))

  return run


def hand_over(case: Case, params: Params) -> CogVideoXTransformer3DModel:
  """Builds the reference with our weights, through the files that our conversion writes."""
  with tempfile.TemporaryDirectory() as folder:
    diffusers.save_transformer(folder, case.config, params)
    model = CogVideoXTransformer3DModel.from_pretrained(
      folder, torch_dtype=getattr(torch, case.dtype), low_cpu_mem_usage=False
    )
  torch.nn.Module.to(model, TORCH_DEVICE)  # In place; the type of diffusers' own `to` is lost.
  return model.eval()


def torch_programs(
  case: Case, inputs: Inputs, model: CogVideoXTransformer3DModel, *, compiled: bool = False
) -> dict[str, Run]:
  """The reference's `forward` and `backward`, eager or through torch.compile."""
  t, h, w = case.grid
  rotary = get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), (h, w)), (h, w), t, device=TORCH_DEVICE)
  latents, weight = (
    _place(case, rearrange(x, "b f h w c -> b f c h w")) for x in (inputs.latents, inputs.weight)
  )
  text = _place(case, inputs.text)
  timestep = torch.full((case.batch,), TIMESTEP, device=TORCH_DEVICE)
  network = torch.compile(model) if compiled else model

  def output() -> torch.Tensor:
    return network(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)[0]

  def forward() -> torch.Tensor:
    with torch.no_grad():
      out = output()
    synchronize()
    return out

  def backward() -> None:
    model.zero_grad(set_to_none=True)
    (output().float() * weight).sum().backward()
    synchronize()

  return {"forward": forward, "backward": backward}


def check_outputs(case: Case, ours: jax.Array, theirs: torch.Tensor) -> float:
  """Compares the predictions at vision tokens, as `turns.check_agreement` does."""
  expected = _patches(rearrange(theirs.float().cpu().numpy(), "b f c h w -> b f h w c"))
  return check_agreement(expected, np.asarray(ours, np.float32)[:, TEXT_LENGTH:], case.dtype)


def matmul_programs(side: int, dtype: str) -> dict[str, Run]:
  """The product of two square matrices, in JAX and in PyTorch."""
  x = np.random.default_rng(2).standard_normal((side, side), np.float32)
  ours, product = jnp.asarray(x, dtype), jax.jit(jnp.matmul)
  theirs = torch.from_numpy(x).to(TORCH_DEVICE, getattr(torch, dtype))

  def torch_product() -> None:
    torch.mm(theirs, theirs)
    synchronize()

  return {
    "matmul": lambda: jax.block_until_ready(product(ours, ours)),
    "torch_matmul": torch_product,
  }


def _network(case: Case) -> step.Network:
  graph = graph_of(DiT, case.config, dtype=jnp.dtype(case.dtype))
  return step.Network(graph, case.config.width, attention_for(jax.devices()[0]))


def _batch_of(case: Case, inputs: Inputs) -> Batch:
  """Packs one clip into each row, as the loader does; the posteriors have no variance."""
  rows = [
    pack(
      [Example(latents, np.full_like(latents, -30), text, "", "", 0, 0, 0, 8.0)],
      patch=PATCH,
      row_tokens=case.row_tokens,
      max_clips=1,
    )
    for latents, text in zip(inputs.latents, inputs.text, strict=True)
  ]
  return jax.tree.map(jnp.asarray, stack(rows))


def _patches(clips: np.ndarray) -> np.ndarray:
  return np.stack([patchify(clip, PATCH) for clip in clips])


def _place(case: Case, array: np.ndarray) -> torch.Tensor:
  array = np.ascontiguousarray(array)
  return torch.from_numpy(array).to(TORCH_DEVICE, getattr(torch, case.dtype))
