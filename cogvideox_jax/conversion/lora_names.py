"""Names of LoRA tensors: the forms that trainers write, and the one form that is used here.

A tensor belongs to a module, by its name in diffusers' transformer, and is a part of its update:
the matrix A or B, or alpha. Known are diffusers' names of today and from before PEFT, PEFT's own,
kohya's (`lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight`), those of SAT, and names
under other prefixes or none.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from cogvideox_jax.conversion import sat_names
from cogvideox_jax.errors import UserError

PREFIX = "transformer."  # Begins the names that diffusers reads.
A, B, ALPHA = "lora_A", "lora_B", "alpha"

# Beginnings that say nothing about the module; several may follow one another.
_BEGINNINGS = (
  "module.",
  "base_model.model.",
  "model.diffusion_model.",
  "diffusion_model.",
  PREFIX,
)
# Names from before PEFT, which diffusers still reads -> today's names.
_OLDER = (
  (re.compile(r"\.processor\."), "."),
  (re.compile(r"(to_q|to_k|to_v)_lora\.down\."), r"\1.lora_A."),
  (re.compile(r"(to_q|to_k|to_v)_lora\.up\."), r"\1.lora_B."),
  (re.compile(r"to_out_lora\.down\."), "to_out.0.lora_A."),
  (re.compile(r"to_out_lora\.up\."), "to_out.0.lora_B."),
  (re.compile(r"\.lora(\.|_linear_layer\.|_)down\."), ".lora_A."),
  (re.compile(r"\.lora(\.|_linear_layer\.|_)up\."), ".lora_B."),
)
_KOHYA = re.compile(r"lora_(?:unet|transformer)_+(?P<module>\w+)\.(?P<part>.+)")
_MODULE_OF_KOHYA = {
  name.replace(".", "_"): name for name in (*sat_names.MODULES, *sat_names.BLOCK_MODULES)
}
_MATRIX = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<adapter>\w+))?\.weight")
_BLOCK = re.compile(r"transformer_blocks[._](?P<layer>\d+)[._](?P<module>.+)")
# Parts of what is no plain LoRA -> what it is.
_OTHER_KINDS = (
  (r"dora_scale|lora_magnitude_vector", "a DoRA, which also rescales the sum"),
  (r"lora_mid", "a LoCon with a Tucker decomposition"),
  (r"hada_", "a LoHa"),
  (r"lokr_", "a LoKr"),
  (r"oft_", "an OFT adapter"),
  (r"\.diff(_b)?$|modules_to_save", "a full difference of a weight"),
  (r"lora_[AB](\.\w+)?\.bias$", "a LoRA with biases"),
)


class Part(NamedTuple):
  """Where a tensor of a LoRA belongs."""

  module: str  # Name in diffusers' transformer, such as `transformer_blocks.0.attn1.to_q`.
  part: str  # A, B or ALPHA.

  @property
  def name(self) -> str:
    """The tensor's name in diffusers' files of today."""
    return f"{PREFIX}{self.module}.{self.part}" + (".weight" if self.part != ALPHA else "")


def find_parts(names: Iterable[str], where: object) -> tuple[dict[Part, str], list[str]]:
  """What each tensor of a file is.

  Args:
    names: the tensors' names in the file.
    where: names the file in errors.

  Returns:
    Each part of an update and the name of its tensor, and the names of tensors that belong to
    other networks than the transformer.

  Raises:
    UserError: a tensor belongs to no LoRA or to another kind of adapter, or two are the same part.
  """
  names = sorted(names)
  if from_sat := sat_names.lora_names(names):  # SAT's checkpoints hold the base weights, too.
    names = list(from_sat)
  parts: dict[Part, str] = {}
  others = []
  for name in names:
    _check_kind(name, where)
    part = _part(name)
    if part is None and _is_ours(name):
      raise UserError(f"{where} has {name}, which is not supported.")
    if part is None:
      others.append(name)
    elif part in parts:
      raise UserError(
        f"{where} holds several adapters: {parts[part]} and {name} change the same module.\n"
        "Save each in a file of its own."
      )
    else:
      parts[part] = from_sat.get(name, name)
  return parts, others


def is_lora_tensor(name: str) -> bool:
  """Whether a name is that of a tensor of a LoRA, or of an adapter like it."""
  known = r"lora|\.alpha$|" + "|".join(pattern for pattern, _ in _OTHER_KINDS)
  return bool(re.search(known, name) or sat_names.lora_names([name]))


def _check_kind(name: str, where: object) -> None:
  """Raises UserError unless a name is that of a tensor of a plain LoRA."""
  for pattern, kind in _OTHER_KINDS:
    if re.search(pattern, name):
      raise UserError(
        f"{where} is {kind}, as {name} says; only plain LoRAs are read.\n"
        "Merge it into its base model with the tool that made it (PEFT: merge_and_unload), and "
        "give the merged model."
      )
  if not is_lora_tensor(name):
    raise UserError(f"{where} is not a LoRA file: it has {name}.")


def _part(name: str) -> Part | None:
  """Where a tensor belongs; None if it is no part of a transformer's update."""
  if kohya := _KOHYA.fullmatch(name):
    name = f"{_dotted(kohya['module'])}.{kohya['part']}"
  bare = _bare(name)
  for pattern, replacement in _OLDER:
    bare = pattern.sub(replacement, bare)
  if bare.endswith(f".{ALPHA}"):
    part = Part(bare.removesuffix(f".{ALPHA}"), ALPHA)
  elif matrix := _MATRIX.fullmatch(bare):
    part = Part(matrix["module"], matrix["part"])
  else:
    return None
  # A name with diffusers' prefix is taken at its word, so that an unknown module is named later.
  return part if name.startswith(PREFIX) or _is_known(part.module) else None


def _bare(name: str) -> str:
  """A name without its beginnings."""
  while beginning := next((text for text in _BEGINNINGS if name.startswith(text)), ""):
    name = name.removeprefix(beginning)
  return name


def _is_ours(name: str) -> bool:
  """Whether a tensor is meant for a transformer such as ours."""
  return name.startswith(PREFIX) or "transformer_blocks" in name


def _dotted(module: str) -> str:
  """The module that kohya's name, with underscores for dots, stands for; itself if unknown."""
  if block := _BLOCK.fullmatch(module):
    inner = _MODULE_OF_KOHYA.get(block["module"], block["module"])
    return f"transformer_blocks.{block['layer']}.{inner}"
  return _MODULE_OF_KOHYA.get(module, module)


def _is_known(module: str) -> bool:
  """Whether a transformer has a module of this name."""
  block = _BLOCK.fullmatch(module)
  return block["module"] in sat_names.BLOCK_MODULES if block else module in sat_names.MODULES
