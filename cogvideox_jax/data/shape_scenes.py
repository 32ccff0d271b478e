"""The words of the embedded clips of moving shapes: scenes, their captions, and which are held out.

A scene is what a caption says: one or two objects, each a colour, a shape and a motion, on a
plain background. Some scenes of one object are held out: no object of a training scene is one of
them, so a model can be scored on what it never saw.
"""

import functools
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
# Colours of objects.
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
BACKGROUNDS = ("black", "white", "blue", "green", "red")
SHAPES = ("circle", "square", "triangle")
MOTIONS = {  # Direction along (x, y); y points down.
  "right": (1, 0),
  "left": (-1, 0),
  "up": (0, -1),
  "down": (0, 1),
  "still": (0, 0),
}

PAIR_RATE = 0.15  # The fraction of scenes with two objects.
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
  """Returns the caption of a scene: at most 19 T5 tokens, with the end. `parse` is its inverse."""
  phrases = {None: "", "still": " stays still"}
  objects = (
    f"a {thing.colour} {thing.shape}{phrases.get(thing.motion, f' moves {thing.motion}')}"
    for thing in scene.objects
  )
  return f"{' and '.join(objects)} on a {scene.background} background"


def parse(text: str) -> Scene:
  """Returns the scene whose caption this is. Raises ValueError if there is none."""
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
  """Returns the held-out scenes, each of one object.

  Each is the one whose words, and pairs of words, were picked least before. So every prefix is
  balanced, and training still sees every pair of words.
  """
  features = {  # Single words and pairs of words, each word with its position in the scene.
    words: [
      *itertools.combinations(enumerate(words), 1),
      *itertools.combinations(enumerate(words), 2),
    ]
    for words in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    if words[0] != words[3]
  }
  # Ties are broken by a hash, which favours no word and is the same in every version of every
  # library. Otherwise a shipped model would be scored on scenes that it was trained on.
  order = sorted(features, key=lambda words: hashlib.sha256(",".join(words).encode()).digest())
  picked: Counter = Counter()
  scenes = []
  for _ in range(HELD_OUT_COUNT):
    words = min(order, key=lambda words: sum(picked[feature] for feature in features[words]))
    order.remove(words)
    picked.update(features[words])
    colour, shape, motion, background = words
    scenes.append(Scene((Thing(colour, shape, motion),), background))
  return tuple(scenes)


def held_out_prompts(count: int = HELD_OUT_COUNT) -> tuple[str, ...]:
  """Returns captions of held-out scenes, with every word about equally often.

  Raises UserError if there are not so many.
  """
  if not 1 <= count <= HELD_OUT_COUNT:
    raise UserError(f"{count} held-out prompts were asked for; there are 1 to {HELD_OUT_COUNT}.")
  return tuple(map(caption, held_out_scenes()[:count]))


def draw_scene(rng: np.random.Generator, moving: bool) -> Scene:
  """Draws a scene in which no object is held out. Objects of images (not moving) have no motion."""
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
