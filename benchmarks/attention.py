"""What attention over packed rows costs on a TPU: which blocks run, and the cycles of a block.

python benchmarks/attention.py --json
python benchmarks/attention.py --json --compile

Counts the blocks of scores that the kernel runs, in rows of benchmarks/mix.py, with the blocks that
training uses: of those in the row, and of those needed (the sum of the clips' squared lengths over
a block's area). The top-level figures are for 75k tokens.

With --compile, for TPUs that need not be here: the compiler (libtpu 0.0.52) schedules the kernels,
and its listing tells how many bundles of instructions, one a cycle, a pair of blocks takes, run or
skipped. With them `cost` says how many times longer the mix's attention takes than if exactly the
needed scores ran, at the pace of the best blocks, with nothing skipped. Stalls are not in it.
"""

import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from mix import ROWS, token_counts

from cogvideox_jax.data import packing
from cogvideox_jax.models import splash

TOP = 75_776
CHIP = splash.CHIPS["TPU v5"]  # All have the same blocks.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Tokens of a block of queries, of keys, and of the keys that are taken at a time.
BLOCKS = (
  (256, 256, 256),
  (512, 512, 512),
  (1024, 1024, 512),
  (1024, 1024, 1024),
  (1024, 2048, 512),
  (2048, 2048, 512),
)
HEADS, HEAD_DIM = 2, 64
KERNEL = re.compile(r"splash_mha_(fwd|dq|dkv)_.*-final_bundles\.txt$")
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


@partial(jax.jit, static_argnames=("block_q", "block_kv"))
def blocks_run(ids: jax.Array, block_q: int, block_kv: int) -> jax.Array:
  return jnp.count_nonzero(splash.block_grid(ids, block_q, block_kv).block_mask)


def count_blocks(
  rows: list[np.ndarray], tokens: int, block_q: int, block_kv: int
) -> dict[str, Any]:
  """The mean row's pairs of blocks, and how many of them run and are needed."""
  tokens += -tokens % block_kv
  run = sum(int(blocks_run(segment_ids(row, tokens), block_q, block_kv)) for row in rows)
  needed = sum(float(np.square(row, dtype=np.float64).sum()) for row in rows)
  return {
    "block_q": block_q,
    "block_kv": block_kv,
    "run": run / len(rows),
    "row": (tokens // block_q) * (tokens // block_kv),
    "needed": needed / block_q / block_kv / len(rows),
  }


def grid(clips: int, tokens: int) -> dict[str, Any]:
  rows = mix_rows(clips, tokens, most=200)
  blocks = splash.make_plan(tokens, HEADS, CHIP).blocks
  counts = count_blocks(rows, tokens, blocks.block_q, blocks.block_kv)
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
      regions.append(last - opened.pop())
    if "sbr.rel" in line and "target = $region" in line:
      opened.append(last)
  # The longest is the pair's whole; in it, the run; then what only the first and last one do.
  _, run, *ends = sorted(regions, reverse=True)
  return {"run": run, "each": last - loop - run - sum(ends), "ends": sum(ends)}


def compile_kernels(device: Any, sizes: tuple[int, int, int], fused: bool, folder: Path) -> Any:
  """Cycles of each kernel, for blocks of these sizes; what the compiler says where they fail."""
  q, kv, compute = sizes
  separate = (None, None) if fused else (q, kv)
  blocks = splash_attention_kernel.BlockSizes(
    q, kv, compute, q, kv, compute, *separate, fused, **splash.TOKENS_IN_LANES
  )
  place = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((HEADS, HEAD_DIM, 4 * kv), jnp.bfloat16, sharding=place)
  ids = jax.ShapeDtypeStruct((4 * kv,), jnp.int32, sharding=place)

  def both_ways(q, k, v, ids, g):
    return jax.vjp(lambda q, k, v: splash.attend_row(q, k, v, ids, blocks, False), q, k, v)[1](g)

  for old in folder.iterdir():
    old.unlink()
  try:
    compiled = jax.jit(both_ways).lower(x, x, x, ids, x).compile()
  except jax.errors.JaxRuntimeError as error:
    return str(error).splitlines()[0]
  listings = [(found[1], path) for path in folder.iterdir() if (found := KERNEL.search(path.name))]
  return {
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    **{
      name: read_cycles(path.read_text()) for name, path in listings if "analysis" not in path.name
    },
  }


def cycles_of_row(kernels: dict[str, Any], counts: dict[str, Any], tokens: int) -> float:
  """Of the mean row and one head, all kernels together, on a grid as wide as the row."""
  outer = tokens / counts["block_q"]
  return sum(
    counts["run"] * cycles["run"] + counts["row"] * cycles["each"] + outer * cycles["ends"]
    for cycles in kernels.values()
    if isinstance(cycles, dict)
  )


def compile_all(topology: str, clips: int, folder: Path) -> list[dict[str, Any]]:
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  rows = mix_rows(clips, TOP, most=50)
  results = []
  for fused in (False, True):
    for sizes in BLOCKS:
      kernels = compile_kernels(device, sizes, fused, folder)
      result = {"topology": topology, "blocks": sizes, "fused": fused, "kernels": kernels}
      if isinstance(kernels, dict):
        counts = count_blocks(rows, TOP, *sizes[:2])
        area = counts["needed"] * sizes[0] * sizes[1]
        result["pace"] = sum(k["run"] for k in kernels.values() if isinstance(k, dict)) / (
          sizes[0] * sizes[1]
        )
        result["cycles_a_needed_score"] = cycles_of_row(kernels, counts, TOP) / area
      print(result, flush=True)
      results.append(result)
  best = {f: min(r["pace"] for r in results if "pace" in r and r["fused"] == f) for f in (0, 1)}
  for result in results:
    if "pace" in result:
      result["cost"] = result["cycles_a_needed_score"] / best[result["fused"]]
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
