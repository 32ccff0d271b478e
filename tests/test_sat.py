"""SAT's checkpoints: the same tensors under other names, read from files that cannot run code."""

import os
import subprocess
import sys
from pathlib import Path

import goldens
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cogvideox_jax.conversion import names, sat, tensors
from cogvideox_jax.errors import UserError
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.vae import VAE

FOLDER = goldens.Folder(Path(__file__).parent / "data" / "goldens")
FILES = {name: FOLDER.path / entry["file"] for name, entry in FOLDER.index["sat"].items()}


def sources(name: str):
  """Of a SAT file of the reference: where each tensor of diffusers' is."""
  config, _ = FOLDER.model(FOLDER.index["sat"][name]["model"])
  model, rows = (VAE, names.vae) if name == "vae" else (DiT, names.transformer)
  found = [s.name for s in tensors.slots(rows(config), tensors.abstract_params(model, config))]
  if name == "vae":
    return sat.vae_sources(found, len(config.channels))
  return sat.transformer_sources(found)


@pytest.mark.parametrize("name", FILES)
def test_a_round_trip_gives_the_same_tensors(name):
  stored = load_file(FILES[name])
  back = dict(sat.to_sat(sat.FromSAT(stored, sources(name)), sources(name)))
  assert back.keys() == stored.keys()
  for key, tensor in back.items():
    np.testing.assert_array_equal(tensor, stored[key], key)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("decoder.conv_in.conv.bias"), "missing: decoder.conv_in.conv.bias"),
    (lambda t: t.update({"decoder.more": np.zeros(2)}), "not known: decoder.more"),
  ],
)
def test_what_is_missing_or_not_known_is_named(tmp_path, change, message):
  stored = load_file(FILES["vae"])
  change(stored)
  save_file(stored, tmp_path / "vae.safetensors")
  with pytest.raises(UserError, match=message):
    sat.load_vae(tmp_path / "vae.safetensors", FOLDER.model("pvae")[0])


@pytest.mark.parametrize("container", [None, "module", "state_dict"])
def test_a_torch_file_is_read_without_what_is_not_ours(tmp_path, container):
  stored = {name: torch.from_numpy(x) for name, x in load_file(FILES["vae"]).items()}
  stored["loss.discriminator.0.weight"] = torch.zeros(3)
  torch.save({container: stored} if container else stored, tmp_path / "vae.pt")
  config, expected = FOLDER.model("pvae")
  params = sat.load_vae(tmp_path / "vae.pt", config)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert [path.name for path in tmp_path.iterdir()] == ["vae.pt"]


class Evil:
  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (self.mark,)


def test_a_torch_file_cannot_run_code(tmp_path):
  mark = tmp_path / "ran"
  torch.save({"module": {"x": Evil(str(mark))}}, tmp_path / "evil.pt")
  with pytest.raises(UserError, match=r"evil.pt cannot be read"):
    sat.load_vae(tmp_path / "evil.pt", FOLDER.model("pvae")[0])
  assert not mark.exists()


def test_without_tensors_the_reader_says_so(tmp_path):
  torch.save({"epoch": 3}, tmp_path / "none.pt")
  command = [sys.executable, "-m", "cogvideox_jax.conversion.torch_file"]
  result = subprocess.run(
    [*command, tmp_path / "none.pt", tmp_path], capture_output=True, text=True
  )
  assert result.returncode != 0
  assert "holds no tensors" in result.stderr
