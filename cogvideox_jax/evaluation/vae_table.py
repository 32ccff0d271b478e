"""Compares VAEs on the same clips: one row of figures for each."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import clip_scores, fvd
from cogvideox_jax.evaluation.clip_scores import Judges, Scores
from cogvideox_jax.evaluation.reconstruction import VAEModel, reconstruct
from cogvideox_jax.evaluation.seed_statistics import summarize

Row = dict[str, Any]  # A row of the table: figures by name, null where there is none.


class Setting(NamedTuple):
  """What all rows have in common."""

  frames: int
  height: int
  width: int
  fps: float
  windows: str  # Which clips of a file: "first frames" or "windows".
  biased: bool  # The covariance of FVD.


# The figures of a row: scores, and FVD.
FIGURES = (*clip_scores.FIELDS, "fvd")
_NO_FVD: Row = {"fvd": None, "fvd_clips": 0, "fvd_flavour": None}


class _Tally:
  """What is kept of the clips that one VAE restored."""

  def __init__(self):
    self.scores: list[Scores] = []
    self.logits: list[np.ndarray] = []


def compare(
  vaes: Sequence[VAEModel],
  batches: Iterable[UInt8[np.ndarray, "b F H W 3"]],
  judges: Judges,
  setting: Setting,
) -> list[Row]:
  """Scores each VAE on all clips. One batch is in memory at a time.

  Raises:
    UserError: there is no clip; or a VAE cannot take clips of this size.
  """
  tallies = [_Tally() for _ in vaes]
  source: list[np.ndarray] = []
  features = judges.features
  for frames in batches:
    if features:
      source += [features(clip[None])[0] for clip in frames]
    for vae, tally in zip(vaes, tallies, strict=True):
      for clip, restored in zip(frames, reconstruct(vae, frames), strict=True):
        tally.scores.append(judges.score(clip, restored))
        if features:
          tally.logits.append(features(restored[None])[0])
  if not tallies[0].scores:
    raise UserError("no clip could be decoded, so there is nothing to score.")
  return [
    _row(vae, tally, source, judges, setting) for vae, tally in zip(vaes, tallies, strict=True)
  ]


def over_seeds(name: str, rows: Sequence[Row]) -> Row:
  """Returns one row for the same variant trained with several seeds, under a name.

  Its figures are means. `deviations` has their standard deviations, and is empty for one seed.
  """
  row, deviations = {**rows[0], "model": name, "seed": [row["seed"] for row in rows]}, {}
  for figure in FIGURES:
    if rows[0][figure] is not None:
      found = summarize([row[figure] for row in rows])
      row[figure] = found.mean
      if found.seeds > 1:
        deviations[figure] = found.deviation
  seconds = [row["train_seconds"] for row in rows if row["train_seconds"] is not None]
  row["train_seconds"] = sum(seconds) / len(seconds) if seconds else None
  return {**row, "deviations": deviations}


def _row(
  vae: VAEModel, tally: _Tally, source: Sequence[np.ndarray], judges: Judges, setting: Setting
) -> Row:
  clips = len(tally.scores)
  return {
    "model": vae.name,
    "compression": vae.compression,
    "channels": vae.config.latent_channels,
    "parameters": vae.parameters,
    **clip_scores.as_fields(clip_scores.mean(tally.scores)),
    **_fvd(source, tally.logits, judges, setting),
    "clips": clips,
    "frames": setting.frames,
    "size": f"{setting.height}x{setting.width}",
    "train_steps": vae.training.steps,
    "train_seconds": vae.training.seconds,
    "seed": vae.training.seed,
  }


def _fvd(
  source: Sequence[np.ndarray], restored: Sequence[np.ndarray], judges: Judges, setting: Setting
) -> Row:
  notes = list(judges.notes)
  if not judges.features:
    return {**_NO_FVD, "notes": notes}
  try:
    found = fvd.fvd(np.array(source), np.array(restored), biased=setting.biased)
  except UserError as error:
    return {**_NO_FVD, "notes": [*notes, f"no FVD: {error}"]}
  if found.warning:
    notes.append(found.warning)
  flavour = judges.features.flavour(
    len(source), setting.frames, setting.fps, setting.windows, setting.biased
  )
  return {"fvd": found.distance, "fvd_clips": len(source), "fvd_flavour": flavour, "notes": notes}
