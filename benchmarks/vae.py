"""How fast the VAE encodes and decodes, beside diffusers' in PyTorch.

python benchmarks/vae.py --json
python benchmarks/vae.py --json --sizes 17x128x128 9x240x360

Both have the same random weights, passed through our conversion, the same inputs, number type,
chunks of frames and threads. The script checks that their outputs agree before it times anything.
The programs take turns, and each number is a median. Encoding computes the mean of the latents;
decoding starts from latents of the same number of frames. `ratios` are PyTorch's seconds over ours:
above 1, ours is faster. `memory` is the growth of a process while a program first runs, with
weights and inputs already in memory; for ours it includes compiling.
"""

import json
import os
import tempfile
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Leaves GPU memory for PyTorch.

import jax
import jax.numpy as jnp
import measure
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from einops import rearrange
from flax import nnx
from networks import draw_params
from turns import (
  TORCH_DEVICE,
  Run,
  check_agreement,
  compared,
  device_names,
  peak_memory,
  synchronize,
  time_in_turn,
)

from cogvideox_jax.conversion import diffusers
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae_config import VAEConfig

PROGRAMS = ("ours_encode", "torch_encode", "ours_decode", "torch_decode")


class Case(NamedTuple):
  """The sizes of a run: a video, and the VAE's channels at each level, finest first."""

  frames: int
  height: int
  width: int
  channels: tuple[int, ...]
  dtype: str

  @property
  def config(self) -> VAEConfig:
    return VAEConfig(channels=self.channels)


class Inputs(NamedTuple):
  video: np.ndarray  # 1 F H W 3
  latents: np.ndarray  # 1 f h w c


def draw_inputs(case: Case) -> Inputs:
  rng, config = np.random.default_rng(1), case.config
  video = (1, case.frames, case.height, case.width, config.in_channels)
  frames = -(-case.frames // config.temporal_compression)
  height, width = (side // config.spatial_compression for side in (case.height, case.width))
  latents = (1, frames, height, width, config.latent_channels)
  return Inputs(rng.uniform(-1, 1, video), rng.standard_normal(latents))


def make_programs(case: Case, names: tuple[str, ...] = PROGRAMS) -> dict[str, Run]:
  """The named programs of PROGRAMS. A library that none of them needs is not used."""
  inputs, params, made = draw_inputs(case), draw_params(vae.VAE, case.config), {}
  if any(name.startswith("ours") for name in names):
    made |= _our_programs(case, inputs, params)
  if any(name.startswith("torch") for name in names):
    made |= _torch_programs(case, inputs, params)
  return {name: made[name] for name in names}


def _our_programs(case: Case, inputs: Inputs, params: Any) -> dict[str, Run]:
  params = jax.tree.map(lambda x: jnp.asarray(x, case.dtype), params)
  model = nnx.merge(graph_of(vae.VAE, case.config), params)
  video, latents = (jnp.asarray(x, case.dtype) for x in inputs)
  return {
    "ours_encode": lambda: jax.block_until_ready(vae.encode(model, video)[0]),
    "ours_decode": lambda: jax.block_until_ready(vae.decode(model, latents)),
  }


def _torch_programs(case: Case, inputs: Inputs, params: Any) -> dict[str, Run]:
  dtype = getattr(torch, case.dtype)
  with tempfile.TemporaryDirectory() as folder:
    diffusers.save_vae(folder, case.config, params)
    model = AutoencoderKLCogVideoX.from_pretrained(
      folder, torch_dtype=dtype, low_cpu_mem_usage=False
    )
  torch.nn.Module.to(model, TORCH_DEVICE)  # In place; the type of diffusers' own `to` is lost.
  model.eval()
  video, latents = (
    torch.from_numpy(np.ascontiguousarray(rearrange(x, "b f h w c -> b c f h w"))).to(
      TORCH_DEVICE, dtype
    )
    for x in inputs
  )

  @torch.no_grad()
  def encode() -> torch.Tensor:
    output = model.encode(video)
    assert isinstance(output, AutoencoderKLOutput)
    mean = output.latent_dist.mean
    synchronize()
    return mean

  @torch.no_grad()
  def decode() -> torch.Tensor:
    output = model.decode(latents)
    assert isinstance(output, DecoderOutput)
    frames = output.sample
    synchronize()
    return frames

  return {"torch_encode": encode, "torch_decode": decode}


def measure_case(case: Case, repeats: int) -> dict[str, Any]:
  runs = make_programs(case)
  differ = {name: _difference(case, runs, name) for name in ("encode", "decode")}
  figures = compared(time_in_turn(runs, repeats))
  return {
    **case._asdict(),
    "outputs_differ": differ,
    **figures,
    "frames_per_second": {name: case.frames / s for name, s in figures["seconds"].items()},
    "memory": {
      name: peak_memory(partial(_make, case, name), of_torch=name.startswith("torch"))
      for name in PROGRAMS
    },
  }


def _difference(case: Case, runs: dict[str, Run], name: str) -> float:
  theirs = runs[f"torch_{name}"]().float().cpu().numpy()
  ours = np.asarray(runs[f"ours_{name}"](), np.float32)
  return check_agreement(rearrange(theirs, "b c f h w -> b f h w c"), ours, case.dtype)


def _make(case: Case, name: str) -> Run:
  return make_programs(case, (name,))[name]


def summary(result: dict[str, Any]) -> dict[str, str]:
  """A line for each program of a case."""
  size = "{frames}x{height}x{width}".format(**result)
  lines = {}
  for name, seconds in result["seconds"].items():
    ratio = f"ratio {result['ratios'][name]:.2f}" if name in result["ratios"] else ""
    lines[f"{size} {name}"] = f"{seconds:9.4f} s  {result['memory'][name]:,} bytes  {ratio}"
  return lines


def size_of(text: str) -> tuple[int, ...]:
  frames, height, width = map(int, text.split("x"))
  return frames, height, width


def main() -> None:
  on_cpu = jax.default_backend() == "cpu"
  parser = measure.arguments(__doc__)
  sizes = ["17x128x128"] if on_cpu else ["17x480x720"]
  parser.add_argument("--sizes", nargs="+", type=size_of, default=[*map(size_of, sizes)])
  parser.add_argument("--channels", nargs="+", type=int, default=VAEConfig.channels)
  parser.add_argument("--dtype", choices=["float32", "bfloat16"])
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))  # As many as XLA takes.
  dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
  cases = [Case(*size, channels=tuple(args.channels), dtype=dtype) for size in args.sizes]
  results = [measure_case(case, args.repeats) for case in cases]
  for case in results:
    for name, line in summary(case).items():
      print(f"{name:28} {line}")
  if args.json:
    device = measure.device("jax", "flax", "torch", "diffusers")
    print(json.dumps({**device, **device_names(), "cases": results}))


if __name__ == "__main__":
  main()
