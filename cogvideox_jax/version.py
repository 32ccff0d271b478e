"""The package's version, and what messages say about files of another version."""

__version__ = "0.2.0.dev0"
FIRST_RECORDED = "0.2"  # Earlier versions did not write their number into files.


def name_writer(stored: str | None) -> str:
  """A line that names the version which wrote a file; empty if it is this one.

  For a message that the file does not load.

  stored: what the file says; None if it does not say it.
  """
  if stored == __version__:
    return ""
  writer = f"version {stored}" if stored else f"a version before {FIRST_RECORDED}"
  return f"It was written by {writer} of cogvideox_jax; this is version {__version__}."
