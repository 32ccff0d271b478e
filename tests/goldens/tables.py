"""Tables of positions and of timesteps, at real sizes."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox_jax.models import positions
from cogvideox_jax.models.dit import timestep_sinusoid
from cogvideox_jax.models.rotary import rotary_table
from cogvideox_jax.models.sincos import sincos_table
from cogvideox_jax.types import VISION

from .compared import EXACT, SINUSOID, Compared
from .folder import Case, CaseError


def sinusoids(case: Case) -> Iterator[Compared]:
  timesteps = jnp.asarray(case.stored["in.timesteps"])
  for key in case.stored:
    if key.startswith("out.dim"):
      width = int(key.removeprefix("out.dim"))
      yield Compared(key, timestep_sinusoid(timesteps, width), SINUSOID)


def _edges(size: int) -> np.ndarray:
  """Coordinates along t at h = w = 0, along h, and along w: [3 size 3]."""
  edges = np.zeros((3, size, 3), np.int32)
  for axis in range(3):
    edges[axis, :, axis] = np.arange(size)
  return edges


def rotary_tables(case: Case) -> Iterator[Compared]:
  """The reference stores its separable tables axis by axis, each angle twice."""
  call, entries = case.call, case.entry["values"]["rope"]
  head_dim = call["head_dim"]
  edges = _edges(max(max(entry["grid"]) for entry in entries))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def tables(rule, base, coordinates, grids):
    where = positions.rotary_positions(rule, coordinates, grids, base)
    return rotary_table(where, jnp.full(where.shape[:2], VISION), head_dim)

  for entry in entries:
    key, grid = entry["key"], entry["grid"]
    is_10 = key.startswith("tab.rope10")
    rule, base = ("rope", call["base10"]) if is_10 else ("rope_index", call["base15"])
    grids = np.broadcast_to(np.array(grid, np.int32), edges.shape)
    ends = np.cumsum([head_dim // 8, head_dim // 16 * 3])
    for name, table in zip(("cos", "sin"), tables(rule, tuple(base), edges, grids), strict=True):
      for axis, channels in enumerate(np.split(np.asarray(table), ends, axis=-1)):
        pairs = np.repeat(channels[axis, : grid[axis]], 2, axis=-1)
        yield Compared(f"{key}.{name}_{'thw'[axis]}", pairs, EXACT)


def crop_regions(case: Case) -> Iterator[Compared]:
  """The reference's rows end in the crop that its positions are taken from."""
  ours = []
  crops = case.stored["tab.crops"]
  if crops.dtype.kind != "i":
    raise CaseError(f"tab.crops must hold integers, not {crops.dtype}")
  for height, width, base_width, base_height, *_ in crops.tolist():
    (top, size_h), (left, size_w) = positions.crop((height, width), (base_height, base_width))
    ends = int(top) + int(size_h), int(left) + int(size_w)
    ours.append([height, width, base_width, base_height, int(top), int(left), *ends])
  yield Compared("tab.crops", np.array(ours), EXACT)


def sincos_tables(case: Case) -> Iterator[Compared]:
  """Axis by axis: the channels are those of time, of width, of height."""
  call = case.call
  sizes = {"t": call["frames"], "h": call["grid_h"], "w": call["grid_w"]}
  edges = _edges(max(sizes.values()))
  widths = {int(key.removeprefix("tab.sincos").split(".")[0]) for key in case.stored}
  for width in sorted(widths):
    experts = jnp.full(edges.shape[:2], VISION)
    table = np.asarray(sincos_table(jnp.asarray(edges), experts, width, 1.875, 1.0))
    of_time, of_width, of_height = np.split(
      table, [width // 4, width // 4 + width // 8 * 3], axis=-1
    )
    for axis, channels in ((0, of_time), (2, of_width), (1, of_height)):
      letter = "thw"[axis]
      yield Compared(f"tab.sincos{width}.{letter}", channels[axis, : sizes[letter]], EXACT)
