"""Runs the cases of a folder of reference tensors, and compares all that they hold."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from cogvideox_jax.conversion import sat
from cogvideox_jax.errors import UserError

from . import networks, pipelines, schedulers, tables
from .compared import Compared, Result, failed, largest_error
from .folder import VAE_CLASS, Case, CaseError, Folder

Compute = Callable[[Case], Iterator[Compared]]

KINDS: dict[str, Compute] = {
  "scheduler": schedulers.scheduler,
  "transformer": networks.transformer,
  "lora": networks.low_rank,
  "vae_encode": networks.vae_encode,
  "vae_decode": networks.vae_decode,
  "t5": networks.text_encoder,
  "pipeline": pipelines.pipeline,
}
TABLES: dict[str, Compute] = {  # Cases of the kind `table`, by how their names begin.
  "crop_regions": tables.crop_regions,
  "rope_tables": tables.rotary_tables,
  "sincos_tables": tables.sincos_tables,
  "sched_tables": schedulers.noise_schedule,
  "timestep_sinusoids": tables.sinusoids,
  "timesteps_and_dynamic_cfg": schedulers.timesteps_and_guidance,
}


def run(folder: Folder, name: str) -> list[Result]:
  """Compares all that a case (of `folder.names`) holds.

  A case fails, with the reason in place of a tensor's name, if it is of an unknown kind, lacks a
  tensor, or holds what the package refuses. An error of our code is not caught: it is a fault of
  the package or of this tool, not a difference between two results.
  """
  try:
    if name.startswith("sat:"):
      return list(_run_sat(folder, name))
    return list(_compare(folder.case(name), name))
  except (CaseError, UserError) as error:
    return [failed(name, " ".join(str(error).split()))]


def _compare(case: Case, label: str) -> Iterator[Result]:
  """Results of one case; `label` names it in them."""
  seen = set()
  floors = case.entry.get("noise_floor") or {}
  for compared in _compute(case)(case):
    key = compared.key
    seen.add(key)
    error = largest_error(compared.ours, case.stored[key])
    yield Result(label, compared.tensor, error, floors.get(key), compared.tolerance)
  kinds = ("out.", "tab.") if case.entry["kind"] == "table" else ("out.",)
  for key in sorted(set(case.stored) - seen):
    if key.startswith(kinds):
      yield failed(label, f"{key} was not computed")


def _compute(case: Case) -> Compute:
  kind = case.entry["kind"]
  if kind == "table":
    kind = next((table for table in TABLES if case.name.startswith(table)), f"table {case.name}")
  if kind not in KINDS | TABLES:
    raise CaseError(f"unknown kind of case: {kind}")
  return (KINDS | TABLES)[kind]


def _run_sat(folder: Folder, name: str) -> Iterator[Result]:
  """Runs the cases of a model with the weights of its SAT file, which must be the same."""
  entry = folder.sat[name.removeprefix("sat:")]
  model = entry["model"]
  config, reference = folder.model(model)
  is_vae = folder.index["models"][model]["class"] == VAE_CLASS
  params = (sat.load_vae if is_vae else sat.load_transformer)(folder.path / entry["file"], config)
  for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
    if not np.array_equal(ours, theirs):
      raise CaseError("a converted weight is not that of the reference")
  if not (cases := folder.cases_of(model)):
    raise CaseError(f"no case runs {model}")
  twin = folder.with_model(model, (config, params))
  for case in cases:
    yield from _compare(twin.case(case), f"{name} {case}")
