"""A folder of reference tensors as it is written: models, cases, and the index of both."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from .draws import Draws
from .models import Sizes

SUBFOLDERS = ("cases", "lora", "models", "pipelines", "sat")


class GoldensFolder:
  """Writes cases and models, and remembers for the index what they are."""

  def __init__(self, path: Path, sizes: Sizes):
    """Removes what an earlier run of the tool has left in the folder."""
    torch.set_num_threads(1)  # Sums are then always made in the same order.
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    diffusers.utils.logging.set_verbosity_error()
    self.path, self.sizes, self.draws = path, sizes, Draws(sizes.seed)
    self.cases: dict[str, dict[str, Any]] = {}
    self.models: dict[str, dict[str, Any]] = {}
    self.sat: dict[str, dict[str, str]] = {}
    for name in SUBFOLDERS:
      shutil.rmtree(path / name, ignore_errors=True)
      (path / name).mkdir(parents=True)

  def add_model(self, name: str, model: nn.Module) -> None:
    """Writes models/NAME as its library does."""
    model.save_pretrained(self.path / "models" / name)
    self.models[name] = {
      "dir": f"models/{name}",
      "class": type(model).__name__,
      "num_params": sum(x.numel() for x in model.parameters()),
    }

  def add_case(
    self,
    name: str,
    kind: str,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, str],
    *,
    model: Any = None,
    call: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
    exact: Mapping[str, Tensor] | None = None,
  ) -> None:
    """Writes cases/NAME.safetensors and its entry of the index.

    Args:
      about: a key, or how several keys begin, -> what the tensors are.
      call: the arguments of the reference.
      values: what else the comparison must know.
      exact: outputs of the reference in float64; how far `tensors` are from them is the noise that
        the comparison has to allow.

    Raises:
      ValueError: a tensor is not described, or an output is not finite.
    """
    for key, x in tensors.items():
      if not any(key.startswith(prefix) for prefix in about):
        raise ValueError(f"{name}: nothing says what {key} is")
      if key.startswith("out.") and not x.isfinite().all():
        raise ValueError(f"{name}: {key} is not finite")
    file = f"cases/{name}.safetensors"
    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, self.path / file)
    entry = {
      "file": file,
      "kind": kind,
      "model": model,
      "call": call or {},
      "values": values,
      "tensors": {
        prefix: text
        for prefix, text in about.items()
        if any(key.startswith(prefix) for key in tensors)
      },
      "noise_floor": {
        key: float(f"{(tensors[key] - x).abs().max():.3g}") for key, x in (exact or {}).items()
      },
    }
    required = ("file", "kind", "model", "call")
    self.cases[name] = {key: x for key, x in entry.items() if x or key in required}

  def add_sat(self, name: str, model: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes sat/NAME.safetensors: a model's weights under SAT's names."""
    file = f"sat/{name}.safetensors"
    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, self.path / file)
    self.sat[name] = {"file": file, "model": model}

  def write_index(self) -> None:
    """Writes index.json, last: a folder that has it is whole."""
    index = {
      "meta": {
        "sizes": asdict(self.sizes),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
      },
      "models": self.models,
      "cases": self.cases,
      "sat": self.sat,
    }
    (self.path / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")

  def size(self) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
