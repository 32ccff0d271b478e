"""Finds what `--config` names: a file, a config that ships, or the config.json of a workdir."""

from pathlib import Path
from typing import NamedTuple

from cogvideox_jax import paths
from cogvideox_jax.config import stored
from cogvideox_jax.errors import UserError

_PACKAGE = Path(__file__).parent.parent


class Choice(NamedTuple):
  """A config file, and how ml_collections is told to load it."""

  file: Path
  argument: str  # FILE.py, or FILE.py:TEXT where get_config takes a text.


def choose(given: str) -> Choice:
  """Finds a config.

  Args:
    given: a path, `FILE.py:TEXT`, or the name of a config that ships, such as `tiny`.

  Raises:
    UserError: there is no such config.
  """
  file, colon, text = given.partition(":")
  if given.endswith(".json"):
    file, colon = given, ""
  if not file:
    raise UserError(
      f"--config={given} names nothing.\nGive a file, or: {', '.join(shipped_names())}"
    )
  if _is_name(file):
    path = shipped_folder() / f"{file}.py"
    if not path.is_file():
      raise UserError(
        f"No config is called {file}.\nThere are: {', '.join(shipped_names())}. The path of a file "
        f"has a suffix or a slash: ./{file}.py"
      )
    return Choice(path, f"{path}{colon}{text}")
  path = Path(paths.absolute(file))
  if path.is_dir():
    raise UserError(f"--config={file} is a folder.\nGive a file, such as {file}/config.json")
  if not path.is_file():
    raise UserError(
      f"Config file not found: {file}\n"
      f"Paths are taken from here: {Path.cwd()}\n"
      f"Give an existing file, such as configs/tiny.py, or a name: {', '.join(shipped_names())}"
    )
  if path.suffix == ".json":
    return Choice(path, f"{stored.__file__}:{path}")
  return Choice(path, f"{path}{colon}{text}")


def shipped_folder() -> Path:
  """Returns the folder of the configs that ship: in the package, or beside it in a checkout."""
  inside = _PACKAGE / "shipped" / "configs"
  return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
  """Returns the names of the configs that ship."""
  return sorted(path.stem for path in shipped_folder().glob("*.py"))


def _is_name(text: str) -> bool:
  return "/" not in text and "." not in text
