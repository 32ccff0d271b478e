"""How fast the transformer runs and trains, beside diffusers' in PyTorch.

python benchmarks/train_step.py --json
python benchmarks/train_step.py --json --tokens=17776 --heads=48 --depth=4 --text_width=4096

Both have the same random weights, passed through our conversion, the same inputs, number type and
threads. The script checks that their outputs agree before it times anything. The programs take
turns, and each number is a median. `backward` is a forward pass and the gradients of all
parameters. `train` is the whole training step on fp32 masters: noising, loss, gradients, AdamW and
the average of the weights. `ratios` are PyTorch's seconds over ours: above 1, ours is faster.
`memory` is the growth of a process while a program first runs, with weights and inputs already in
memory.

MFU is relative to the device's bf16 peak, if that is known and the type is bfloat16. Otherwise it
is relative to the rate at which JAX multiplies two large matrices of the type in the same run.
"""

import json
import os
from functools import partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Leaves GPU memory for PyTorch.

import jax
import measure
import torch
from networks import (
  Case,
  check_outputs,
  draw_inputs,
  draw_params,
  hand_over,
  matmul_programs,
  our_programs,
  torch_programs,
  train_program,
)
from turns import TORCH_DEVICE, Run, compared, device_names, peak_memory, time_in_turn

from cogvideox_jax.models.dit import DiT

# bf16 FLOP/s of accelerators, by a substring of their names.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SIDE = {"cpu": 2048, "gpu": 8192}  # Side of the matrices whose product gives the measured rate.
PROGRAMS = ("ours_forward", "torch_forward", "ours_backward", "torch_backward", "train")


def make_programs(case: Case, names: tuple[str, ...] = PROGRAMS) -> dict[str, Run]:
  """The named programs of PROGRAMS. A library that none of them needs is not used."""
  inputs, params, made = draw_inputs(case), draw_params(DiT, case.config), {}
  if any(name.startswith("ours") for name in names):
    made |= {f"ours_{name}": run for name, run in our_programs(case, inputs, params).items()}
  if any(name.startswith("torch") for name in names):
    model = hand_over(case, params)
    made |= {f"torch_{name}": run for name, run in torch_programs(case, inputs, model).items()}
    if TORCH_DEVICE.type == "cuda":
      compiled = torch_programs(case, inputs, model, compiled=True)
      made |= {f"compiled_{name}": run for name, run in compiled.items()}
  if "train" in names:
    made["train"] = train_program(case, inputs, params)
  return made


def measure_case(case: Case, repeats: int) -> dict[str, Any]:
  runs = make_programs(case)
  differ = check_outputs(case, runs["ours_forward"](), runs["torch_forward"]())
  side = SIDE[jax.default_backend()]
  taken = time_in_turn(runs | matmul_programs(side, case.dtype), repeats)
  figures = compared(taken)
  seconds = figures["seconds"]
  rate, kind = 2 * side**3 / seconds["matmul"], jax.devices()[0].device_kind
  known = [peak for name, peak in PEAKS.items() if name in kind and case.dtype == "bfloat16"]
  peak, tokens = (known or [rate])[0], case.batch * case.row_tokens
  work = {"ours_forward": 1, "ours_backward": 3, "train": 3}  # In forward passes, by convention.
  return {
    **case._asdict(),
    "tokens": case.row_tokens,
    "outputs_differ": differ,
    **figures,
    "tokens_per_second": {name: tokens / seconds[name] for name in work},
    "matmul_flops_per_second": rate,
    "peak_flops_per_second": peak,
    "mfu": {name: n * case.forward_flops / seconds[name] / peak for name, n in work.items()},
    "memory": {
      name: peak_memory(partial(_make, case, name), of_torch=name.startswith("torch"))
      for name in PROGRAMS
    },
  }


def _make(case: Case, name: str) -> Run:
  return make_programs(case, (name,))[name]


def summary(result: dict[str, Any]) -> dict[str, str]:
  """A line for each program of a case."""
  lines = {}
  for name, seconds in result["seconds"].items():
    parts = [f"{seconds:9.4f} s"]
    for key, form in (
      ("tokens_per_second", "{:9.0f} tokens/s"),
      ("mfu", "MFU {:.1%}"),
      ("ratios", "ratio {:.2f}"),
      ("memory", "{:,} bytes"),
    ):
      parts += [form.format(result[key][name])] if name in result[key] else []
    lines[f"{result['tokens']} {name}"] = "  ".join(parts)
  return lines


def main() -> None:
  on_cpu = jax.default_backend() == "cpu"
  parser = measure.arguments(__doc__)
  parser.add_argument("--tokens", type=int, nargs="+", help="most tokens of a clip and its text")
  parser.add_argument("--heads", type=int, default=8 if on_cpu else 48, help="64 wide each")
  parser.add_argument("--depth", type=int, default=2 if on_cpu else 4)
  parser.add_argument("--text_width", type=int, default=512 if on_cpu else 4096)
  parser.add_argument("--batch", type=int, default=1, help="clips, each a row")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"])
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))  # As many as XLA takes.
  results = []
  for tokens in args.tokens or ([1024, 2048] if on_cpu else [17_776]):
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    case = Case(tokens, args.depth, args.heads, args.text_width, args.batch, dtype)
    results.append(measure_case(case, args.repeats))
  result = {
    **measure.device("jax", "flax", "torch", "diffusers"),
    **device_names(),
    "cases": results,
  }
  for case in results:
    for name, line in summary(case).items():
      print(f"{name:28} {line}")
  if args.json:
    print(json.dumps(result))


if __name__ == "__main__":
  main()
