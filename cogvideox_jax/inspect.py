"""Shows what an encoded dataset holds, and what a training on it reads.

python -m cogvideox_jax.inspect DATASET [--config=FILE] [--config.KEY=VALUE]

DATASET is the folder that `encode` wrote, or that of one stage in it. Prints a table for each
stage, and writes two pictures beside it: packing.png, rows as bars of clips, and clips.png, the
first frames of some clips, decoded by the VAE of --model. Without a model, clips.png shows the
latents in false colours.

Without --config, the config is the one that `encode` kept, or that of the workdir it is in.

--rows=START:STOP --hosts=N --json prints instead which clips stand in those rows of a training on
this dataset alone, by the code that reads them, as one JSON object:
{"rows": [{"row": number, "epoch": number, "host": number, "clips": [their ids in order]}]}.
"""

import json
from typing import NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from cogvideox_jax import command, config
from cogvideox_jax.data import pictures, summary
from cogvideox_jax.data.records import Dataset
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import inspection

CONFIG = command.config_flag(required=False)
MODEL = flags.DEFINE_string(
  "model", None, "Whose VAE decodes clips.png; by default the config's components. Empty: none."
)
OUTPUT = flags.DEFINE_string("output", "", "Where the pictures go; by default beside the clips.")
ROWS = flags.DEFINE_string("rows", "", "START:STOP, rows of a training, from 0, to list.")
HOSTS = flags.DEFINE_integer("hosts", 1, "That share each batch of the rows.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")


class Stage(NamedTuple):
  """A dataset, and the config of a training on it, if there is one."""

  name: str
  dataset: Dataset
  config: ConfigDict | None


def main(dataset: str) -> None:
  path = epath.Path(dataset)
  found = inspection.open_stages(path)
  cfg = CONFIG.value or inspection.kept_config(path)
  if cfg:
    config.check(cfg, "")
  stages = [
    Stage(name, data, cfg and inspection.stage_config(cfg, name, any_name=len(found) == 1))
    for name, data in found.items()
  ]
  if ROWS.value:
    result = {"rows": list_rows(stages, parse_range(ROWS.value))}
    if not JSON.value:
      print(*result["rows"], sep="\n")
  else:
    result = {"stages": {stage.name: show(stage) for stage in stages}}
  if JSON.value:
    print(json.dumps(result))


def show(stage: Stage) -> dict:
  """Prints a stage's table and writes its pictures; returns its numbers."""
  name, dataset, cfg = stage
  folder = epath.Path(OUTPUT.value) / name if OUTPUT.value else dataset.directory
  rows = inspection.training_rows(cfg, dataset) if cfg else None
  contents, packed = summary.contents(dataset), summary.packed(rows) if rows else None
  print(summary.as_text(name, contents, packed))
  if rows and packed:
    padding = f"{packed.padding_fraction:.2%} padding; the more frames, the darker"
    title = f"{name}: rows of {rows.row_tokens:,} tokens, {padding}"
    pictures.packing_picture(rows, inspection.DRAWN_ROWS, title, folder / "packing.png")
    print(f"  wrote {folder / 'packing.png'}")
  else:
    print("  How it packs depends on the training: give a --config=FILE that has this stage.")
  model = MODEL.value if MODEL.value is not None else (cfg.components if cfg else "")
  inspection.write_clip_sheet(dataset, model, name, folder / "clips.png")
  print(f"  wrote {folder / 'clips.png'}")
  return summary.as_numbers(contents, packed)


def list_rows(stages: list[Stage], wanted: range) -> list[dict]:
  """The rows of the one stage that the config can train on."""
  known = [(stage.dataset, stage.config) for stage in stages if stage.config]
  if len(known) != 1:
    raise UserError(
      f"--rows lists the rows of one stage, but {len(known)} of the stages here "
      f"({', '.join(stage.name for stage in stages)}) are in the config.\n"
      "Give the folder of one stage, DATASET/STAGE, and a --config=FILE that has this stage."
    )
  dataset, cfg = known[0]
  return inspection.list_rows(cfg, inspection.training_rows(cfg, dataset), wanted, HOSTS.value)


def parse_range(text: str) -> range:
  """START:STOP, with 0 <= START < STOP."""
  start, _, stop = text.partition(":")
  if start.isdecimal() and stop.isdecimal() and int(start) < int(stop):
    return range(int(start), int(stop))
  raise UserError(f"Wrong value: --rows={text}\nWanted: START:STOP, such as --rows=0:16")


if __name__ == "__main__":
  command.run(main, "DATASET")
