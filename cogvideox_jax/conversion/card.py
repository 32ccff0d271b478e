"""Writes the model card: README.md of a converted model, with its source, licence and digests."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax.conversion import tensors
from cogvideox_jax.conversion.components import COMPONENTS
from cogvideox_jax.data.digests import files_in, hash_files
from cogvideox_jax.models.dit_config import DiTConfig

NAME = "README.md"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_LICENCE_LINE = re.compile(r"^license(?:_name|_link)?:.*$", re.MULTILINE)

# (depth, heads) of a published transformer -> its name, and the licence lines of its release.
_PUBLISHED = {
  (30, 30): ("2B", "license: apache-2.0"),
  (42, 48): ("5B", "license: other\nlicense_name: cogvideox-license"),
}


class Origin(NamedTuple):
  """Where a model comes from."""

  name: str  # Name of the source folder or file.
  licence: str  # The licence lines in the head of the source's card; empty if there are none.
  files: tuple[epath.Path, ...]  # Files with the licence's text, which are copied.
  note: str = ""  # Further sentences of the card, such as the LoRA that was fused.

  @classmethod
  def of(cls, path: epath.Path) -> "Origin":
    """The origin of a model that is read from a folder or a file; the card is beside the file."""
    folder = path if path.is_dir() else path.parent
    card = folder / NAME
    head = _head(card.read_text()) if card.exists() else ""
    files = tuple(folder / name for name in LICENCE_FILES if (folder / name).exists())
    return cls(path.name, "\n".join(_LICENCE_LINE.findall(head)), files)


def _head(text: str) -> str:
  """The YAML head of a card, between its first two lines of dashes."""
  match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
  return match[1] if match else ""


def write(
  folder: epath.Path,
  origin: Origin,
  configs: Mapping[str, Any],
  layout: str,
  notes: Sequence[str] = (),
) -> None:
  """Writes the card and copies the licence's text. All other files must be there already.

  Args:
    configs: network's name -> its config.
    layout: the `--format` that the files have.
    notes: what differs in the layout's library, a sentence each.
  """
  for file in origin.files:
    (folder / file.name).write_bytes(file.read_bytes())
  files = [path for path in files_in(folder) if path.name != NAME]
  digests = hash_files(files)
  rows = [
    f"| `{file.relative_to(folder).as_posix()}` | `{digest}` |"
    for file, digest in zip(files, digests, strict=True)
  ]
  licence, source = _licence(origin, configs.get("transformer"))
  text = f"""---
{licence}
library_name: {"cogvideox_jax" if layout == "orbax" else layout}
pipeline_tag: text-to-video
---

# {folder.name}

Written by cogvideox_jax (`convert --format={layout}`) from `{origin.name}`.{origin.note}

{_differences(layout, notes)}## Licence

{source}

## Networks

| network | parameters |
|---|---|
{_sizes(configs)}

## Digests (sha256)

| file | sha256 |
|---|---|
""" + "\n".join(rows)
  (folder / NAME).write_text(text + "\n")


def _differences(layout: str, notes: Sequence[str]) -> str:
  """The section of what differs in the layout's library; empty if nothing does."""
  if not notes:
    return ""
  lines = "\n".join(f"- {note}" for note in notes)
  return f"## What {layout} does not know\n\n{lines}\n\n"


def _licence(origin: Origin, config: DiTConfig | None) -> tuple[str, str]:
  """The licence lines of the card's head, and a sentence that says their source."""
  if origin.licence:
    return origin.licence, "As the card of the source says, see above."
  known = _PUBLISHED.get((config.depth, config.heads)) if config else None
  if known is None:
    return "license: unknown", "The source does not say its licence; that of its weights applies."
  name, lines = known
  return lines, (
    f"The source does not say its licence. The transformer has the sizes of CogVideoX-{name},\n"
    "whose release says the one above: it applies to its weights and to what is made of them."
  )


def _sizes(configs: Mapping[str, Any]) -> str:
  """Rows of a table: each network and the number of its parameters."""
  lines = []
  for name, config in configs.items():
    shapes = tensors.flatten(COMPONENTS[name].shapes(config)).values()
    count = sum(math.prod(leaf.shape) for leaf in shapes)
    lines.append(f"| {name} | {count:,} |")
  return "\n".join(lines)
