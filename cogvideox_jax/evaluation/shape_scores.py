"""Scores generated clips of moving shapes: reads their words and compares them with the captions.

Nothing here is learnt. The words follow from the median colour of a clip's border, the pixels that
differ from it, and where those are in each frame. Only clips of one object can be read. What cannot
be read is "none", which no caption says, so it counts as wrong.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cogvideox_jax.data import shape_clips, shape_scenes

NONE = "none"

# Thresholds, ours. Rendered clips are far from each, even if compressed, blurred or noisy.
COLOUR_DISTANCE = 90.0  # RGB distance to a colour's name; the palette's colours are 150 apart.
CONTRAST = 60.0  # RGB distance from the background from which a pixel may belong to an object.
AREA = (0.015, 0.6)  # Fractions of the frame; rendered objects cover 0.03 to 0.36, with edges 0.4.
PRESENCE = 0.8  # The fraction of frames that must show the object.
OVERLAP = 0.7  # Intersection over union with the best template; rendered clips reach 0.9.
# Travel from the first to the last third, as a fraction of the frame's side, below which an object
# stays still; in clips of 9 frames moving objects travel at least 0.13.
STILL = 0.05
DIAGONAL = 0.5  # The most travel sideways, as a fraction of the travel in the main direction.

# For a box of side 1: the area of a shape, and how far its centroid is below the box's centre.
_GEOMETRY = {"circle": (np.pi / 4, 0.0), "square": (1.0, 0.0), "triangle": (0.5, 1 / 6)}


class Reading(NamedTuple):
  """The words of a clip; "none" if a word cannot be read."""

  background: str
  colour: str
  motion: str
  shape: str


def read_scene(frames: UInt8[np.ndarray, "F H W 3"]) -> Reading:
  """Reads a clip that shows one object. A single frame has no motion to read."""
  pixels = frames.astype(np.float32)
  ground = _border_colour(pixels)
  background = _named(ground)
  contrast = np.linalg.norm(pixels - ground, axis=-1)
  area = (contrast > CONTRAST).mean(axis=(1, 2))
  seen = (area > AREA[0]) & (area < AREA[1])
  if seen.mean() < PRESENCE:
    return Reading(background, NONE, NONE, NONE)
  colour = _object_colour(pixels[seen], contrast[seen])
  # Pixels closer to the object's colour than to the background's: blurred edges end in the middle.
  direction = colour - ground
  mask = (pixels - ground) @ direction > direction @ direction / 2
  centroids = _centroids(mask)
  return Reading(
    background,
    _named(colour),
    _motion(centroids / mask.shape[:0:-1], seen),
    _shape(mask[seen], centroids[seen]),
  )


def score(
  videos: Sequence[UInt8[np.ndarray, "F H W 3"]], captions: Sequence[str]
) -> dict[str, float]:
  """Returns the fractions of videos whose background, colour, motion and shape are as captioned.

  Raises ValueError if a caption does not say one object and its motion.
  """
  if not videos or len(videos) != len(captions):
    raise ValueError(f"{len(videos)} videos cannot be scored by {len(captions)} captions.")
  wanted = [_words(caption) for caption in captions]
  right = np.array([read_scene(frames) for frames in videos]) == np.array(wanted)
  return dict(zip(Reading._fields, right.mean(axis=0).tolist(), strict=True))


def _words(caption: str) -> Reading:
  """Returns what a perfect clip of this caption reads as."""
  scene = shape_scenes.parse(caption)
  colour, shape, motion = scene.objects[0]
  if len(scene.objects) > 1 or motion is None:
    raise ValueError(f"{caption!r} must say one object and its motion to be scored.")
  return Reading(scene.background, colour, motion, shape)


def _border_colour(pixels: Float[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "3"]:
  """Returns the median colour of the border.

  An object may touch the border, but never covers half of it in half of the frames.
  """
  sides = (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1])
  return np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)


def _named(colour: Float[np.ndarray, "3"]) -> str:
  """Returns the name of the nearest colour of the palette; "none" if it is far away."""
  distances = {
    name: float(np.linalg.norm(colour - rgb)) for name, rgb in shape_scenes.PALETTE.items()
  }
  nearest = min(distances, key=distances.__getitem__)
  return nearest if distances[nearest] < COLOUR_DISTANCE else NONE


def _object_colour(
  pixels: Float[np.ndarray, "F H W 3"], contrast: Float[np.ndarray, "F H W"]
) -> Float[np.ndarray, "3"]:
  """Returns the median colour of the half of the object's pixels with the most contrast.

  They are inside the object; its blurred edges have less contrast.
  """
  middle = np.median(contrast[contrast > CONTRAST])
  return np.median(pixels[contrast >= middle], axis=0)


def _centroids(mask: Bool[np.ndarray, "F H W"]) -> Float[np.ndarray, "F 2"]:
  """Returns (x, y) in pixels for each frame; (0, 0) if it shows no object: do not use that."""
  height, width = mask.shape[1:]
  mass = np.maximum(mask.sum(axis=(1, 2)), 1)
  x = mask.sum(axis=1) @ (np.arange(width) + 0.5) / mass
  y = mask.sum(axis=2) @ (np.arange(height) + 0.5) / mass
  return np.stack([x, y], axis=1)


def _shape(mask: Bool[np.ndarray, "F H W"], centroids: Float[np.ndarray, "F 2"]) -> str:
  """Returns the shape whose template, of equal area and centroids, overlaps best in all frames."""
  area = mask.sum(axis=(1, 2)).mean()
  x, y = centroids.T
  overlaps = {}
  for shape, (unit_area, below) in _GEOMETRY.items():
    size = float(np.sqrt(area / unit_area))
    template = shape_clips.coverage(shape, x, y - below * size, size, *mask.shape[1:])
    overlaps[shape] = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
  best = max(overlaps, key=overlaps.__getitem__)
  return best if overlaps[best] > OVERLAP else NONE


def _motion(centroids: Float[np.ndarray, "F 2"], seen: Bool[np.ndarray, "F"]) -> str:
  """Returns the motion between the mean positions in the first and the last third of the frames.

  Args:
    centroids: (x, y) as fractions of the frame's sides.
  """
  third = max(1, len(centroids) // 3)
  first, last = (centroids[span][seen[span]] for span in (slice(third), slice(-third, None)))
  if len(centroids) == 1 or not len(first) or not len(last):
    return NONE
  travel = last.mean(axis=0) - first.mean(axis=0)
  if np.hypot(*travel) < STILL:
    return "still"
  main, side = np.argmax(np.abs(travel)), np.argmin(np.abs(travel))
  if abs(travel[side]) > DIAGONAL * abs(travel[main]):
    return NONE
  direction = [0, 0]
  direction[main] = int(np.sign(travel[main]))
  return next(name for name, step in shape_scenes.MOTIONS.items() if step == tuple(direction))
