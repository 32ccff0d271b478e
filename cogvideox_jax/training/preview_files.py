"""Names the files of previews."""

from etils import epath


def preview_path(folder: epath.Path, step: int, suffix: str) -> epath.Path:
  """Returns FOLDER/step_NNNNNN with a suffix such as .png, and makes the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  return folder / f"step_{step:06d}{suffix}"
