"""What attention over packed rows costs on a TPU: which blocks run, and the cycles of a block.

python benchmarks/attention.py --json
python benchmarks/attention.py --json --compile

Counts the scores that the kernels run, in rows of benchmarks/mix.py, with the blocks that training
uses: of those in the row, and of those needed (the sum of the clips' squared lengths). The
top-level figures are the forward kernel's for 75k tokens.

With --compile, for TPUs that need not be here: the compiler (libtpu 0.0.52) schedules the kernels,
and its listing tells how many bundles of instructions, one a cycle, each case of a pair of blocks
takes. With them `cost` says how many times longer the mix's attention takes than if exactly the
needed scores ran, at the pace of the best blocks, with nothing skipped. Stalls are not in it. JAX's
splash kernels are compiled beside ours, in blocks of 1024.
"""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as peer
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as peer_masks
from mix import ROWS, token_counts

from cogvideox_jax.data import packing
from cogvideox_jax.models.kernels import block_grid, segment_attention, segment_attention_forward

TOP = 75_776
BLOCKS_OF_TRAINING = segment_attention.BLOCKS["TPU v5"]  # All have the same.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SIZES = (256, 256), (512, 256), (512, 512), (1024, 256), (1024, 512), (1024, 1024)
BLOCKS = tuple(segment_attention.Blocks(*sizes) for sizes in SIZES)
HEADS, HEAD_DIM, TOKENS = 2, 64, 8192
KERNEL = re.compile(r"(splash_mha_[a-z]+|attention_[a-z]+).*-final_bundles\.txt$")
BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s*(LB|PF)?")


class Cut(NamedTuple):
  """How a kernel cuts a row, in tokens: blocks of its outer and inner loop, and parts of keys."""

  outer: int
  inner: int
  part: int
  ways: int  # In how many it may compute scores: of each it has code of its own.

  @property
  def parts(self) -> int:
    """Of a block of keys."""
    return max(self.outer, self.inner) // self.part


def cuts(blocks: segment_attention.Blocks, tokens: int) -> dict[str, Cut]:
  """By kernel."""
  keys = segment_attention_forward.block_of_keys(tokens, blocks.size)
  return {
    "attention_forward": Cut(blocks.size, keys, blocks.part, 2),
    "attention_backward": Cut(blocks.size, blocks.size, blocks.part, 1),
  }


def mix_rows(clips: int, tokens: int, most: int) -> list[np.ndarray]:
  """The lengths of the clips in each row."""
  lengths = token_counts(clips)
  layout = packing.plan_layout(lengths[lengths <= tokens], tokens, ROWS[tokens])
  starts = np.flatnonzero(np.diff(layout.rows, prepend=-1))
  return np.split(layout.lengths, starts[1:])[:most]


def segment_ids(lengths: np.ndarray, tokens: int) -> np.ndarray:
  """As the kernel sees them: padding sorts last."""
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(ids, (0, tokens - len(ids)), constant_values=len(lengths) + 1).astype(np.int32)


def count_pairs(ids: np.ndarray, cut: Cut) -> np.ndarray:
  """Pairs of blocks that are of one segment, and parts of the others that run.

  Keys are the inner blocks, or as large as these.
  """
  queries = block_grid.edges(ids, cut.outer, cut.outer)
  keys, parts = (block_grid.edges(ids, size, cut.inner) for size in (cut.inner, cut.part))

  def overlap(some: block_grid.Edges) -> np.ndarray:
    first, last = (np.asarray(x)[:, None] for x in queries)
    return (np.asarray(some.first) <= last) & (first <= np.asarray(some.last))

  first, last = (np.asarray(x) for x in keys)
  alone = overlap(keys) & (queries.first == queries.last)[:, None] & (first == last)
  others = overlap(parts) & ~np.repeat(alone, cut.inner // cut.part, axis=1)
  return np.array([alone.sum(), others.sum()])


def count(rows: list[np.ndarray], tokens: int, cut: Cut) -> dict[str, float]:
  """What the mean row has: scores run, in the row and needed, and steps of a kernel by kind."""
  tokens += -tokens % cut.outer
  alone, parts = np.mean([count_pairs(segment_ids(row, tokens), cut) for row in rows], axis=0)
  needed = sum(float(np.square(row, dtype=np.float64).sum()) for row in rows)
  return {
    "alone": alone,
    "parts": parts,
    "blocks": tokens // cut.outer,
    "steps": tokens // cut.outer * -(-tokens // cut.inner),
    "run": cut.outer * (cut.inner * alone + cut.part * parts),
    "row": tokens**2,
    "needed": needed / len(rows),
  }


def grid(clips: int, tokens: int) -> list[dict[str, Any]]:
  rows = mix_rows(clips, tokens, most=200)
  results = []
  for name, cut in cuts(segment_attention.fitting(tokens, BLOCKS_OF_TRAINING), tokens).items():
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


def read_cycles(listing: str, parts: int, ways: int) -> dict[str, int]:
  """Bundles of a pair of blocks, by the first way of those that a kernel has.

  Of one that is of a segment alone, of a part of another, of every pair, run or not, and of every
  block of the outer loop. A kernel has code for the first, then for each part, and that for each
  way; parts: 0 where it knows no parts.
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
  # A region that mostly holds others is not one of products. What stands beside these only the
  # first and the last pair of a block do.
  bodies = [one for one in regions if 2 * _within(one, regions) < one[1] - one[0]]
  bodies = sorted(sorted(bodies, key=lambda one: one[0] - one[1])[: ways * (1 + parts)])
  alone, *of_parts = (end - begin for begin, end in bodies[: 1 + parts])
  ends = sum(b - a for a, b in regions if all(b <= c or d <= a for c, d in bodies))
  return {
    "alone": alone,
    "part": sum(of_parts) // max(1, parts),
    "each": last - loop - sum(end - begin for begin, end in bodies) - ends,
    "ends": ends,
  }


def _within(one: tuple[int, int], regions: list[tuple[int, int]]) -> int:
  """How much of a region is of others inside it, those inside of these counted again."""
  return sum(b - a for a, b in regions if one != (a, b) and one[0] <= a and b <= one[1])


def ours(blocks: segment_attention.Blocks) -> Callable[..., jax.Array]:
  return lambda q, k, v, ids: segment_attention.attend_row(q, k, v, ids, blocks, False)


def jaxs(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
  """By JAX's kernels. They run all blocks of a row, but a pair's cycles are what they are."""
  mask = peer_masks.MultiHeadMask([peer_masks.FullMask((len(ids), len(ids)))] * HEADS)
  layout = peer.QKVLayout.SEQ_MINOR
  blocks = peer.BlockSizes(
    *(1024, 1024, 512),
    **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 1024),
    block_kv_dkv_compute=512,
    **dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout),
  )
  attend = peer.make_splash_mha_single_device(mask, block_sizes=blocks)
  return attend(*(x.swapaxes(1, 2) for x in (q, k, v)), peer.SegmentIds(ids, ids))


def compile_kernels(
  device: Any, attend: Callable[..., jax.Array], cut: dict[str, Cut], folder: Path
) -> Any:
  """Cycles of each kernel, forward and backward; what the compiler says where they fail."""
  place = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((HEADS, HEAD_DIM, TOKENS), jnp.bfloat16, sharding=place)
  ids = jax.ShapeDtypeStruct((TOKENS,), jnp.int32, sharding=place)

  def grads(q, k, v, ids):
    return jax.grad(lambda *x: jnp.sin(attend(*x, ids)).sum(), (0, 1, 2))(q, k, v)

  for old in folder.iterdir():
    old.unlink()
  try:
    jax.jit(grads).lower(x, x, x, ids).compile()
  except jax.errors.JaxRuntimeError as error:
    return str(error).splitlines()[0]
  listings = [(found[1], path) for path in folder.iterdir() if (found := KERNEL.search(path.name))]
  return {
    name: read_cycles(path.read_text(), *((cut[name].parts, cut[name].ways) if cut else (0, 1)))
    for name, path in listings
    if "analysis" not in path.name
  }


def cycles_of_row(cycles: dict[str, int], counts: dict[str, float]) -> float:
  """Of the mean row, one head and one kernel, on a grid as wide as the row."""
  of_pairs = counts["alone"] * cycles["alone"] + counts["parts"] * cycles["part"]
  return of_pairs + counts["steps"] * cycles["each"] + counts["blocks"] * cycles["ends"]


def compile_all(topology: str, clips: int, folder: Path) -> list[dict[str, Any]]:
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  rows = mix_rows(clips, TOP, most=50)
  results = []
  for blocks in BLOCKS:
    cut = cuts(blocks, TOKENS)
    kernels = compile_kernels(device, ours(blocks), cut, folder)
    result = {"topology": topology, "blocks": blocks, "kernels": kernels}
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
