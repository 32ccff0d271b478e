"""The model card: README.md of a written model, with its source, licence and digests."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from cogvideox_jax.conversion import tensors
from cogvideox_jax.conversion.components import COMPONENTS
from cogvideox_jax.data.digests import files_in, hash_files
from cogvideox_jax.models.dit_config import DiTConfig

NAME = "README.md"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_LICENCE_LINE = re.compile(r"^license(?:_name|_link)?:.*$", re.MULTILINE)

# (depth, heads) of a published transformer -> what its release says of its licence.
_PUBLISHED = {
  (30, 30): ("2B", "license: apache-2.0"),
  (42, 48): ("5B", "license: other\nlicense_name: cogvideox-license"),
}


class Origin(NamedTuple):
  """Where a model is from."""

  name: str  # Of the folder or file.
  licence: str  # Lines of its card's head that say the licence; empty if it has none.
  files: tuple[epath.Path, ...]  # With the licence's text, to be copied.
  note: str = ""  # What else there is to say: a step, adapters.

  @classmethod
  def of(cls, path: epath.Path) -> "Origin":
    """Of a model in a folder, or in a file of one."""
    folder = path if path.is_dir() else path.parent
    card = folder / NAME
    head = _head(card.read_text()) if card.exists() else ""
    files = tuple(folder / name for name in LICENCE_FILES if (folder / name).exists())
    return cls(path.name, "\n".join(_LICENCE_LINE.findall(head)), files)


def _head(text: str) -> str:
  """The YAML between the lines of dashes that begin a card."""
  match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
  return match[1] if match else ""


def write(folder: epath.Path, origin: Origin, configs: Mapping[str, Any], layout: str) -> None:
  """Writes the card of a model whose other files are all there, and copies the licence's text.

  configs: of the networks that it has, by name.
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

# {folder.name.removesuffix(".partial")}

Written by cogvideox_jax (`convert --format={layout}`) from `{origin.name}`.{origin.note}

## Licence

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


def _licence(origin: Origin, config: DiTConfig | None) -> tuple[str, str]:
  """Lines of the card's head, and how they are known."""
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
  lines = []
  for name, config in configs.items():
    shapes = tensors.flatten(COMPONENTS[name].shapes(config)).values()
    count = sum(math.prod(leaf.shape) for leaf in shapes)
    lines.append(f"| {name} | {count:,} |")
  return "\n".join(lines)
