"""Scores restored clips beside their source: PSNR, SSIM, LPIPS, flicker, and the logits for FVD."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cogvideox_jax.evaluation import quality
from cogvideox_jax.evaluation.fvd import Features, TooShortError, check_frames
from cogvideox_jax.evaluation.lpips_weights import lpips_params
from cogvideox_jax.evaluation.metric_packages import MissingPackageError
from cogvideox_jax.models.lpips import TooSmallError, check_size, lpips
from cogvideox_jax.types import Params

LPIPS_FRAMES = 8  # Frames compared at once, which bounds the memory.
Frames = UInt8[np.ndarray, "F H W 3"]


class Scores(NamedTuple):
  """Scores of a clip, or means over clips; None where there is no such figure."""

  psnr: float  # dB, the mean over frames.
  psnr_clip: float  # dB, of the mean squared error of the clip.
  ssim: float
  lpips: float | None  # None if its package is missing.
  flicker: float | None  # On 0..255; None for a single frame.
  flicker_source: float | None


FIELDS = (*Scores._fields, "flicker_excess", "vbench_flickering")  # What `as_fields` gives.


class Judges:
  """The networks that judge clips, as far as their packages are installed."""

  def __init__(self, network: str, size: Sequence[int], *, fvd_frames: int | None):
    """Loads LPIPS with `network`, and I3D.

    Args:
      size: height and width of the frames in pixels.
      fvd_frames: frames of the clips whose FVD is wanted; None if none is.

    Raises:
      UserError: a package's file or a converted one is damaged; or frames are too small for SSIM.
    """
    quality.check_size(*size)
    self.notes: list[str] = []  # What is missing, and how to install it.
    self._lpips_params = self._load("LPIPS", partial(_load_lpips, network, size))
    self._lpips = jax.jit(partial(_distances, network=network))
    self.features: Features | None = None
    if fvd_frames is not None:
      self.features = self._load("FVD", partial(_load_features, fvd_frames))

  def _load(self, metric, make):
    try:
      return make()
    except (MissingPackageError, TooShortError, TooSmallError) as error:
      self.notes.append(f"no {metric}: {error}")
      return None

  def score(self, source: Frames, restored: Frames) -> Scores:
    """Scores one clip."""
    tally = ClipTally(self)
    tally.add(source, restored)
    return tally.scores()

  def distances(self, source: Frames, restored: Frames) -> list[float] | None:
    """Returns the LPIPS of each frame; None if its package is missing."""
    if self._lpips_params is None:
      return None
    return self._lpips(self._lpips_params, source, restored).tolist()


class ClipTally:
  """Scores one clip, of which some frames are given at a time: its memory is a few numbers each."""

  def __init__(self, judges: Judges):
    self._judges = judges
    self._errors: list[float] = []
    self._ssims: list[float] = []
    self._distances: list[float] = []
    self._changes: tuple[list[float], list[float]] = ([], [])  # The restored, and the source's.
    self._before: tuple[Frames, Frames] | None = None  # The last frame of both.

  def add(self, source: Frames, restored: Frames) -> None:
    """Adds the next frames."""
    self._errors += quality.errors(source, restored)
    self._ssims += quality.ssims(source, restored)
    self._distances += self._judges.distances(source, restored) or []
    clips = restored, source
    for number, (changes, frames) in enumerate(zip(self._changes, clips, strict=True)):
      before = self._before[number] if self._before else frames[:0]
      changes += quality.changes(np.concatenate([before, frames]))
    self._before = restored[-1:], source[-1:]

  def scores(self) -> Scores:
    """Returns the scores of the frames that were added, at least one."""

    def mean(values: list[float]) -> float | None:
      return float(np.mean(values)) if values else None

    return Scores(
      *quality.psnr_of(self._errors),
      float(np.mean(self._ssims)),
      *(mean(values) for values in (self._distances, *self._changes)),
    )


def mean(scores: list[Scores]) -> Scores:
  """Returns the means over clips of one length."""

  def of(name: str) -> float:
    return float(np.mean([getattr(score, name) for score in scores]))

  absent = {name for name, value in scores[0]._asdict().items() if value is None}
  return scores[0]._replace(**{name: of(name) for name in Scores._fields if name not in absent})


def as_fields(scores: Scores) -> dict[str, float | None]:
  """Returns the scores by name, with what follows from them: excess flicker and VBench's."""
  fields: dict[str, float | None] = dict(scores._asdict())
  if scores.flicker is None or scores.flicker_source is None:
    return fields | {"flicker_excess": None, "vbench_flickering": None}
  return fields | {
    "flicker_excess": scores.flicker - scores.flicker_source,
    "vbench_flickering": quality.steadiness(scores.flicker),
  }


def _load_lpips(network: str, size: Sequence[int]) -> Params:
  check_size(network, *size)
  return jax.device_put(lpips_params(network))


def _load_features(frames: int) -> Features:
  check_frames(frames)
  return Features()


def _distances(
  params: Params,
  source: UInt8[Array, "F H W 3"],
  restored: UInt8[Array, "F H W 3"],
  *,
  network: str,
) -> Float[Array, "F"]:
  """Returns the LPIPS of each frame."""

  def distance(pair):
    x, y = (frame.astype(jnp.float32) / 127.5 - 1 for frame in pair)
    return lpips(params, x, y, network=network)

  return jax.lax.map(distance, (restored, source), batch_size=LPIPS_FRAMES)
