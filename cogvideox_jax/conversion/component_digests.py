"""Digests of the frozen networks of a model folder, by which a dataset knows what encoded it."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import numpy as np

from cogvideox_jax.conversion import component_fields, diffusers, orbax, weight_pickles
from cogvideox_jax.conversion.folder import ModelFolder
from cogvideox_jax.conversion.tensors import Lazy
from cogvideox_jax.data.encoded_by import EncodedBy
from cogvideox_jax.data.files import sha256
from cogvideox_jax.sharding import path_name
from cogvideox_jax.types import Params
from cogvideox_jax.version import __version__

THREADS = 2  # Each holds a parameter, or a layer of it, in memory. Hashing releases Python's lock.
CHUNK = 2**24  # Numbers that are cast at once.


def describe(folder: ModelFolder, name: str, text_drop: str, fps: float) -> EncodedBy:
  """Returns what a dataset says that this model, with these settings, encodes.

  It reads all weights of the VAE and the text encoder, layer by layer. The digest of a component
  that the folder lacks, or has no weights of that are read here, is None.

  Args:
    name: what the user calls the model.
    text_drop: config.text.drop.
    fps: config.data.fps.

  Raises:
    UserError: a component is damaged, or the VAE's config.json is missing.
  """
  vae = component_fields.read_vae(*diffusers.read_fields(folder.path / "vae", diffusers.CONFIG))
  pieces = folder.path / "tokenizer"
  return EncodedBy(
    model=name,
    vae=_digest_of(folder, "vae"),
    text_encoder=_digest_of(folder, "text_encoder"),
    tokenizer=sha256(folder.tokenizer().file) if pieces.is_dir() else None,
    scaling_factor=float(vae.scaling_factor),
    text_drop=text_drop,
    fps=float(fps),
    version=__version__,
  )


def digest(params: Params) -> str:
  """Returns a sha256 of the values of parameters, lazy or not, in the order of their paths.

  Values are hashed as float32, so that a copy in a wider type has the same digest.
  """
  leaves = jax.tree.leaves_with_path(params)
  with ThreadPoolExecutor(THREADS) as pool:
    digests = list(pool.map(_hash_values, (leaf for _, leaf in leaves)))
  lines = [
    f"{path_name(path)} {list(leaf.shape)} {found}\n"
    for (path, leaf), found in zip(leaves, digests, strict=True)
  ]
  return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _digest_of(folder: ModelFolder, component: str) -> str | None:
  files = folder.path / component
  if not files.is_dir() or not (
    orbax.is_in(files) or diffusers.has_safetensors(files) or weight_pickles.find(files)
  ):
    return None
  return digest(folder.open(component)[1])


def _hash_values(leaf: Any) -> str:
  total = hashlib.sha256()
  for array in _layers(leaf):
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, CHUNK):
      values = np.ascontiguousarray(flat[start : start + CHUNK], np.float32)
      total.update(memoryview(cast(Any, values.view(np.uint8))))
  return total.hexdigest()


def _layers(leaf: Any) -> Iterator[np.ndarray]:
  if not isinstance(leaf, Lazy):
    yield np.asarray(leaf)
    return
  for layer in leaf.layers:
    yield leaf[layer]
