"""LoRA files as diffusers writes them, and a transformer that each of them changes."""

from collections.abc import Mapping
from typing import Any

from diffusers import CogVideoXPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from .folder import GoldensFolder
from .models import make_transformer
from .networks import TRANSFORMER_ABOUT, run_transformer, stored_inputs, transformer_inputs

KIND = "5b"  # The transformer that is changed.
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
# With `meta` the file's header says alpha; without it diffusers takes alpha = rank.
FILES: dict[str, dict[str, Any]] = {
  "attn_r4_alpha8_nometa": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8},
  "attn_r4_alpha8_meta": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8},
  "attn_ff_mixedrank_nometa": {
    "target_modules": [*ATTENTION, "ff.net.0.proj", "ff.net.2"],
    "r": 4,
    "lora_alpha": 4,
    "rank_pattern": {"ff.net.2": 2},
  },
}


def make(folder: GoldensFolder) -> None:
  sizes = folder.sizes
  model = make_transformer(KIND, sizes, folder.draws)
  latents = sizes.lat_f, sizes.lat_h, sizes.lat_w
  inputs = transformer_inputs(folder, model, "lora", latents, [421])
  base, found = run_transformer(model, inputs)
  tensors = {**stored_inputs(inputs), "out.base": base, **found}
  for name, config in FILES.items():
    write(folder, name, LoraConfig(**config))
    tensors |= {f"out.{name}.{how}": x for how, x in outputs(folder, name, inputs).items()}
  folder.add_case(
    f"lora_transformer_{KIND}",
    "lora",
    tensors,
    {
      **TRANSFORMER_ABOUT,
      "out.base": "[B,F,C,H,W] without LoRA",
      "out.": "[B,F,C,H,W], FILE.HOW. scale1: as loaded; kwscale0.5: attention_kwargs scale 0.5; "
      "adapterweight2: set_adapters with weight 2; fused1: fuse_lora",
    },
    model=f"transformer_{KIND}",
  )


def write(folder: GoldensFolder, name: str, config: LoraConfig) -> None:
  """Writes lora/NAME.safetensors, with drawn weights."""
  model = make_transformer(KIND, folder.sizes, folder.draws)
  model.add_adapter(config, "gen")
  for parameter, x in model.named_parameters():
    if "lora_" in parameter:
      std = 0.5 if "lora_B" in parameter else 0.3
      x.copy_(folder.draws.normal(f"lora/{name}/{parameter}", *x.shape, std=std))
  metadata = {}
  if name.endswith("_meta"):
    fields = config.to_dict()
    fields["target_modules"] = sorted(fields["target_modules"])
    plain = {key: x for key, x in fields.items() if is_json(x)}
    metadata["transformer_lora_adapter_metadata"] = plain
  CogVideoXPipeline.save_lora_weights(
    str(folder.path / "lora"),
    transformer_lora_layers=get_peft_model_state_dict(model, adapter_name="gen"),
    weight_name=f"{name}.safetensors",
    **metadata,
  )


def is_json(value: Any) -> bool:
  return isinstance(value, (int, float, str, list)) or value in ({}, None)


def outputs(folder: GoldensFolder, name: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
  """What the transformer gives with the file, loaded as a user does, by how it is applied."""
  model = make_transformer(KIND, folder.sizes, folder.draws)
  state, metadata = CogVideoXPipeline.lora_state_dict(
    str(folder.path / "lora"), weight_name=f"{name}.safetensors", return_lora_metadata=True
  )
  CogVideoXPipeline.load_lora_into_transformer(state, model, adapter_name="a", metadata=metadata)
  model.eval()
  found = {"scale1": run_transformer(model, inputs)[0]}
  halved = {**inputs, "attention_kwargs": {"scale": 0.5}}
  found["kwscale0.5"] = run_transformer(model, halved)[0]
  model.set_adapters(["a"], [2.0])
  found["adapterweight2"] = run_transformer(model, inputs)[0]
  model.set_adapters(["a"], [1.0])
  model.fuse_lora(lora_scale=1.0)
  found["fused1"] = run_transformer(model, inputs)[0]
  return found
