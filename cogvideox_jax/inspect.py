"""Shows what an encoded dataset holds and which rows a training makes of it.

python -m cogvideox_jax.inspect DATASET [--config=FILE] [--config.KEY=VALUE]

DATASET is the folder that `encode` wrote, or the folder of one stage in it. Prints a table for
each stage, and writes two pictures into the stage's folder: packing.png shows rows as bars of
clips, and clips.png shows the first frames of some clips, decoded by the VAE of --model. Without a
model, clips.png shows the latents in false colours.

Without --config, the config is that of the dataset's `encode` or of the workdir around it. The
stage with the dataset's name reads the dataset. --stage=NAME names another stage that reads it; for
example, the last published stage reads the best clips of the stage before.

--rows=START:STOP --hosts=N --json prints instead which clips are in these rows of a training on
this dataset alone. The code of the training computes it. The output is one JSON object:
{"rows": [{"row": number, "epoch": number, "host": number, "clips": [their ids in order]}]}.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags
from etils import epath

from cogvideox_jax import command, path_flags, paths
from cogvideox_jax.config.checks import check
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.conversion.folder import SHIPPED
from cogvideox_jax.data import pictures, summary
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.data.rows import Rows
from cogvideox_jax.devices import open_devices
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import dataset_report

CONFIG = command.config_flag(TrainConfig, required=False)
MODEL = path_flags.define(
  "model",
  None,
  "The model whose VAE decodes clips.png; default: the config's components. Empty: none.",
  names=SHIPPED,
  may_be_empty=True,
)
OUTPUT = path_flags.define(
  "output", "", "The folder for the pictures; default: the stage's.", may_be_empty=True
)
STAGE = flags.DEFINE_string(
  "stage", "", "The stage of the config to show; default: each stage that has a dataset here."
)
ROWS = flags.DEFINE_string("rows", "", "START:STOP, the rows of a training to list, from 0.")
HOSTS = flags.DEFINE_integer(
  "hosts", 1, "The number of hosts that share each batch of rows.", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")


class Stage(NamedTuple):
  """A dataset, and the rows that a stage of a training reads from it."""

  name: str  # Name of the stage, or of the dataset if no stage is known to read it.
  dataset: Dataset
  rows: Rows | None  # None if there is no config, or none of its stages reads the dataset.


def main(dataset: str) -> None:
  wanted = parse_range(ROWS.value) if ROWS.value else None
  path = epath.Path(paths.absolute(dataset))
  open_devices()
  found = dataset_report.open_stages(path)
  cfg = CONFIG.value if CONFIG.given else dataset_report.kept_config(path)
  if cfg:
    check(cfg, "")
  if STAGE.value and not cfg:
    raise UserError(f"--stage={STAGE.value} is a stage of a config: give a --config=FILE.")
  stages = make_stages(cfg, found)
  if wanted:
    result = {"rows": list_rows(cfg, stages, wanted)}
    if not JSON.value:
      print(*result["rows"], sep="\n")
  else:
    result = {"stages": {stage.name: show(cfg, stage) for stage in stages}}
  if JSON.value:
    print(json.dumps(result))


def make_stages(cfg: TrainConfig | None, found: Mapping[str, Dataset]) -> list[Stage]:
  """The datasets by name, with the rows of the stages that read them; of --stage alone if given."""
  read_by = dataset_report.readers(cfg, found, STAGE.value) if cfg else {}
  stages = []
  for name, data in found.items():
    if cfg and name in read_by:
      rows = dataset_report.training_rows(cfg, read_by[name], data)
      stages.append(Stage(read_by[name], data, rows))
    elif not STAGE.value:
      stages.append(Stage(name, data, None))
  return stages


def show(cfg: TrainConfig | None, stage: Stage) -> dict:
  """Prints a stage's table and writes its pictures; returns its numbers."""
  name, dataset, rows = stage
  folder = epath.Path(OUTPUT.value) / name if OUTPUT.value else dataset.directory
  contents, packed = summary.contents(dataset), summary.packed(rows) if rows else None
  print(summary.as_text(name, contents, packed))
  print(summary.encoders_text(dataset))
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
  """The rows of the one stage here that reads a dataset.

  Raises:
    UserError: there is no such stage, or there are several.
  """
  known = [(stage.name, stage.rows) for stage in stages if stage.rows]
  if not cfg or len(known) != 1:
    raise UserError(
      f"--rows lists the rows of one stage, but {len(known)} of the stages here "
      f"({', '.join(stage.name for stage in stages)}) are in the config.\n"
      "Give --stage=NAME or the folder DATASET/STAGE of one stage; and a --config=FILE that has it."
    )
  return dataset_report.list_rows(cfg, *known[0], wanted, HOSTS.value)


def parse_range(text: str) -> range:
  """Reads START:STOP, where 0 <= START < STOP.

  Raises:
    UserError: the text has another form.
  """
  start, _, stop = text.partition(":")
  if start.isdecimal() and stop.isdecimal() and int(start) < int(stop):
    return range(int(start), int(stop))
  raise UserError(f"Wrong value: --rows={text}\nWanted: START:STOP, such as --rows=0:16")


if __name__ == "__main__":
  command.run(main, "DATASET")
