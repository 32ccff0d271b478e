"""Model files that would run code, fill the memory or leave their folder: each is refused."""

import builtins
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import DIT_CONFIG, draw
from safetensors.numpy import save

from cogvideox_jax.conversion import diffusers, lora, torch_files
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT

STEM = "diffusion_pytorch_model"
GIB = 2**30


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("model") / "transformer"
  diffusers.save_transformer(folder, *draw(DiT, DIT_CONFIG))
  return folder


@pytest.fixture
def folder(tmp_path, weights) -> Path:
  """The folder of a model's transformer, without its weights."""
  there = tmp_path / "transformer"
  there.mkdir()
  (there / "config.json").write_bytes((weights / "config.json").read_bytes())
  return there


class Call:
  """Whose pickle calls a function."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def calls(canary: Path) -> dict[str, Call]:
  """Pickles that make a file, in several ways."""
  program = f"open({str(canary)!r}, 'w')"
  return {
    "os.system": Call(os.system, f"touch {canary}"),
    "eval": Call(builtins.eval, program),
    "exec": Call(builtins.exec, program),
    "open": Call(builtins.open, str(canary), "w"),
    "getattr": Call(builtins.getattr, Call(__import__, "os"), "system"),
    "os.mkdir": Call(os.mkdir, str(canary)),
  }


@pytest.mark.usefixtures("forked_torch")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("way", list(calls(Path())))
def test_a_pickle_with_code_runs_nothing(tmp_path, way, form):
  canary, file = tmp_path / "canary", tmp_path / "model.pt"
  content = {"module": {"weight": torch.zeros(2)}, "extra": calls(canary)[way]}
  if form == "pickle":
    file.write_bytes(pickle.dumps({"module": {}, "extra": calls(canary)[way]}, 2))
  else:
    torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
  with pytest.raises(UserError), torch_files.opened(file):
    pass
  assert not canary.exists()


@pytest.mark.usefixtures("forked_torch")
def test_a_zip_bomb_is_refused_and_not_unpacked(tmp_path):
  file = tmp_path / "model.pt"
  torch.save({"module": {"weight": torch.zeros(2)}}, tmp_path / "good.pt")
  with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(file, "w") as bomb:
    for entry in good.namelist():
      bomb.writestr(entry, good.read(entry))
    with bomb.open(zipfile.ZipInfo("archive/data/9"), "w", force_zip64=True) as entry:
      entry.write(b"stored")
    info = zipfile.ZipInfo("archive/data/10")
    info.compress_type = zipfile.ZIP_DEFLATED
    bomb.writestr(info, bytes(2**26))
  assert file.stat().st_size < 2**20
  with pytest.raises(UserError, match="compressed entries"), torch_files.opened(file):
    pass


def header(entries: object, size: int | None = None, data: bytes = b"") -> bytes:
  """A safetensors file with a header; size: what it says of the header's length."""
  text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
  return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(start: int, end: int, shape=(2,), dtype="F32") -> dict:
  return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


SAFETENSORS = {
  "empty": b"",
  "header of 2^63 bytes": header({}, 2**63 - 1),
  "header of 2^40 bytes": header({}, 2**40),
  "header of 100 MB that is not there": header({}, 10**8),
  "no JSON": header(b"\x80\x04pickle"),
  "deep JSON": header(b"[" * 100_000),
  "no object": header([1, 2]),
  "overlap": header({"a": tensor(0, 8), "b": tensor(4, 12)}, data=bytes(12)),
  "gap": header({"a": tensor(8, 16)}, data=bytes(16)),
  "beyond the end": header({"a": tensor(0, 2**40, (2**38,))}, data=bytes(8)),
  "negative shape": header({"a": tensor(0, 8, (-2,))}, data=bytes(8)),
  "shape that overflows": header({"a": tensor(0, 8, (2**62, 4))}, data=bytes(8)),
  "other size than the shape": header({"a": tensor(0, 8, (2**30,))}, data=bytes(8)),
  "twice one name": header(
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    data=bytes(8),
  ),
  "unknown type": header({"a": tensor(0, 8, (2,), "OBJECT")}, data=bytes(8)),
  "names that are paths": save({"../../escape": np.zeros(2), "/etc/escape": np.zeros(2)}),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=list(SAFETENSORS))
def test_a_malicious_safetensors_file_is_refused_within_bounded_memory(folder, content):
  (folder / f"{STEM}.safetensors").write_bytes(content)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(UserError):
    diffusers.load_transformer(folder)
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB
  assert not list(folder.parent.rglob("*escape*"))


PATHS = ("../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "sub\\..\\secret")
NO_NAMES = (7, ["a"], None)


@pytest.mark.parametrize("name", [*PATHS, *NO_NAMES], ids=str)
@pytest.mark.parametrize("index", ["safetensors.index.json", "bin.index.json"])
def test_an_index_that_leads_out_of_its_folder_is_refused(folder, weights, index, name):
  (folder.parent / "secret").write_bytes((weights / f"{STEM}.safetensors").read_bytes())
  fields = {"weight_map": {"a": name}}
  (folder / f"{STEM}.{index}").write_text(json.dumps(fields))
  with pytest.raises(UserError, match=r"which is no file beside it|damaged"):
    diffusers.load_transformer(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1]", "\x00", "{"])
def test_a_malicious_config_is_refused(folder, text):
  (folder / "config.json").write_text(text)
  with pytest.raises(UserError):
    diffusers.load_transformer(folder)


@pytest.mark.parametrize(
  ("names", "metadata"),
  [
    (["transformer.../../escape.lora_A.weight", "transformer.../../escape.lora_B.weight"], {}),
    (["transformer./etc/passwd.lora_A.weight", "transformer./etc/passwd.lora_B.weight"], {}),
    (["a.lora_A.weight", "a.lora_B.weight"], {"lora_adapter_metadata": "[" * 100_000}),
    (["a.lora_A.weight", "a.lora_B.weight"], {"lora_adapter_metadata": "__import__('os')"}),
    (["a.lora_A.weight", "a.lora_B.weight"], {"lora_adapter_metadata": '["../escape"]'}),
  ],
)
def test_a_malicious_lora_is_refused(tmp_path, names, metadata):
  file = tmp_path / "pytorch_lora_weights.safetensors"
  arrays = {name: np.zeros((4, 4), np.float32) for name in names}
  file.write_bytes(save(arrays, metadata={"format": "pt", **metadata}))
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError):
    config, params = draw(DiT, DIT_CONFIG)
    lora.fuse(params, config, lora.read(file))
  assert sorted(tmp_path.rglob("*")) == before


def test_arrays_of_objects_are_not_read():
  buffer = io.BytesIO()
  np.save(buffer, np.array([Call(os.system, "true")], object), allow_pickle=True)
  with pytest.raises(ValueError, match="allow_pickle"):
    np.load(io.BytesIO(buffer.getvalue()))
