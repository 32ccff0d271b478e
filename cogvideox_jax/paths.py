"""Makes the paths that users give absolute, so that they mean the same file in every part."""

import os
import re

from cogvideox_jax.errors import UserError

CACHE_VARIABLE = "COGVIDEOX_JAX_CACHE"


def absolute(path: str | os.PathLike[str]) -> str:
  """Returns a path as an absolute one without `..`, because TensorStore refuses `..`.

  `~` is the home folder. Links stay as they are, except those that a later `..` climbs out of. An
  address such as gs://bucket/folder is returned as it is.

  Raises:
    UserError: the path is empty, names the home of an unknown user, or is relative to a folder that
      was deleted.
  """
  text = os.fspath(path)
  if is_address(text):
    return text
  if not text:
    raise UserError("a path is empty.\nGive a path, such as . for the current folder.")
  expanded = os.path.expanduser(text)
  if expanded.startswith("~"):
    user = expanded.split("/")[0]
    raise UserError(f"{text}: there is no user {user[1:]!r}.\nA file of that name is ./{text}")
  parts = os.path.join(_current_folder(expanded), expanded).split("/")
  if ".." in parts:
    # As the system reads it: LINK/.. is the folder above the target of the link.
    end = len(parts) - parts[::-1].index("..")
    parts = [os.path.realpath("/".join(parts[:end])), *parts[end:]]
  return "/" + os.path.normpath("/".join(parts)).lstrip("/")


def user_cache() -> str:
  """Returns the folder of what can be made again: $COGVIDEOX_JAX_CACHE, or in the user's cache."""
  if given := os.environ.get(CACHE_VARIABLE):
    return absolute(given)
  # The standard of freedesktop.org says to ignore a relative path.
  home = os.environ.get("XDG_CACHE_HOME", "")
  return absolute(os.path.join(home if os.path.isabs(home) else "~/.cache", "cogvideox_jax"))


def is_address(text: str) -> bool:
  """Returns whether a text names something by a scheme, such as gs://, and not by a path."""
  return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def _current_folder(path: str) -> str:
  """Returns what a path is relative to; empty for an absolute one."""
  if os.path.isabs(path):
    return ""
  try:
    return os.getcwd()
  except FileNotFoundError as error:
    raise UserError(
      f"{path} is relative to the current folder, which was deleted.\n"
      "Change to a folder that exists, or give a path that begins with /."
    ) from error
