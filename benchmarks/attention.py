"""What attention over packed rows costs on a TPU: which blocks run, and the cycles of a block.

python benchmarks/attention.py --json
python benchmarks/attention.py --json --compile

Counts the blocks of scores that the kernel runs, in rows of benchmarks/mix.py, with the blocks that
training uses: of those in the row, and of those needed (the sum of the clips' squared lengths over
a block's area). The top-level figures are for 75k tokens.

With --compile, for TPUs that need not be here: the compiler (libtpu 0.0.52) schedules the kernels,
and its listing tells how many bundles of instructions, one a cycle, a pair of blocks takes, run or
skipped. With them `cost` says how many times longer the mix's attention takes than if exactly the
needed scores ran, at the pace of the best blocks, with nothing skipped. Stalls are not in it. JAX's
splash kernels are compiled beside ours, in blocks of 1024.
"""

import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as peer
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as peer_masks
from mix import ROWS, token_counts

from cogvideox_jax.data import packing
from cogvideox_jax.models import block_grid, splash

TOP = 75_776
BLOCK = splash.BLOCKS["TPU v5"]  # All are of the same size.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Tokens of a block, and of the keys that each kernel takes at a time.
BLOCKS = tuple(
  splash.Blocks(*sizes)
  for sizes in (
    (256, 256, 256),
    (512, 256, 256),
    (512, 512, 512),
    (1024, 256, 256),
    (1024, 256, 512),
    (1024, 512, 512),
    (1024, 1024, 1024),
  )
)
HEADS, HEAD_DIM, TOKENS = 2, 64, 8192
KERNEL = re.compile(r"(splash_mha_[a-z]+|attention_[a-z]+).*-final_bundles\.txt$")
BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s*(LB|PF)?")


def mix_rows(clips: int, tokens: int, most: int) -> list[np.ndarray]:
  """The lengths of the clips in each row."""
  lengths = token_counts(clips)
  layout = packing.plan_layout(lengths[lengths <= tokens], tokens, ROWS[tokens])
  starts = np.flatnonzero(np.diff(layout.rows, prepend=-1))
  return np.split(layout.lengths, starts[1:])[:most]


def segment_ids(lengths: np.ndarray, tokens: int) -> np.ndarray:
  """As the kernel sees them: padding sorts last."""
  last = np.iinfo(np.int32).max
  ids = np.append(np.repeat(np.arange(1, len(lengths) + 1), lengths), [])
  return np.pad(ids, (0, tokens - len(ids)), constant_values=last).astype(np.int32)


@partial(jax.jit, static_argnames="block")
def blocks_run(ids: jax.Array, block: int) -> jax.Array:
  met = block_grid.meeting(ids, block)
  return (met.stop - met.start).sum()


def count_blocks(rows: list[np.ndarray], tokens: int, block: int) -> dict[str, Any]:
  """The mean row's pairs of blocks, and how many of them run and are needed."""
  tokens += -tokens % block
  run = sum(int(blocks_run(segment_ids(row, tokens), block)) for row in rows)
  needed = sum(float(np.square(row, dtype=np.float64).sum()) for row in rows)
  return {
    "block": block,
    "run": run / len(rows),
    "row": (tokens // block) ** 2,
    "needed": needed / block**2 / len(rows),
  }


def grid(clips: int, tokens: int) -> dict[str, Any]:
  rows = mix_rows(clips, tokens, most=200)
  counts = count_blocks(rows, tokens, splash.fitting(tokens, BLOCK).size)
  return {
    "row_tokens": tokens,
    "rows": len(rows),
    "clips_a_row": sum(map(len, rows)) / len(rows),
    **counts,
    "run_of_row": counts["run"] / counts["row"],
    "run_of_needed": counts["run"] / counts["needed"],
  }


def read_cycles(listing: str) -> dict[str, int]:
  """Bundles of a pair of blocks that runs, of every pair, of every block of the outer loop."""
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
  # The run is the longest that does not hold one of half its length; what stands beside it only the
  # first and the last pair of a block do.
  whole, *others = sorted(regions, key=lambda region: region[0] - region[1])
  begin, end = next((o for o in others if 2 * (o[1] - o[0]) > whole[1] - whole[0]), whole)
  ends = sum(b - a for a, b in others if b <= begin or a >= end)
  run = end - begin
  return {"run": run, "each": last - loop - run - ends, "ends": ends}


def ours(blocks: splash.Blocks) -> Callable[..., jax.Array]:
  return lambda q, k, v, ids: splash.attend_row(q, k, v, ids, blocks, False)


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


def compile_kernels(device: Any, attend: Callable[..., jax.Array], folder: Path) -> Any:
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
    name: read_cycles(path.read_text()) for name, path in listings if "analysis" not in path.name
  }


def cycles_of_row(kernels: dict[str, Any], counts: dict[str, Any], tokens: int) -> float:
  """Of the mean row and one head, all kernels together, on a grid as wide as the row."""
  outer = tokens / counts["block"]
  return sum(
    counts["run"] * cycles["run"] + counts["row"] * cycles["each"] + outer * cycles["ends"]
    for cycles in kernels.values()
  )


def compile_all(topology: str, clips: int, folder: Path) -> list[dict[str, Any]]:
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  rows = mix_rows(clips, TOP, most=50)
  results = []
  for blocks in BLOCKS:
    kernels = compile_kernels(device, ours(blocks), folder)
    result = {"topology": topology, "blocks": blocks, "kernels": kernels}
    if isinstance(kernels, dict):
      counts = count_blocks(rows, TOP, blocks.size)
      area = counts["needed"] * blocks.size**2
      result["pace"] = sum(kernel["run"] for kernel in kernels.values()) / blocks.size**2
      result["cycles_a_needed_score"] = cycles_of_row(kernels, counts, TOP) / area
    results.append(result)
  best = min(result["pace"] for result in results if "pace" in result)
  for result in results:
    if "pace" in result:
      result["cost"] = result["cycles_a_needed_score"] / best
  results.append({"topology": topology, "jax": compile_kernels(device, jaxs, folder)})
  print(*results, sep="\n", flush=True)
  return results


def main() -> None:
  parser = measure.arguments(__doc__)
  parser.add_argument("--clips", type=int, default=20_000)
  parser.add_argument("--compile", action="store_true", help="for TPUs; about five minutes")
  args = parser.parse_args()
  grids = {tokens: grid(args.clips, tokens) for tokens in ROWS}
  result = {**measure.device("jax"), **grids[TOP], "all": list(grids.values())}
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
