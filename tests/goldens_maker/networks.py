"""The networks alone: transformers of each kind, the VAE whole and in tiles, the text encoder."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .folder import GoldensFolder
from .models import (
  KINDS,
  empty_prompt,
  make_text_encoder,
  make_transformer,
  make_vae,
  rotary_tables,
  token_ids,
)

TRANSFORMER_ABOUT = {
  "in.hidden_states": "[B,F,C,H,W] latents; with an image, its latents follow the noise's in C",
  "in.encoder_hidden_states": "[B,L,text_dim] states of the text",
  "in.timestep": "[B]",
  "in.ofs": "[1]",
  "in.rope_": "[tokens, head_dim]",
  "aux.time_proj": "[B,D] the sinusoid of the timestep: feed it to compare without its rounding",
  "out.": "[B,F,C,H,W]",
  "dbg.": "what a module returns, a block's vision tokens",
}
T5_LENGTH = 226


def make(folder: GoldensFolder) -> None:
  for kind in KINDS:
    transformers(folder, kind)
  vae(folder)
  text_encoder(folder)


@contextlib.contextmanager
def recorded(model: nn.Module, keys: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
  """Copies what modules return while the model runs: key -> tensor, the first if there are many.

  keys: key -> name of the module.
  """
  found: dict[str, Tensor] = {}

  def record(key: str):
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
      found[key] = (output[0] if isinstance(output, tuple) else output).clone()

    return hook

  hooks = [
    model.get_submodule(name).register_forward_hook(record(key)) for key, name in keys.items()
  ]
  yield found
  for hook in hooks:
    hook.remove()


def run_transformer(
  model: nn.Module, inputs: Mapping[str, Any], debug: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
  """The output, and the sinusoid of the timestep; with `debug` the activations too."""
  keys = {"aux.time_proj": "time_proj"}
  if debug:
    layers = range(len(model.transformer_blocks))
    blocks = [f"transformer_blocks.{i}" for i in layers]
    of_block = [f"{block}.{module}" for block in blocks for module in ("norm1", "attn1")]
    names = ("patch_embed", "time_embedding", *blocks, *of_block, "norm_final", "norm_out")
    keys |= {f"dbg.{name}": name for name in names}
  with recorded(model, keys) as found:
    output = model(**inputs, return_dict=False)[0]
  return output, found


def in_double(model: nn.Module) -> nn.Module:
  return copy.deepcopy(model).double()


def doubled(inputs: Mapping[str, Any]) -> dict[str, Any]:
  """Inputs of a network in float64; integers stay."""

  def double(x: Any) -> Any:
    if isinstance(x, tuple):
      return tuple(map(double, x))
    return x.double() if x.is_floating_point() else x

  return {name: double(x) for name, x in inputs.items()}


def transformers(folder: GoldensFolder, kind: str) -> None:
  """Two clips of the default size, and one of another; 5B also without rotations."""
  sizes, name = folder.sizes, f"transformer_{kind}"
  model = make_transformer(kind, sizes, folder.draws)
  folder.add_model(name, model)

  def whole_patches(frames: int) -> int:
    patch = model.config.patch_size_t or 1
    return -(-frames // patch) * patch

  default = whole_patches(sizes.lat_f), sizes.lat_h, sizes.lat_w
  runs = {"default": default}
  if kind == "5b_i2v":  # For another number of frames diffusers computes the learned table anew.
    runs["otherframes"] = sizes.alt_f, sizes.lat_h, sizes.lat_w
  else:
    runs["altsize"] = whole_patches(sizes.alt_f), sizes.alt_h, sizes.alt_w
  if kind == "5b":
    runs["norope"] = 1, sizes.lat_h, sizes.lat_w
  for run, latents in runs.items():
    timesteps = [999, 37] if run == "default" else [500]
    inputs = transformer_inputs(folder, model, f"{name}_{run}", latents, timesteps)
    if run == "norope":
      del inputs["image_rotary_emb"]
    output, found = run_transformer(model, inputs, bool(sizes.debug))
    exact, _ = run_transformer(in_double(model), doubled(inputs))
    folder.add_case(
      f"{name}_{run}",
      "transformer",
      {**stored_inputs(inputs), "out.sample": output, **found},
      TRANSFORMER_ABOUT,
      model=name,
      exact={"out.sample": exact},
    )


def transformer_inputs(
  folder: GoldensFolder,
  model: nn.Module,
  name: str,
  latents: tuple[int, int, int],
  timesteps: list[int],
) -> dict[str, Any]:
  """Drawn inputs of a transformer for clips of (f, h, w) latents, one for each timestep."""
  (frames, height, width), config, batch = latents, model.config, len(timesteps)
  shape = batch, frames, config.in_channels, height, width
  text = batch, config.max_text_seq_length, config.text_embed_dim
  inputs: dict[str, Any] = {
    "hidden_states": folder.draws.normal(f"{name}/x", *shape),
    "encoder_hidden_states": folder.draws.normal(f"{name}/text", *text),
    "timestep": torch.tensor(timesteps),
  }
  if config.use_rotary_positional_embeddings:
    inputs["image_rotary_emb"] = rotary_tables(config, latents)
  if config.ofs_embed_dim is not None:
    inputs["ofs"] = torch.tensor([2.0])
  return inputs


def stored_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
  stored = {f"in.{name}": x for name, x in inputs.items() if name != "image_rotary_emb"}
  if "image_rotary_emb" in inputs:
    stored["in.rope_cos"], stored["in.rope_sin"] = inputs["image_rotary_emb"]
  return stored


def vae(folder: GoldensFolder) -> None:
  sizes, draws = folder.sizes, folder.draws
  model = make_vae(sizes, draws)
  folder.add_model("vae", model)
  exact = in_double(model)
  for frames, batch in ((1, 2), (5, 2), (9, 1), (17, 1), (13, 1), (8, 1), (6, 1)):
    name = f"vae_encode_f{frames}"
    x = draws.normal(f"{name}/x", batch, 3, frames, sizes.vae_h, sizes.vae_w).clamp(-1, 1)
    encode(folder, name, model, exact, x, draws.generator(f"{name}/eps"))
  for frames, batch in ((1, 2), (2, 2), (3, 1), (5, 1), (4, 1)):
    name = f"vae_decode_z{frames}"
    shape = batch, sizes.vae_lat, frames, sizes.vae_h // 8, sizes.vae_w // 8
    decode(folder, name, model, exact, draws.normal(f"{name}/z", *shape))
  model.enable_tiling()
  exact.enable_tiling()
  for frames in (1, 4):
    shape = 1, sizes.vae_lat, frames, sizes.tiled_h // 8, sizes.tiled_w // 8
    z = draws.normal(f"vae/tiled/z{frames}", *shape)
    decode(folder, f"vae_decode_tiled_z{frames}", model, exact, z)
  x = draws.normal("vae/tiled/x", 1, 3, 5, sizes.tiled_h, sizes.tiled_w).clamp(-1, 1)
  encode(folder, "vae_encode_tiled_f5", model, exact, x, None)


def vae_call(model: Any) -> dict[str, Any]:
  """How the VAE tiles, if it does."""
  if not model.use_tiling:
    return {}
  names = ("tile_sample_min", "tile_latent_min", "tile_overlap_factor")
  sides = [f"{name}_{side}" for name in names for side in ("height", "width")]
  return {"tiling": True, **{side: getattr(model, side) for side in sides}}


def encode(
  folder: GoldensFolder,
  name: str,
  model: Any,
  exact: Any,
  x: Tensor,
  generator: torch.Generator | None,
) -> None:
  """generator: draws the posterior's noise; None leaves its sample out."""
  levels = len(model.config.block_out_channels) if folder.sizes.debug else 0
  keys = {f"dbg.down_block{i}": f"encoder.down_blocks.{i}" for i in range(levels)}
  with recorded(model, keys) as found:
    posterior = model.encode(x).latent_dist
  tensors = {"in.sample": x, "out.moments": posterior.parameters, **found}
  if generator is not None:
    noise = torch.randn(*posterior.mean.shape, generator=generator)
    tensors |= {
      "rng.eps": noise,
      "out.mean": posterior.mean,
      "out.logvar": posterior.logvar,
      "out.std": posterior.std,
      "out.z": posterior.mean + posterior.std * noise,
    }
  folder.add_case(
    name,
    "vae_encode",
    tensors,
    {
      "in.sample": "[B,3,F,H,W] in [-1, 1]",
      "rng.eps": "the posterior's noise",
      "out.": "[B,C,f,h,w]; moments: mean and logvar, 2C; logvar in [-30, 20]; z: mean + std eps",
      "dbg.": "what a level returns for the last chunk of frames",
    },
    model="vae",
    call=vae_call(model),
    exact={"out.moments": exact.encode(x.double()).latent_dist.parameters},
  )


def decode(folder: GoldensFolder, name: str, model: Any, exact: Any, z: Tensor) -> None:
  levels = len(model.config.block_out_channels) if folder.sizes.debug else 0
  keys = {f"dbg.up_block{i}": f"decoder.up_blocks.{i}" for i in range(levels)}
  with recorded(model, keys) as found:
    sample = model.decode(z).sample
  folder.add_case(
    name,
    "vae_decode",
    {"in.z": z, "out.sample": sample, **found},
    {
      "in.z": "[B,C,f,h,w] latents, unscaled",
      "out.sample": "[B,3,F,H,W]; an even number of latents gives 4 f frames, an odd one 4 f - 3",
      "dbg.": "what a level returns for the last chunk of frames",
    },
    model="vae",
    call=vae_call(model),
    exact={"out.sample": exact.decode(z.double()).sample},
  )


def text_encoder(folder: GoldensFolder) -> None:
  model = make_text_encoder(folder.sizes, folder.draws)
  folder.add_model("t5", model)
  exact = in_double(model)
  ids = token_ids(folder.draws, "t5/ids", T5_LENGTH, [40, T5_LENGTH])
  mask = (ids != 0).long()
  about = {
    "in.input_ids": "[B,L] </s> is 1, padding 0",
    "in.attention_mask": "[B,L]",
    "out.no_mask": "as CogVideoX calls it: padding is attended to",
    "out.masked": "with the mask",
  }
  folder.add_case(
    "t5_encoder",
    "t5",
    {
      "in.input_ids": ids,
      "in.attention_mask": mask,
      "out.no_mask": model(ids)[0],
      "out.masked": model(ids, attention_mask=mask)[0],
    },
    about,
    model="t5",
    exact={"out.no_mask": exact(ids)[0], "out.masked": exact(ids, attention_mask=mask)[0]},
  )
  ids = empty_prompt(folder.sizes.text_len)
  tensors = {"in.input_ids": ids, "out.no_mask": model(ids)[0]}
  folder.add_case("t5_empty_prompt", "t5", tensors, about, model="t5")
