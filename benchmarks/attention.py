"""The cost of attention over packed rows on a TPU: blocks computed, and cycles per block.

python benchmarks/attention.py --json
python benchmarks/attention.py --json --compile

Counts the scores that the kernels compute in rows of benchmarks/mix.py, with the blocks of
training, as a fraction of the row's scores and of the needed scores (the sum of the clips' squared
lengths). The top-level figures are the forward kernel's for 75k tokens.

With --compile, the TPU compiler (libtpu 0.0.52) schedules the kernels; no TPU is needed. Its
listing gives the number of instruction bundles, one a cycle, for each kind of pair of blocks. From
these, `cost` is the time of the mix's attention divided by the time of an ideal kernel that
computes exactly the needed scores, at the pace of the best blocks, and skips nothing. Stalls are
not included. JAX's splash kernels are compiled for comparison, in blocks of 1024.
"""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as peer
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as peer_masks
from mix import ROWS, token_counts

from cogvideox_jax.data import packing
from cogvideox_jax.models.kernels import segment_attention
from cogvideox_jax.models.kernels.block_grid import BlockSizes, Edges, block_edges, fit_blocks
from cogvideox_jax.models.kernels.segment_attention_forward import key_tile

TOP = 75_776
TRAINING = segment_attention.BLOCK_SIZES["TPU v5"]  # All kinds have the same sizes.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SIZES = tuple(
  BlockSizes(*sizes)
  for sizes in ((256, 256), (512, 256), (512, 512), (1024, 256), (1024, 512), (1024, 1024))
)
HEADS, HEAD_DIM, TOKENS = 2, 64, 8192
KERNEL = re.compile(r"(splash_mha_[a-z]+|attention_[a-z]+).*-final_bundles\.txt$")
BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s*(LB|PF)?")


class Cut(NamedTuple):
  """How a kernel cuts a row, in tokens: blocks of its outer and inner loop, and key blocks."""

  outer: int
  inner: int
  key_block: int
  ways: int  # The kernel has separate code for each of so many ways to compute scores.

  @property
  def key_blocks(self) -> int:
    """Key blocks in one block of the outer or inner loop, whichever is larger."""
    return max(self.outer, self.inner) // self.key_block


def cuts(sizes: BlockSizes, tokens: int) -> dict[str, Cut]:
  """The cut of each kernel, by the kernel's name."""
  keys = key_tile(tokens, sizes.block)
  return {
    "attention_forward": Cut(sizes.block, keys, sizes.key_block, 2),
    "attention_backward": Cut(sizes.block, sizes.block, sizes.key_block, 1),
  }


def mix_rows(clips: int, tokens: int, most: int) -> list[np.ndarray]:
  """The lengths of the clips in each row."""
  lengths = token_counts(clips)
  layout = packing.plan_layout(lengths[lengths <= tokens], tokens, ROWS[tokens])
  starts = np.flatnonzero(np.diff(layout.rows, prepend=-1))
  return np.split(layout.lengths, starts[1:])[:most]


def segment_ids(lengths: np.ndarray, tokens: int) -> np.ndarray:
  """Segment ids as the kernel sees them: padding sorts last."""
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(ids, (0, tokens - len(ids)), constant_values=len(lengths) + 1).astype(np.int32)


def count_pairs(ids: np.ndarray, cut: Cut) -> np.ndarray:
  """Counts pairs of blocks that hold one segment, and computed key blocks of the other pairs.

  Blocks of keys have the size of the inner blocks.
  """
  queries, tiles, key_blocks = (
    block_edges(jnp.asarray(ids), size, group)
    for size, group in (
      (cut.outer, cut.outer),
      (cut.inner, cut.inner),
      (cut.key_block, cut.inner),
    )
  )

  def overlap(keys: Edges) -> np.ndarray:
    first, last = (np.asarray(x)[:, None] for x in queries)
    return (np.asarray(keys.first) <= last) & (first <= np.asarray(keys.last))

  first, last = (np.asarray(x) for x in tiles)
  alone = overlap(tiles) & (queries.first == queries.last)[:, None] & (first == last)
  others = overlap(key_blocks) & ~np.repeat(alone, cut.inner // cut.key_block, axis=1)
  return np.array([alone.sum(), others.sum()])


def count(rows: list[np.ndarray], tokens: int, cut: Cut) -> dict[str, float]:
  """Counts for the mean row: scores computed, in the row and needed; steps of a kernel by kind."""
  tokens += -tokens % cut.outer
  alone, key_blocks = np.mean([count_pairs(segment_ids(row, tokens), cut) for row in rows], axis=0)
  needed = sum(float(np.square(row, dtype=np.float64).sum()) for row in rows)
  return {
    "alone": alone,
    "key_blocks": key_blocks,
    "blocks": tokens // cut.outer,
    "steps": tokens // cut.outer * -(-tokens // cut.inner),
    "run": cut.outer * (cut.inner * alone + cut.key_block * key_blocks),
    "row": tokens**2,
    "needed": needed / len(rows),
  }


def grid(clips: int, tokens: int) -> list[dict[str, Any]]:
  rows = mix_rows(clips, tokens, most=200)
  results = []
  for name, cut in cuts(fit_blocks(tokens, TRAINING), tokens).items():
    counts = count(rows, tokens, cut)
    results.append(
      {
        "row_tokens": tokens,
        "kernel": name,
        "rows": len(rows),
        "clips_a_row": sum(map(len, rows)) / len(rows),
        **cut._asdict(),
        **counts,
        "run_of_row": counts["run"] / counts["row"],
        "run_of_needed": counts["run"] / counts["needed"],
      }
    )
  return results


def read_cycles(listing: str, key_blocks: int, ways: int) -> dict[str, int]:
  """Reads the bundles of a pair of blocks from a listing, for the first way to compute scores.

  Returns the bundles of a pair that holds one segment (`alone`), of one key block of another pair
  (`key_block`), of every pair, computed or not (`each`), and of every block of the outer loop
  (`ends`).

  Args:
    key_blocks: those of a pair, for each of which the kernel has code after that for `alone`; 0 if
      the kernel knows no key blocks.
    ways: how often all that code is repeated.
  """
  loop, last, opened, regions = 0, 0, [], []
  for line in listing.splitlines():
    found = BUNDLE.match(line)
    if not found or ":" not in line[:16]:
      continue
    last, mark = int(found[1], 16), found[2]
    if mark == "LB" and not loop:
      loop = last
    if mark == "PF" and opened:
      regions.append((opened.pop(), last))
    if "sbr.rel" in line and "target = $region" in line:
      opened.append(last)
  # A region that mostly holds other regions computes no products. Code outside these regions runs
  # only for the first and the last pair of a block.
  bodies = [one for one in regions if 2 * _within(one, regions) < one[1] - one[0]]
  bodies = sorted(sorted(bodies, key=lambda one: one[0] - one[1])[: ways * (1 + key_blocks)])
  alone, *others = (end - begin for begin, end in bodies[: 1 + key_blocks])
  ends = sum(b - a for a, b in regions if all(b <= c or d <= a for c, d in bodies))
  return {
    "alone": alone,
    "key_block": sum(others) // max(1, key_blocks),
    "each": last - loop - sum(end - begin for begin, end in bodies) - ends,
    "ends": ends,
  }


def _within(one: tuple[int, int], regions: list[tuple[int, int]]) -> int:
  """Bundles of the regions inside a region; regions nested deeper count again."""
  return sum(b - a for a, b in regions if one != (a, b) and one[0] <= a and b <= one[1])


def ours(sizes: BlockSizes) -> Callable[..., jax.Array]:
  return lambda q, k, v, ids: segment_attention.attend_row(q, k, v, ids, sizes, False)


def jaxs(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
  """Attention by JAX's kernels. They compute all blocks, but cycles of a pair can be compared."""
  mask = peer_masks.MultiHeadMask([peer_masks.FullMask((len(ids), len(ids)))] * HEADS)
  layout = peer.QKVLayout.SEQ_MINOR
  blocks = peer.BlockSizes(
    *(1024, 1024, 512),
    **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 1024),
    block_kv_dkv_compute=512,
    **dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout),
  )
  attend = peer.make_splash_mha_single_device(mask, block_sizes=blocks)
  out = attend(*(x.swapaxes(1, 2) for x in (q, k, v)), peer.SegmentIds(ids, ids))
  return cast(jax.Array, out)  # With residuals, which are not asked for, it would be a tuple.


def compile_kernels(
  device: Any, attend: Callable[..., jax.Array], cut: dict[str, Cut], folder: Path
) -> Any:
  """Cycles of each kernel, forward and backward; the compiler's message if it fails."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((HEADS, HEAD_DIM, TOKENS), jnp.bfloat16, sharding=sharding)
  ids = jax.ShapeDtypeStruct((TOKENS,), jnp.int32, sharding=sharding)

  def grads(q, k, v, ids):
    return jax.grad(lambda *x: jnp.sin(attend(*x, ids)).sum(), (0, 1, 2))(q, k, v)

  for old in folder.iterdir():
    old.unlink()
  try:
    jax.jit(grads).lower(x, x, x, ids).compile()
  except jax.errors.JaxRuntimeError as error:
    return str(error).splitlines()[0]
  listings = [(found[1], path) for path in folder.iterdir() if (found := KERNEL.search(path.name))]
  known = {name: (one.key_blocks, one.ways) for name, one in cut.items()}
  return {
    name: read_cycles(path.read_text(), *known.get(name, (0, 1)))
    for name, path in listings
    if "analysis" not in path.name
  }


def cycles_of_row(cycles: dict[str, int], counts: dict[str, float]) -> float:
  """Cycles of one kernel for one head of the mean row, on a grid as wide as the row."""
  of_pairs = counts["alone"] * cycles["alone"] + counts["key_blocks"] * cycles["key_block"]
  return of_pairs + counts["steps"] * cycles["each"] + counts["blocks"] * cycles["ends"]


def compile_all(topology: str, clips: int, folder: Path) -> list[dict[str, Any]]:
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  rows = mix_rows(clips, TOP, most=50)
  results = []
  for sizes in SIZES:
    cut = cuts(sizes, TOKENS)
    kernels = compile_kernels(device, ours(sizes), cut, folder)
    result = {"topology": topology, "blocks": sizes, "kernels": kernels}
    if isinstance(kernels, dict):
      counts = {name: count(rows, TOP, of_kernel) for name, of_kernel in cut.items()}
      result["pace"] = sum(
        kernel["alone"] / cut[name].outer / cut[name].inner for name, kernel in kernels.items()
      )
      result["cycles_a_needed_score"] = sum(
        cycles_of_row(kernel, counts[name]) / counts[name]["needed"]
        for name, kernel in kernels.items()
      )
    results.append(result)
  best = min(result["pace"] for result in results if "pace" in result)
  for result in results:
    if "pace" in result:
      result["cost"] = result["cycles_a_needed_score"] / best
  results.append({"topology": topology, "jax": compile_kernels(device, jaxs, {}, folder)})
  print(*results, sep="\n", flush=True)
  return results


def main() -> None:
  parser = measure.arguments(__doc__)
  parser.add_argument("--clips", type=int, default=20_000)
  parser.add_argument("--compile", action="store_true", help="for TPUs; about five minutes")
  args = parser.parse_args()
  grids = {tokens: grid(args.clips, tokens) for tokens in ROWS}
  lines = [line for lines in grids.values() for line in lines]
  result = {**measure.device("jax"), **grids[TOP][0], "all": lines}
  if args.compile:
    with tempfile.TemporaryDirectory() as folder:
      os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
      }
      result["compiled"] = [
        line for name in TOPOLOGIES for line in compile_all(name, args.clips, Path(folder))
      ]
  measure.report(result, args.json)


if __name__ == "__main__":
  main()
