"""SAT's checkpoints: the same tensors under other names, read from files that cannot run code."""

import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from goldens.folder import Folder
from safetensors.numpy import load_file, save_file

from cogvideox_jax.conversion import sat, tensors, torch_files
from cogvideox_jax.conversion.components import AUTOENCODER, TRANSFORMER
from cogvideox_jax.conversion.safetensors_file import SafetensorsFiles
from cogvideox_jax.errors import UserError

FOLDER = Folder(Path(__file__).parent / "data" / "goldens")
FILES = {name: FOLDER.path / entry["file"] for name, entry in FOLDER.sat.items()}


def component_of(name: str):
  """The component that a SAT file of the reference holds, and its config."""
  config, _ = FOLDER.model(FOLDER.sat[name]["model"])
  return (AUTOENCODER if name == "vae" else TRANSFORMER), config


@pytest.mark.parametrize("name", FILES)
def test_a_round_trip_gives_the_same_tensors(name):
  stored, (component, config) = SafetensorsFiles([FILES[name]]), component_of(name)
  back = sat.as_file(sat.read(stored, component, config), component, config)
  assert back.keys() == stored.keys()
  for key, tensor in back.items():
    assert back.spec(key) == stored.spec(key) == (tensor.dtype, tensor.shape)
    np.testing.assert_array_equal(tensor, stored[key], key)


@pytest.mark.usefixtures("forked_torch")
def test_a_written_torch_file_is_read_again_bit_by_bit(tmp_path):
  component, config = component_of("vae")
  halves = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(FILES["vae"]).items()}
  torch_files.write(tmp_path / "vae.pt", "state_dict", tensors.InMemory(halves))
  content = torch.load(tmp_path / "vae.pt", weights_only=True)["state_dict"]
  assert content.keys() == halves.keys()
  assert {x.dtype for x in content.values()} == {torch.bfloat16}
  expected = tensors.materialize(sat.read(tensors.InMemory(halves), component, config))
  jax.tree.map(np.testing.assert_array_equal, sat.load_vae(tmp_path / "vae.pt", config), expected)


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


@pytest.mark.usefixtures("forked_torch")
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


def test_a_torch_file_cannot_run_code(tmp_path):  # In the very process that users have.
  mark = tmp_path / "ran"
  torch.save({"module": {"x": Evil(str(mark))}}, tmp_path / "evil.pt")
  with pytest.raises(UserError, match=r"evil.pt cannot be read"):
    sat.load_vae(tmp_path / "evil.pt", FOLDER.model("pvae")[0])
  assert not mark.exists()


@pytest.mark.usefixtures("forked_torch")
def test_without_tensors_the_reader_says_so(tmp_path):
  torch.save({"epoch": 3}, tmp_path / "none.pt")
  with pytest.raises(UserError, match=r"none.pt cannot be read: it holds no tensors"):
    sat.load_vae(tmp_path / "none.pt", FOLDER.model("pvae")[0])
