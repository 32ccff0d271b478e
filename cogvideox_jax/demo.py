"""Trains a small model, samples a video and scores it against two others: what `make demo` runs.

python -m cogvideox_jax.demo --config=configs/tiny.py --workdir=runs/demo

The last line of stdout is one JSON object. A finished workdir is sampled again, not trained again.
"""

import json
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from jaxtyping import UInt8

from cogvideox_jax import command, path_flags
from cogvideox_jax.config.checks import check
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.data.contact_sheet import contact_sheet
from cogvideox_jax.data.mp4 import write_mp4
from cogvideox_jax.data.shape_scenes import held_out_prompts
from cogvideox_jax.devices import open_devices
from cogvideox_jax.evaluation.shape_scores import score
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.sharding import split_cpu
from cogvideox_jax.training import stages, transformer_run, workdir

CONFIG = command.config_flag(TrainConfig)
WORKDIR = path_flags.define("workdir", None, "Where the run lives.", required=True)
PROMPTS = flags.DEFINE_integer("prompts", 64, "Held-out captions to score with.", lower_bound=1)

BATCH_SIZE = 16  # Videos that are sampled at once, which bounds the memory.
SHEET_ROWS = 6  # Videos on the contact sheet.


def main() -> int:
  cfg, folder = CONFIG.value, epath.Path(WORKDIR.value)
  check(cfg, cfg.components)
  split_cpu(cfg.cpu_devices)
  open_devices()
  start = time.perf_counter()
  exit_code = transformer_run.train(cfg, folder)
  train_seconds = time.perf_counter() - start
  if exit_code:
    return exit_code

  pipes = {
    "demo": workdir.load(folder),
    "shipped": Pipeline.from_pretrained(cfg.components),
    "untrained": untrained(cfg),
  }
  prompts = held_out_prompts(PROMPTS.value)
  videos, scores = {}, {}
  for name, pipe in pipes.items():
    print(f"{name} model: {len(prompts)} videos of captions that training never saw", flush=True)
    videos[name] = sample(pipe, prompts)
    scores[name] = score(videos[name], prompts)
    print(", ".join(f"{word} {right:.0%}" for word, right in scores[name].items()), flush=True)

  video, sheet = folder / "sample.mp4", folder / "sample.png"
  write_mp4(video, videos["demo"][0], cfg.data.fps, {"prompt": prompts[0], "seed": 0})
  contact_sheet(videos["demo"][:SHEET_ROWS], list(prompts[:SHEET_ROWS]), sheet)
  print(f"Wrote {video} ({prompts[0]}) and frames of it and of others, {sheet}.")
  result = {"video": str(video), "sheet": str(sheet), "scores": scores}
  print(json.dumps({**result, "train_seconds": round(train_seconds, 1)}))
  return 0


def untrained(cfg: TrainConfig) -> Pipeline:
  """Returns the model with the weights that training begins with, and the positions of its end."""
  model = stages.stage_model(cfg, stages.plan(cfg)[-1].name)
  params = nnx.to_pure_dict(nnx.state(DiT(model, rngs=nnx.Rngs(cfg.seed)), nnx.Param))
  return workdir.with_transformer(cfg, (model, params), workdir.load_frozen(cfg))


def sample(pipe: Pipeline, prompts: Sequence[str]) -> list[UInt8[np.ndarray, "F H W 3"]]:
  """Samples a video of each prompt with the model's own settings; a prompt's index is its seed."""
  output = pipe(
    list(prompts),
    num_inference_steps=pipe.settings.num_inference_steps,
    guidance_scale=pipe.settings.guidance_scale,
    seed=list(range(len(prompts))),
    output_type="uint8",
    batch_size=BATCH_SIZE,
  )
  return list(output.frames)


if __name__ == "__main__":
  command.run(main)
