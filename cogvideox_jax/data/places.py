"""Where the files of a manifest may be: in its folder, and nowhere else.

A manifest may come from someone else, so it must not be a way to read other files.
"""

import os
import posixpath

from etils import epath

from cogvideox_jax.data.media import not_a_file


class RefusedError(Exception):
  """A line or file is left out; the message is the reason, in one line."""


def inside(name: str, folder: epath.Path, allow_links: bool) -> epath.Path:
  """Returns the file of that name in a folder.

  Raises:
    RefusedError: it is not in the folder, or is not a regular file.
  """
  if "://" in name:
    raise RefusedError(
      "a URL, outside the manifest's folder: nothing is downloaded, fetch it into the folder"
    )
  _check_place(name, folder, allow_links)
  file = folder / name
  if reason := not_a_file(file):
    raise RefusedError(reason)
  return file


def _check_place(name: str, folder: epath.Path, allow_links: bool) -> None:
  """Raises RefusedError, with the true reason, if a name leads out of its folder."""
  if is_bucket(folder):
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "..")):
      raise RefusedError("the file is outside the manifest's folder")
    return
  root, given = os.path.realpath(folder), os.path.abspath(folder / name)
  real = os.path.realpath(folder / name)
  if os.path.isabs(name):
    for start in (root, os.path.abspath(folder)):
      if _contains(start, given) or _contains(start, real):
        relative = os.path.relpath(real if _contains(start, real) else given, start)
        raise RefusedError(
          "an absolute path, although the file is in the manifest's folder: write it relative to "
          f"the folder, {relative!r}"
        )
    raise RefusedError("an absolute path, outside the manifest's folder")
  if not _contains(os.path.abspath(folder), given):
    raise RefusedError("the file is outside the manifest's folder")
  if not allow_links and not _contains(root, real):
    raise RefusedError(
      "a link that leads outside the manifest's folder; --allow_links follows such links"
    )


def is_bucket(path: epath.Path) -> bool:
  """Returns whether a path is in a bucket, where there are no links."""
  return "://" in os.fspath(path)


def _contains(folder: str, path: str) -> bool:
  return os.path.commonpath([folder, path]) == folder
