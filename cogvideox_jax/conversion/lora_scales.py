"""The scale of each module's update, alpha / r, by the rules of PEFT from what a LoRA file says.

diffusers writes the fields of PEFT's `LoraConfig` into the header of the file, PEFT itself into
`adapter_config.json` beside it.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from cogvideox_jax.conversion.lora_names import PREFIX
from cogvideox_jax.errors import UserError

METADATA = "lora_adapter_metadata"  # diffusers' key in the header of the file.
_ALPHA = 8  # PEFT's default of lora_alpha.
# Ways to begin a training that change the base weights as well, so that the file is not all of it.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def header_fields(metadata: Mapping[str, str], where: object) -> dict[str, Any]:
  """PEFT's fields for the transformer in the header of a file; none if it has no such fields.

  Raises:
    UserError: they are not JSON.
  """
  fields = parsed(metadata.get(METADATA, "{}"), f"{METADATA} in the header of {where}")
  return {n.removeprefix(PREFIX): value for n, value in fields.items() if n.startswith(PREFIX)}


def parsed(text: str, what: str) -> dict[str, Any]:
  """The object in a JSON text.

  Raises:
    UserError: there is none; it begins with `what`.
  """
  try:
    fields = json.loads(text)
  except (json.JSONDecodeError, RecursionError) as error:
    raise UserError(f"{what} is not JSON ({error}): the file is damaged; save it again.") from error
  if not isinstance(fields, dict):
    raise UserError(f"{what} must be one JSON object, not {text[:40]!r}.")
  return fields


def by_fields(
  fields: Mapping[str, Any], ranks: Mapping[str, int], where: object
) -> dict[str, float]:
  """Name of a module -> its scale, as PEFT computes it from the fields of `LoraConfig`.

  `alpha_pattern` and `rank_pattern` are regular expressions for the end of a module's name, of
  which the first that matches counts.

  Args:
    fields: of PEFT's config.
    ranks: the rank of each module's matrices.
    where: names the file in errors.

  Raises:
    UserError: a field has a wrong type, says another rank than the matrices have, or asks for what
      is not a plain LoRA.
  """
  _check_plain(fields, where)
  scales = {}
  for module, rank in ranks.items():
    said = _number(fields, "rank_pattern", "r", rank, module, where)
    if said != rank:
      raise UserError(
        f"{where} says rank {said:g} for {module}, whose matrices have rank {rank}.\n"
        "The file and what it says of itself are not of one training; save it again."
      )
    alpha = _number(fields, "alpha_pattern", "lora_alpha", _ALPHA, module, where)
    scales[module] = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
  return scales


def _check_plain(fields: Mapping[str, Any], where: object) -> None:
  """Raises UserError for a way of training whose result is no sum of base and update."""
  start = fields.get("init_lora_weights")
  changes = isinstance(start, str) and start.startswith(_CHANGE_THE_BASE)
  kind = fields.get("peft_type") or "LORA"
  reasons = {
    f"peft_type {kind!r}: an adapter of another kind": kind != "LORA",
    "use_dora: a DoRA also rescales the sum": fields.get("use_dora"),
    "use_qalora: a QALoRA averages its inputs": fields.get("use_qalora"),
    "lora_bias: the LoRA has biases": fields.get("lora_bias"),
    f"init_lora_weights {start!r}: the training changed the base weights, too": changes,
  }
  for reason, holds in reasons.items():
    if holds:
      raise UserError(
        f"{where} says {reason}. Only plain LoRAs are read.\n"
        "Merge it into its base model with PEFT (merge_and_unload), and give the merged model."
      )


def _number(
  fields: Mapping[str, Any], patterns: str, name: str, default: int, module: str, where: object
) -> float:
  """The value for a module: that of the first pattern that matches, else that of the field."""
  table = fields.get(patterns) or {}
  if not isinstance(table, Mapping):
    raise UserError(f"{where}: {patterns} is {table!r}; it must map patterns to numbers.")
  value = fields.get(name, default)
  for pattern, found in table.items():
    if _matches(pattern, module, f"{where}: {patterns}"):
      name, value = f"{patterns} {pattern!r}", found
      break
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    raise UserError(f"{where}: {name} is {value!r}, not a number.")
  return float(value)


def _matches(pattern: str, module: str, where: str) -> bool:
  """PEFT's rule (`get_pattern_key`)."""
  try:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
  except re.error as error:
    raise UserError(f"{where} has {pattern!r}, no regular expression: {error}.") from error
