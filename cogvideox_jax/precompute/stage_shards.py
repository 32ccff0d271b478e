"""The datasets of the stages while they are written: which clips they want, and their shards.

The manifest's items are cut into shards, the same for every stage. A file is decoded once for all
stages, so a `Shard` takes the clips of its files and gives each stage its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.data import buckets, shards
from cogvideox_jax.data.clips import Clip, cut_clips
from cogvideox_jax.data.decoding import File, Piece
from cogvideox_jax.data.encoded_by import EncodedBy
from cogvideox_jax.data.items import Item, Refusal
from cogvideox_jax.data.noising import ImageNoise
from cogvideox_jax.data.records import image_of, storage_fault
from cogvideox_jax.data.shard_notes import identity
from cogvideox_jax.data.shards import OpenShard, ShardWriter
from cogvideox_jax.data.video import VideoError, VideoInfo, Window
from cogvideox_jax.types import Caption, Example

# Latents times the VAE's scaling factor have about unit variance, and outliers of ten or so. More
# than this is a fault of the VAE or of its weights, and would drown the loss of all clips. Ours.
MAX_SCALED_LATENT = 100.0

Frames = UInt8[np.ndarray, "F H W 3"]
States = Float[np.ndarray, "l t"]
Moments = tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]  # Mean and log-variance.
Images = Float[Array, "b draws 2 h w c"] | None


class StageClip(NamedTuple):
  """A clip of a stage's dataset."""

  stage: str
  clip: Clip


class Stage:
  """The dataset of one stage."""

  def __init__(
    self,
    config: TrainConfig,
    name: str,
    output: epath.Path,
    shard_items: list[list[Item]],  # The items of each shard.
    networks: str,  # The digest of the VAE and the text encoder.
    encoders: EncodedBy,
  ):
    """Opens or begins OUTPUT/NAME. UserError if it was made from other items or settings."""
    self.name, self._fps = name, config.data.fps
    self.scaling_factor = encoders.scaling_factor
    self._sizes, self._durations = config.stages[name].sizes, config.stages[name].durations
    settings = _settings(config, name, shard_items)
    self.writer = ShardWriter(
      output / name,
      len(shard_items),
      identity({**settings, "model": networks}),
      encoders,
      identity(settings),
    )

  @cached_property
  def _pending(self) -> set[int]:
    return set(self.writer.pending())

  def lacks(self, shard: int) -> bool:
    """Whether a shard had not been written when this was asked first."""
    return shard in self._pending

  def cut(self, item: Item, info: VideoInfo) -> list[StageClip]:
    """Returns the clips that this stage takes of a file; VideoError if it takes none."""
    clips = cut_clips(item, info, self._sizes, self._durations, self._fps)
    return [StageClip(self.name, clip) for clip in clips]


def check_begun(
  config: TrainConfig, name: str, output: epath.Path, shard_items: list[list[Item]]
) -> None:
  """Raises a UserError if OUTPUT/NAME was made from other items or settings. Reads no network."""
  settings = _settings(config, name, shard_items)
  shards.check_begun(output / name, len(shard_items), identity(settings))


def _settings(config: TrainConfig, name: str, shard_items: list[list[Item]]) -> dict[str, Any]:
  """Returns all that the clips of a stage depend on, except the networks."""
  stage = config.stages[name]
  return {
    "items": [
      [[item.id, item.name, item.score, *item.captions] for item in items] for items in shard_items
    ],
    "text_length": config.model.text_length,
    "buckets": [stage.sizes, stage.durations, config.data.fps, buckets.MAX_ENLARGEMENT],
    "images": image_noise(config),
  }


class Shard:
  """One shard of all stages that lack it."""

  def __init__(self, number: int, items: list[Item], stages: list[Stage]):
    self.items = items
    self._number, self._stages = number, stages
    self._scaling_factor = min((stage.scaling_factor for stage in stages), default=1.0)
    self._planned: dict[str, list[StageClip]] = {}  # By the item's id.
    self._refusals: dict[str, set[Refusal]] = {stage.name: set() for stage in stages}

  @cached_property
  def _outputs(self) -> dict[str, OpenShard]:
    return {stage.name: stage.writer.open_shard(self._number) for stage in self._stages}

  def files(self, fps: float) -> Iterator[File]:
    """The shard's files, for the decoders."""
    return (File(item.file, fps, partial(self._plan, item)) for item in self.items)

  def clips(
    self, decoded: Iterator[Iterator[Piece]], bar: tqdm
  ) -> Iterator[tuple[StageClip, Frames]]:
    """Yields what the decoders make of `files`, and refuses what they cannot decode."""
    for item, pieces in zip(self.items, decoded, strict=False):
      given = 0
      try:
        for number, frames in pieces:
          yield self._planned[item.id][number], frames
          given += 1
      except VideoError as error:
        kept = f", after {given} clips that are kept" if given else ""
        self._refuse(item, f"{error}{kept}", self._refusals)
      bar.update()

  def write(
    self, clips: Sequence[StageClip], moments: Moments, images: Images, texts: dict[str, States]
  ) -> None:
    """Writes a batch, once the devices have computed it.

    Args:
      moments: at least as many as there are clips; those behind them are padding.
      texts: the text states of each caption.
    """
    each = repeat(None) if images is None else np.asarray(images)
    arrays = zip(*map(np.asarray, moments), each, strict=False)
    for (stage, clip), (mean, logvar, image) in zip(clips, arrays, strict=False):
      first, *others = (Caption(caption, texts[caption]) for caption in clip.item.captions)
      example = Example(
        mean=mean,
        logvar=logvar,
        **first._asdict(),
        source=clip.source,
        **clip.bucket._asdict(),
        fps=clip.fps,
        score=clip.item.score,
        others=tuple(others),
        image=image,
        transfer=clip.transfer,
      )
      if fault := storage_fault(example) or latent_fault(example, self._scaling_factor):
        self._refuse(clip.item, f"stage {stage}, clip {clip.source}: {fault}", [stage])
      else:
        self._outputs[stage].write(example)

  def close(self) -> None:
    """Finishes the shard of each stage, with what was refused."""
    for name, output in self._outputs.items():
      output.close(refusal._asdict() for refusal in sorted(self._refusals[name], key=by_line))

  def _plan(self, item: Item, info: VideoInfo) -> list[Window]:
    """Lists the windows that the stages want of a file.

    Runs in a decoder's thread, before the file's clips come.
    """
    if info.note:
      tqdm.write(f"{item.name}: {info.note}")
    wanted: list[StageClip] = []
    for stage in self._stages:
      try:
        wanted += stage.cut(item, info)
      except VideoError as error:
        self._refuse(item, f"stage {stage.name}: {error}", [stage.name])
    self._planned[item.id] = wanted
    return [clip.window for _, clip in wanted]

  def _refuse(self, item: Item, reason: str, stages: Iterable[str]) -> None:
    for name in stages:
      self._refusals[name].add(Refusal(item.name, item.line, reason))


def latent_fault(example: Example, scaling_factor: float) -> str | None:
  """Returns why the latents of a clip cannot be those of a sound VAE; None if they can.

  Args:
    scaling_factor: of the VAE; the latents are not scaled by it.
  """
  for name, mean in (("latents", example.mean), ("image's latents", image_of(example)[:, 0])):
    largest = float(np.abs(np.float32(mean)).max(initial=0.0))
    if not largest * scaling_factor <= MAX_SCALED_LATENT:
      return (
        f"its {name} reach {largest:.0f}, which is {largest * scaling_factor:.0f} when scaled; "
        f"those of a sound VAE stay below {MAX_SCALED_LATENT:.0f}"
      )
  return None


def image_noise(config: TrainConfig) -> ImageNoise | None:
  """Returns how first frames are noised; None if the config's model sees no image."""
  if not config.model.takes_image:
    return None
  image = config.image
  return ImageNoise(image.draws, image.log_sigma_mean, image.log_sigma_std, config.seed)


def by_line(refusal: Refusal) -> tuple[int, str, str]:
  """Sorts refusals in the order of the manifest."""
  return refusal.line, refusal.file, refusal.reason
