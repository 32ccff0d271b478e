"""What a machine must have before a training begins on it: the checks of `preflight`.

Each check returns a `Finding` of this process and never raises for what it looks for.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
from etils import epath
from packaging.requirements import Requirement

from cogvideox_jax import hosts
from cogvideox_jax.aot.report import report
from cogvideox_jax.aot.topology import CHIPS, GIB
from cogvideox_jax.config.read import read, to_json
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.data.dataset_index import damaged_files
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import stage_data

SKEW = 30.0  # Seconds that clocks may differ; ours. Locks in buckets count on them.
# What packages for buckets raise, ImportError where there is none.
STORAGE_FAULTS = (OSError, RuntimeError, ValueError, ImportError)
# What JAX calls the devices of a kind of TPU.
DEVICE_KINDS = {
  "v4": ("TPU v4",),
  "v5e": ("TPU v5 lite", "TPU v5e"),
  "v5p": ("TPU v5", "TPU v5p"),
  "v6e": ("TPU v6 lite", "TPU v6e"),
  "tpu7x": ("TPU7x", "TPU v7x"),
}


class Finding(NamedTuple):
  """What a check found."""

  check: str
  ok: bool
  text: str  # What was found; if it is not right, what is right and how to mend it.


def chips(topology: str) -> Finding:
  """Whether the devices of the whole job are those of a topology; "": whether there are any."""
  devices = jax.devices()
  kind, count = devices[0].device_kind, len(devices)
  found = f"{count} devices of kind {kind} on {jax.process_count()} hosts"
  if not topology:
    return Finding("chips", True, found)
  wanted, number = expected_devices(topology)
  if kind in DEVICE_KINDS[wanted] and count == number:
    return Finding("chips", True, f"{found}: {topology}")
  return Finding(
    "chips",
    False,
    f"{found}, but {topology} is {number} devices of kind {' or '.join(DEVICE_KINDS[wanted])}. "
    "Ask for these TPUs, start the job on every host, and end what else uses the TPUs.",
  )


def expected_devices(topology: str) -> tuple[str, int]:
  """Returns a topology's kind and its number of JAX devices.

  Raises:
    UserError: it is no topology.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})(?::([1-9]\d*))?", topology)
  if not match or match[1] not in CHIPS:
    raise UserError(
      f"Not a TPU topology: {topology!r}\n"
      f"Wanted: KIND:SHAPE[:SLICES], such as v5p:2x2x4; kinds are {', '.join(CHIPS)}."
    )
  number = math.prod(map(int, match[2].split("x"))) * CHIPS[match[1]].devices
  return match[1], number * int(match[3] or 1)


def versions(needs_tpu: bool) -> Finding:
  """Whether jaxlib and libtpu are those that jax asks for, and the same on all hosts.

  Args:
    needs_tpu: whether a missing libtpu, or another, is a fault.
  """
  here = {name: _version(name) for name in ("cogvideox-jax", "jax", "jaxlib", "libtpu")}
  found = ", ".join(f"{name} {version or 'is absent'}" for name, version in here.items())
  if len(set(hosts.each(found))) > 1:
    return Finding("versions", False, f"{found}; other hosts differ. Use one image on all hosts.")
  wrong = [
    f"jax {here['jax']} needs {need}"
    for need in _needs_of_jax()
    if not _satisfied(need, here[need.name]) and (needs_tpu or need.name != "libtpu")
  ]
  if wrong:
    mend = "Install what it needs: pip install 'cogvideox-jax[tpu]'."
    return Finding("versions", False, f"{found}: {'; '.join(wrong)}. {mend}")
  return Finding("versions", True, found)


def _needs_of_jax() -> Iterator[Requirement]:
  """Yields what jax and its extra `tpu` say of jaxlib and libtpu."""
  for line in metadata.requires("jax") or ():
    need = Requirement(line)
    if need.name in ("jaxlib", "libtpu") and (
      need.marker is None or need.marker.evaluate({"extra": "tpu"})
    ):
      need.marker = None
      yield need


def _satisfied(need: Requirement, version: str) -> bool:
  return bool(version) and need.specifier.contains(version, prereleases=True)


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return ""


def bucket(folder: epath.Path) -> Finding:
  """Whether this process can write, read, list and delete in a folder whose clock is right."""
  data = os.urandom(2**20)
  place = folder / f".preflight-{jax.process_index()}"
  step = "written to"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    place.write_bytes(data)
    step = "read"
    same = place.read_bytes() == data
    seconds, skew = time.time() - begun, place.stat().mtime - begun
    step = "listed"
    listed = place.name in {path.name for path in folder.iterdir()}
    step = "deleted from"
    place.unlink()
    gone = not place.exists()
  except STORAGE_FAULTS as error:
    words = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return Finding(
      "bucket", False, f"{folder} cannot be {step}: {words}. Give this account the right to."
    )
  if not (same and listed and gone):
    fault = "reads other bytes" if not same else "does not list a file" if not listed else "keeps"
    return Finding("bucket", False, f"{folder} {fault} after a write: choose another place.")
  if abs(skew) > SKEW + seconds:
    return Finding(
      "bucket", False, f"the clock of {folder} differs by {skew:.0f} s: set this host's clock."
    )
  return Finding("bucket", True, f"{folder}: 1 MiB written and read in {seconds:.2f} s, deleted")


def clock() -> Finding:
  """Whether the clocks of all hosts agree."""
  hosts.each("ready")  # Compiles; the next call is fast, and ends on all hosts at one time.
  times = [float(text) for text in hosts.each(repr(time.time()))]
  spread = max(times) - min(times)
  if spread > SKEW:
    late = times.index(min(times))
    return Finding(
      "clock", False, f"the clocks differ by {spread:.0f} s; process {late} is last: set its clock."
    )
  return Finding("clock", True, f"{len(times)} hosts within {spread:.1f} s")


def datasets(config: TrainConfig | VAETrainConfig) -> Finding:
  """Whether the files of the encoded datasets are as they were written. Hosts share the files."""
  if not isinstance(config, TrainConfig) or not (config.data.path or config.data.mixture):
    return Finding("digests", True, "the config names no encoded dataset")
  share = slice(jax.process_index(), None, jax.process_count())
  folders, damaged = set(), []
  try:
    for stage in config.stages:
      opened = stage_data.open_data(config, stage, epath.Path())
      folders |= {epath.Path(dataset.directory) for dataset in opened.values()}
    for folder in sorted(folders):
      damaged += [str(folder / name) for name in damaged_files(folder, share)]
  except UserError as error:
    return Finding("digests", False, " ".join(str(error).split()))
  if damaged:
    return Finding(
      "digests",
      False,
      f"damaged: {', '.join(damaged)}. The encode command that made them writes them anew.",
    )
  return Finding("digests", True, f"{len(folders)} datasets are as they were written")


def fit(config: TrainConfig | VAETrainConfig, topology: str) -> Finding:
  """Whether the first stage's step fits the topology. The first process compiles it.

  It compiles in a process of its own, because compiling for a topology keeps JAX off real devices.
  """
  if not topology:
    return Finding("fit", True, "not asked for: give --topology")
  if not hosts.is_first():
    return Finding("fit", True, "left to process 0")
  with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
    try:
      result = pool.submit(_report, type(config), to_json(config), topology).result()
    except UserError as error:
      return Finding("fit", False, " ".join(str(error).split()))
    except BrokenProcessPool:
      words = "the compiler's process died; if it says nothing above, the host lacks memory."
      return Finding("fit", False, words)
  return fitting(result)


def _report(
  schema: type[TrainConfig | VAETrainConfig], config: str, topology: str
) -> dict[str, Any]:
  return report(read(schema, json.loads(config)), topology)


def fitting(result: Mapping[str, Any]) -> Finding:
  """What the object of `compile --json` says of memory."""
  needs = f"{result['bytes_per_chip']['total'] / GIB:.2f}"
  text = f"stage 1 needs {needs} of {result['hbm_bytes'] / GIB:.2f} GiB on a device"
  return Finding("fit", result["fits"], " ".join([f"{text}.", *result["fixes"]]))
