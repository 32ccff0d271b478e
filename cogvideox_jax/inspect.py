"""Shows what an encoded dataset holds, and what a training on it reads.

python -m cogvideox_jax.inspect DATASET [--config=FILE] [--config.KEY=VALUE]

DATASET is the folder that `encode` wrote, or that of one stage in it. Prints a table for each
stage, and writes two pictures beside it: packing.png, rows as bars of clips, and clips.png, the
first frames of some clips, decoded by the VAE of --model. Without a model, clips.png shows the
latents in false colours.

Without --config, the config is the one that `encode` kept, or that of the workdir it is in. A
dataset is read by the stage of its name; --stage=NAME tells of another that reads it, as the last
of the published stages reads the best clips of the one before.

--rows=START:STOP --hosts=N --json prints instead which clips stand in those rows of a training on
this dataset alone, by the code that reads them, as one JSON object:
{"rows": [{"row": number, "epoch": number, "host": number, "clips": [their ids in order]}]}.
"""

import json
from typing import NamedTuple

from absl import flags
from etils import epath

from cogvideox_jax import command
from cogvideox_jax.config.checks import check
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.data import pictures, summary
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import Rows
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import dataset_report

CONFIG = command.config_flag(TrainConfig, required=False)
MODEL = flags.DEFINE_string(
  "model", None, "Whose VAE decodes clips.png; by default the config's components. Empty: none."
)
OUTPUT = flags.DEFINE_string("output", "", "Where the pictures go; by default beside the clips.")
STAGE = flags.DEFINE_string(
  "stage", "", "Stage of the config to tell of; by default each that has a dataset here."
)
ROWS = flags.DEFINE_string("rows", "", "START:STOP, rows of a training, from 0, to list.")
HOSTS = flags.DEFINE_integer("hosts", 1, "That share each batch of the rows.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")


class Stage(NamedTuple):
  """A dataset, and the rows that a stage of a training reads of it, if a config says."""

  name: str  # Of the stage; of the dataset, where no stage is known.
  dataset: Dataset
  rows: Rows | None


def main(dataset: str) -> None:
  path = epath.Path(dataset)
  found = dataset_report.open_stages(path)
  cfg = CONFIG.value if CONFIG.given else dataset_report.kept_config(path)
  if cfg:
    check(cfg, "")
  if STAGE.value and not cfg:
    raise UserError(f"--stage={STAGE.value} is a stage of a config: give a --config=FILE.")
  read_by = dataset_report.readers(cfg, found, STAGE.value) if cfg else {}
  stages = [
    Stage(
      read_by.get(name, name),
      data,
      dataset_report.training_rows(cfg, read_by[name], data) if cfg and name in read_by else None,
    )
    for name, data in found.items()
    if name in read_by or not STAGE.value
  ]
  if ROWS.value:
    result = {"rows": list_rows(cfg, stages, parse_range(ROWS.value))}
    if not JSON.value:
      print(*result["rows"], sep="\n")
  else:
    result = {"stages": {stage.name: show(cfg, stage) for stage in stages}}
  if JSON.value:
    print(json.dumps(result))


def show(cfg: TrainConfig | None, stage: Stage) -> dict:
  """Prints a stage's table and writes its pictures; returns its numbers."""
  name, dataset, rows = stage
  folder = epath.Path(OUTPUT.value) / name if OUTPUT.value else dataset.directory
  contents, packed = summary.contents(dataset), summary.packed(rows) if rows else None
  print(summary.as_text(name, contents, packed))
  if rows and packed:
    padding = f"{packed.padding_fraction:.2%} padding; the more frames, the darker"
    title = f"{name}: rows of {rows.row_tokens:,} tokens, {padding}"
    pictures.packing_picture(rows, dataset_report.DRAWN_ROWS, title, folder / "packing.png")
    print(f"  wrote {folder / 'packing.png'}")
  else:
    print("  How it packs depends on the training: give a --config=FILE that has this stage.")
  model = MODEL.value if MODEL.value is not None else (cfg.components if cfg else "")
  dataset_report.write_clip_sheet(dataset, model, name, folder / "clips.png")
  print(f"  wrote {folder / 'clips.png'}")
  return summary.as_numbers(contents, packed)


def list_rows(cfg: TrainConfig | None, stages: list[Stage], wanted: range) -> list[dict]:
  """The rows of the one stage that the config can train on."""
  known = [(stage.name, stage.rows) for stage in stages if stage.rows]
  if not cfg or len(known) != 1:
    raise UserError(
      f"--rows lists the rows of one stage, but {len(known)} of the stages here "
      f"({', '.join(stage.name for stage in stages)}) are in the config.\n"
      "Give --stage=NAME or the folder DATASET/STAGE of one stage; and a --config=FILE that has it."
    )
  return dataset_report.list_rows(cfg, *known[0], wanted, HOSTS.value)


def parse_range(text: str) -> range:
  """START:STOP, with 0 <= START < STOP."""
  start, _, stop = text.partition(":")
  if start.isdecimal() and stop.isdecimal() and int(start) < int(stop):
    return range(int(start), int(stop))
  raise UserError(f"Wrong value: --rows={text}\nWanted: START:STOP, such as --rows=0:16")


if __name__ == "__main__":
  command.run(main, "DATASET")
