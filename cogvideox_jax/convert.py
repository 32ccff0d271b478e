"""Converts a model or a LoRA file to another layout.

python -m cogvideox_jax.convert --source=MODEL --target=DIR --format={orbax,diffusers,sat}

MODEL is a model folder (safetensors or Orbax), a shipped name, a training workdir, a release of SAT
or one of its .pt files (both need the extra `convert`), or a LoRA file. Weights keep their bits
unless --dtype or --lora is given; configs keep their fields.
"""

import contextlib
from collections.abc import Iterator

from absl import flags
from etils import epath

from cogvideox_jax import command, model_flags, path_flags
from cogvideox_jax.conversion import (
  diffusers_limits,
  lora,
  model_contents,
  model_layouts,
  sat_release,
)
from cogvideox_jax.conversion.diffusers_limits import SampleSize
from cogvideox_jax.conversion.folder import SHIPPED, resolve
from cogvideox_jax.conversion.lora import LoRA
from cogvideox_jax.conversion.model_contents import Model
from cogvideox_jax.conversion.model_layouts import LAYOUTS
from cogvideox_jax.conversion.safetensors_file import DTYPES
from cogvideox_jax.devices import open_devices
from cogvideox_jax.errors import UserError
from cogvideox_jax.model_flags import LORA, LORA_ALPHA, LORA_WEIGHT, WEIGHTS
from cogvideox_jax.training import workdir

SOURCE = path_flags.define(
  "source", None, "The model, or LoRA file, to convert.", required=True, names=SHIPPED
)
TARGET = path_flags.define("target", None, "The folder to write; new or empty.", required=True)
FORMAT = flags.DEFINE_enum("format", None, list(LAYOUTS), "The layout to write.", required=True)
TYPES = {dtype.name: dtype for dtype in DTYPES.values() if dtype.kind != "i"}
DTYPE = flags.DEFINE_enum(
  "dtype", "keep", ["keep", *TYPES], "Type of the weights; keep: as the source has them."
)
SAMPLE_SIZE = flags.DEFINE_string(
  "sample_size",
  None,
  "HEIGHTxWIDTHxFRAMES in pixels and frames: the size at which --format=diffusers is exact; by "
  "default the model's sample size.",
)
model_flags.declare()


def main() -> None:
  target = epath.Path(TARGET.value)
  if sample_size() and FORMAT.value != "diffusers":
    raise UserError(f"--sample_size is for --format=diffusers; {FORMAT.value} needs none.")
  model_layouts.check_target(target)
  open_devices()
  if is_lora(epath.Path(SOURCE.value)):
    write_lora(epath.Path(SOURCE.value), target)
  else:
    updates = model_flags.read_lora()
    with opened(SOURCE.value) as model:
      if LORA.value and updates:
        fuse(model, epath.Path(LORA.value), updates)
      if FORMAT.value == "diffusers":
        model.notes = diffusers_limits.fit(model, sample_size())
        for note in model.notes:
          print(f"In diffusers: {note}")
      model.map_params(model_contents.checked)
      if DTYPE.value != "keep":
        model.map_params(lambda network: model_contents.cast(network, TYPES[DTYPE.value]))
      model_layouts.write(model, target, FORMAT.value)
  print(f"Wrote {target}.")


def sample_size() -> SampleSize | None:
  """The value of --sample_size; raises UserError if it is of another form."""
  return SampleSize.parse(SAMPLE_SIZE.value) if SAMPLE_SIZE.value is not None else None


@contextlib.contextmanager
def opened(source: str) -> Iterator[Model]:
  """The contents of a source of any kind; lazy parameters can be read inside the context only."""
  path = epath.Path(source)
  if workdir.is_workdir(path):
    yield workdir.open_trained(path, WEIGHTS.value)
  elif source not in SHIPPED and path.exists() and sat_release.is_release(path):
    with sat_release.opened(path) as model:
      yield model
  else:
    yield model_layouts.read_folder(resolve(source))


def fuse(model: Model, path: epath.Path, updates: LoRA) -> None:
  """Adds the updates of a LoRA file to the transformer's weights."""
  transformer = model.networks.get("transformer")
  if transformer is None:
    raise UserError(f"--lora={path}: {SOURCE.value} has no transformer for it to change.")
  transformer.params = lora.fuse(transformer.params, transformer.config, updates, LORA_WEIGHT.value)
  alpha = "" if LORA_ALPHA.value is None else f", alpha {LORA_ALPHA.value:g}"
  note = f" With the LoRA `{path.name}` at weight {LORA_WEIGHT.value:g}{alpha}."
  model.origin = model.origin._replace(note=model.origin.note + note)


def is_lora(path: epath.Path) -> bool:
  """Whether a path is a LoRA file, or a folder with one and no transformer."""
  if path.is_dir():
    found = any((path / name).exists() for name in lora.FILES)
    return found and not (path / "transformer").exists()
  return path.is_file() and lora.is_lora(path)


def write_lora(source: epath.Path, target: epath.Path) -> None:
  """Writes a LoRA file in the layout of --format."""
  if FORMAT.value == "orbax":
    raise UserError("A LoRA is kept in diffusers' or SAT's files: give --format=diffusers or sat.")
  updates = lora.read(source, LORA_ALPHA.value)
  if DTYPE.value != "keep":
    updates = lora.cast(updates, TYPES[DTYPE.value])
  with model_layouts.becoming(target) as draft:
    if FORMAT.value == "sat":
      lora.write_sat(draft / lora.SAT_FILE, updates)
    else:
      lora.write(draft / lora.FILE, updates)


if __name__ == "__main__":
  command.run(main)
