"""The embedded default: captioned clips of moving shapes, written as real video files.

A scene is what a caption says: one or two objects, each a colour, a shape and a motion, on a
plain background. `render` decides where they are and how fast. So that a model can be scored on
what it never saw, no object of a rendered dataset is one of `held_out_scenes`.
"""

import functools
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.errors import UserError

PALETTE = {  # RGB. Any two are at least 150 apart, so each survives H.264's halved chroma.
  "red": (220, 40, 40),
  "green": (40, 180, 60),
  "blue": (40, 70, 220),
  "yellow": (235, 215, 50),
  "purple": (190, 50, 190),
  "white": (240, 240, 240),
  "black": (20, 20, 20),
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")  # Of objects.
BACKGROUNDS = ("black", "white", "blue", "green", "red")
SHAPES = ("circle", "square", "triangle")
MOTIONS = {  # Direction along (x, y); y points down.
  "right": (1, 0),
  "left": (-1, 0),
  "up": (0, -1),
  "down": (0, 1),
  "still": (0, 0),
}

IMAGE_RATE = 0.15  # Fraction of images, where the durations offer them.
PAIR_RATE = 0.15  # Fraction of scenes with two objects.
SIZES = {1: (0.5, 0.6), 2: (0.3, 0.38)}  # Of the short side, by number of objects.
SPEEDS = (0.025, 0.031)  # Of the frame's side, per frame: 40 to 50% of it in 17 frames.
HELD_OUT_COUNT = 64


class Thing(NamedTuple):
  """An object, in words."""

  colour: str
  shape: str
  motion: str | None  # None in an image.


@dataclass(frozen=True)
class Scene:
  """What a caption says."""

  objects: tuple[Thing, ...]  # One or two.
  background: str


def caption(scene: Scene) -> str:
  """At most 19 T5 tokens, the end included. `parse` is its inverse."""
  phrases = {None: "", "still": " stays still"}
  objects = (
    f"a {thing.colour} {thing.shape}{phrases.get(thing.motion, f' moves {thing.motion}')}"
    for thing in scene.objects
  )
  return f"{' and '.join(objects)} on a {scene.background} background"


def parse(text: str) -> Scene:
  """The scene whose caption this is. Raises ValueError if there is none."""
  objects, _, ground = text.partition(" on a ")
  words = [phrase.split() for phrase in objects.split(" and ")]
  things = tuple(
    Thing(w[1], w[2], w[4] if len(w) == 5 else None) for w in words if len(w) in (3, 5)
  )
  scene = Scene(things, ground.removesuffix(" background"))
  known = (
    scene.background in BACKGROUNDS
    and 1 <= len(things) == len(words) <= 2
    and all(thing.colour in COLOURS and thing.shape in SHAPES for thing in things)
    and {thing.motion for thing in things} <= set(MOTIONS) | {None}
  )
  if not known or caption(scene) != text:
    raise ValueError(
      f"{text!r} is not a caption of moving shapes, "
      "such as 'a red circle moves right on a blue background'"
    )
  return scene


@functools.cache
def held_out_scenes() -> tuple[Scene, ...]:
  """Single objects, each picked because its words, and pairs of words, were picked least before.

  So every prefix is balanced, and training sees every pair of words.
  """
  parts = {  # Words, each with its place, alone and in pairs.
    words: [
      *itertools.combinations(enumerate(words), 1),
      *itertools.combinations(enumerate(words), 2),
    ]
    for words in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    if words[0] != words[3]
  }
  # Equals come in an order that favours no word, and that no library's version changes: a shipped
  # model would otherwise be scored on what it saw.
  order = sorted(parts, key=lambda words: hashlib.sha256(",".join(words).encode()).digest())
  picked: Counter = Counter()
  scenes = []
  for _ in range(HELD_OUT_COUNT):
    words = min(order, key=lambda words: sum(picked[part] for part in parts[words]))
    order.remove(words)
    picked.update(parts[words])
    colour, shape, motion, background = words
    scenes.append(Scene((Thing(colour, shape, motion),), background))
  return tuple(scenes)


def held_out_prompts(count: int = HELD_OUT_COUNT) -> tuple[str, ...]:
  """Captions of scenes that `render_dataset` never shows, with every word about equally often."""
  if not 1 <= count <= HELD_OUT_COUNT:
    raise UserError(f"{count} held-out prompts were asked for; there are 1 to {HELD_OUT_COUNT}.")
  return tuple(map(caption, held_out_scenes()[:count]))


def draw_scene(rng: np.random.Generator, moving: bool) -> Scene:
  """A scene in which no object is held out. Images (not moving) show objects without motion."""
  while True:
    background = str(rng.choice(BACKGROUNDS))
    count = 2 if rng.random() < PAIR_RATE else 1
    colours = [colour for colour in COLOURS if colour != background]
    things = tuple(
      Thing(
        str(colour), str(rng.choice(SHAPES)), str(rng.choice(list(MOTIONS))) if moving else None
      )
      for colour in rng.choice(colours, size=count, replace=False)
    )
    if not any(Scene((thing,), background) in held_out_scenes() for thing in things):
      return Scene(things, background)


def coverage(
  shape: str,
  x: Float[np.ndarray, "F"],
  y: Float[np.ndarray, "F"],
  size: float,
  height: int,
  width: int,
) -> Float[np.ndarray, "F H W"]:
  """How much of each pixel a shape covers, 0 to 1, its edges smoothed over one pixel.

  x, y: the centre of the shape's bounding box in each frame; size: that box's side; in pixels.
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
  """Where an object is: the centre of its bounding box in each frame, and the box's side."""

  x: Float[np.ndarray, "F"]
  y: Float[np.ndarray, "F"]
  size: float


def _track(
  motion: str | None,
  sizes: tuple[float, float],
  extent: tuple[int, int, int],
  rng: np.random.Generator,
) -> Track:
  """Constant speed along one axis, from a start that keeps the object inside the frame.

  sizes: least and most, of the short side. extent: frames, height, width.
  """
  num_frames, height, width = extent
  size = rng.uniform(*sizes) * min(height, width)
  speed = rng.uniform(*SPEEDS)
  centres = []
  for step, side in zip(MOTIONS[motion or "still"], (width, height), strict=True):
    room = side - size
    # A long clip would leave the frame, so it moves more slowly.
    travel = step * min(speed * (num_frames - 1) * side, room)
    start = size / 2 + max(0.0, -travel) + rng.uniform(0, room - abs(travel))
    centres.append(start + np.linspace(0, travel, num_frames))
  return Track(centres[0], centres[1], size)


def _touch(a: Track, b: Track) -> bool:
  """Whether the bounding boxes of two objects ever come within a pixel of each other."""
  reach = (a.size + b.size) / 2 + 1
  return bool(np.any((np.abs(a.x - b.x) < reach) & (np.abs(a.y - b.y) < reach)))


def _place(scene: Scene, extent: tuple[int, int, int], rng: np.random.Generator) -> list[Track]:
  """Tracks that never touch. Objects shrink a little with each try, so that it ends."""
  low, high = SIZES[len(scene.objects)]
  while True:
    tracks = [_track(thing.motion, (low, high), extent, rng) for thing in scene.objects]
    if not any(_touch(a, b) for a, b in itertools.combinations(tracks, 2)):
      return tracks
    low, high = 0.99 * low, 0.99 * high


def render(
  scene: Scene, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "F H W 3"]:
  """Draws a scene. The generator decides sizes, places and speeds: all that no caption says."""
  frames = np.empty((num_frames, height, width, 3), np.float32)
  frames[:] = PALETTE[scene.background]
  tracks = _place(scene, (num_frames, height, width), rng)
  for thing, track in zip(scene.objects, tracks, strict=True):
    alpha = coverage(thing.shape, *track, height, width).astype(np.float32)[..., None]
    frames += alpha * (np.array(PALETTE[thing.colour], np.float32) - frames)
  return np.rint(frames).astype(np.uint8)


def draw_clip(
  index: int, seed: int, sizes: tuple[tuple[int, int], ...], durations: tuple[int, ...]
) -> tuple[Scene, UInt8[np.ndarray, "F H W 3"]]:
  """Clip `index` of the dataset of this seed, however many clips that has."""
  rng = np.random.default_rng((seed, index))
  longer = [num_frames for num_frames in durations if num_frames > 1]
  if not longer or (1 in durations and rng.random() < IMAGE_RATE):
    num_frames = 1
  else:  # Longer clips more often: each has more to teach.
    num_frames = int(rng.choice(longer, p=np.array(longer) / sum(longer)))
  height, width = map(int, rng.choice(sizes))
  scene = draw_scene(rng, moving=num_frames > 1)
  return scene, render(scene, num_frames, height, width, rng)


def contrast(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
  """How clearly the objects stand out: the spread of the pixels' colours about their mean.

  The root of the mean squared distance in RGB, over 255: 0 for frames of one colour. Of an object
  that covers a part p of a plain background it is their colours' distance times sqrt(p (1 - p)).
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

  The manifest's score of a clip is its `contrast`.
  sizes: (height, width) in pixels. durations: frames. Does nothing if the same call was finished
  before, and all of it again if that was cut short. Raises UserError if the folder holds the clips
  of another call, or a manifest of something else.
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
  part = folder / "manifest.jsonl.part"
  part.write_text("\n".join(lines) + "\n")
  part.replace(manifest)  # Last, and at once: a manifest means that every file is there.
  return manifest


def _claim(folder: epath.Path, manifest: epath.Path, **arguments) -> None:
  """Keeps what a folder's clips are rendered from, and refuses a folder of any other clips."""
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
