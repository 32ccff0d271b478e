"""The embedded default dataset: clips of moving shapes, written as real video files.

`shape_scenes` says what a scene is; `render` draws where its objects are and how fast they move.
"""

import itertools
import json
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from cogvideox_jax.data.files import write_whole
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.shape_scenes import MOTIONS, PALETTE, SHAPES, Scene, caption, draw_scene
from cogvideox_jax.errors import UserError

IMAGE_RATE = 0.15  # The fraction of images, where the durations offer them.
# The side of an object's box as a fraction of the frame's short side, by number of objects.
SIZES = {1: (0.5, 0.6), 2: (0.3, 0.38)}
# Fractions of the frame's side that an object moves per frame: 40 to 50% of it in 17 frames.
SPEEDS = (0.025, 0.031)


def coverage(
  shape: str,
  x: Float[np.ndarray, "F"],
  y: Float[np.ndarray, "F"],
  size: float,
  height: int,
  width: int,
) -> Float[np.ndarray, "F H W"]:
  """Returns how much of each pixel a shape covers, 0 to 1; edges are smoothed over one pixel.

  Args:
    x, y: the centre of the shape's bounding box in each frame, in pixels.
    size: the side of that box, in pixels.
  """
  half = size / 2
  dx = np.abs(np.arange(width) + 0.5 - x[:, None])[:, None, :]
  dy = (np.arange(height) + 0.5 - y[:, None])[:, :, None]
  match shape:
    case "circle":
      inside = half - np.hypot(dx, dy)
    case "square":
      inside = np.minimum(half - dx, half - np.abs(dy))
    case "triangle":  # Apex up: below its two sides, of slope 2, and above its base.
      inside = np.minimum((half + dy - 2 * dx) / np.sqrt(5), half - dy)
    case _:
      raise ValueError(f"Unknown shape {shape!r}; there are {SHAPES}.")
  return np.clip(inside + 0.5, 0, 1)


class Track(NamedTuple):
  """Where an object is, in pixels: its box's centre in each frame, and the box's side."""

  x: Float[np.ndarray, "F"]
  y: Float[np.ndarray, "F"]
  size: float


def _track(
  motion: str | None,
  sizes: tuple[float, float],
  extent: tuple[int, int, int],
  rng: np.random.Generator,
) -> Track:
  """Draws a track of constant speed along one axis, from a start that keeps the object inside.

  Args:
    sizes: the smallest and the largest box, as fractions of the frame's short side.
    extent: frames, height, width.
  """
  num_frames, height, width = extent
  size = rng.uniform(*sizes) * min(height, width)
  speed = rng.uniform(*SPEEDS)
  centres = []
  for step, side in zip(MOTIONS[motion or "still"], (width, height), strict=True):
    room = side - size
    # In a long clip the object moves more slowly, because it would leave the frame.
    travel = step * min(speed * (num_frames - 1) * side, room)
    start = size / 2 + max(0.0, -travel) + rng.uniform(0, room - abs(travel))
    centres.append(start + np.linspace(0, travel, num_frames))
  return Track(centres[0], centres[1], size)


def _touch(a: Track, b: Track) -> bool:
  """Returns whether the boxes of two objects ever come within a pixel of each other."""
  reach = (a.size + b.size) / 2 + 1
  return bool(np.any((np.abs(a.x - b.x) < reach) & (np.abs(a.y - b.y) < reach)))


def _draw_tracks(
  scene: Scene, extent: tuple[int, int, int], rng: np.random.Generator
) -> list[Track]:
  """Draws tracks that never touch. Objects shrink a little with each try, so that it ends."""
  low, high = SIZES[len(scene.objects)]
  while True:
    tracks = [_track(thing.motion, (low, high), extent, rng) for thing in scene.objects]
    if not any(_touch(a, b) for a, b in itertools.combinations(tracks, 2)):
      return tracks
    low, high = 0.99 * low, 0.99 * high


def render(
  scene: Scene, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "F H W 3"]:
  """Renders a scene. The generator draws sizes, positions and speeds, which no caption says."""
  frames = np.empty((num_frames, height, width, 3), np.float32)
  frames[:] = PALETTE[scene.background]
  tracks = _draw_tracks(scene, (num_frames, height, width), rng)
  for thing, track in zip(scene.objects, tracks, strict=True):
    alpha = coverage(thing.shape, *track, height, width).astype(np.float32)[..., None]
    frames += alpha * (np.array(PALETTE[thing.colour], np.float32) - frames)
  return np.rint(frames).astype(np.uint8)


def draw_clip(
  index: int, seed: int, sizes: tuple[tuple[int, int], ...], durations: tuple[int, ...]
) -> tuple[Scene, UInt8[np.ndarray, "F H W 3"]]:
  """Draws clip `index` of the dataset of this seed, however many clips that has."""
  rng = np.random.default_rng((seed, index))
  longer = [num_frames for num_frames in durations if num_frames > 1]
  if not longer or (1 in durations and rng.random() < IMAGE_RATE):
    num_frames = 1
  else:  # Longer clips are drawn more often, because each has more to teach.
    num_frames = int(rng.choice(longer, p=np.array(longer) / sum(longer)))
  height, width = map(int, rng.choice(sizes))
  scene = draw_scene(rng, moving=num_frames > 1)
  return scene, render(scene, num_frames, height, width, rng)


def contrast(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
  """Returns how clearly objects stand out: the spread of the pixels' colours about their mean.

  It is the root of the mean squared distance in RGB, divided by 255: 0 for frames of one colour.
  If an object covers a fraction p of a plain background, it is the distance of the two colours
  times sqrt(p (1 - p)).
  """
  pixels = np.float64(frames.reshape(-1, 3))  # Whole numbers, so that equal ones have no spread.
  return float(np.sqrt(pixels.var(axis=0).sum()) / 255)


def render_dataset(
  folder: epath.PathLike,
  clips: int,
  seed: int,
  *,
  sizes: tuple[tuple[int, int], ...],
  durations: tuple[int, ...],
  fps: float,
) -> epath.Path:
  """Writes clips (mp4, or png for one frame) and the manifest, whose path it returns.

  A clip's score in the manifest is its `contrast`. If the same call was finished before, this does
  nothing; if it was cut short, this does all of it again.

  Args:
    sizes: (height, width) in pixels.
    durations: frames.

  Raises:
    UserError: the folder holds the clips of another call, or a manifest of something else.
  """
  if clips < 1:
    raise UserError(f"{clips} shape clips were asked for: set config.data.clips to 1 or more.")
  folder = epath.Path(folder)
  manifest = folder / "manifest.jsonl"
  _claim(folder, manifest, clips=clips, seed=seed, sizes=sizes, durations=durations, fps=fps)
  if manifest.exists():
    return manifest
  lines = []
  for index in tqdm(range(clips), desc="Rendering shape clips", unit="clip"):
    scene, frames = draw_clip(index, seed, sizes, durations)
    name = f"clip_{index:06d}"
    file = f"{name}.png" if len(frames) == 1 else f"{name}.mp4"
    if len(frames) == 1:
      Image.fromarray(frames[0]).save(folder / file)
    else:
      write_mp4(folder / file, frames, fps)
    score = round(contrast(frames), 4)
    lines.append(json.dumps({"file": file, "caption": caption(scene), "id": name, "score": score}))
  # Written last and as a whole: if there is a manifest, every file is there.
  write_whole(manifest, ("\n".join(lines) + "\n").encode())
  return manifest


def _claim(folder: epath.Path, manifest: epath.Path, **arguments) -> None:
  """Writes down what a folder's clips are rendered from; refuses a folder of other clips."""
  kept = folder / "shapes.json"
  wanted = json.dumps(arguments)
  found = kept.read_text() if kept.exists() else ""
  if found not in ("", wanted) or (not found and manifest.exists()):
    raise UserError(
      f"{folder} already holds other clips than these.\n"
      f"  there:  {found or 'a manifest, not made by rendering shapes'}\n"
      f"  wanted: {wanted}\n"
      "Delete the folder, or choose another."
    )
  if not found:
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(wanted)
