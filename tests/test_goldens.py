"""Reference tensors of diffusers and transformers, and that the runner tells right from wrong."""

import json
import shutil
from pathlib import Path

import goldens.runner
import jax
import numpy as np
import pytest
from goldens.__main__ import main
from goldens.folder import Folder
from goldens.runner import run
from safetensors.numpy import load_file, save_file

FOLDER = Folder(Path(__file__).parent / "data" / "goldens")


def test_every_reference_model_counts_as_many_parameters():
  for name, model in FOLDER.index["models"].items():
    # A table of positions is a buffer to the reference, which does not count it.
    params = {k: x for k, x in FOLDER.model(name)[1].items() if k != "position_table"}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == model["num_params"], name


# Beside others of their kind: other sizes, numbers of frames, tiles, SAT's names and a LoRA.
SLOW = {
  "lora_transformer_5b",
  "sat:transformer_15_i2v",
  "transformer_15_altsize",
  "transformer_15_i2v_altsize",
  "vae_decode_tiled_z4",
  "vae_decode_z3",
  "vae_decode_z4",
  "vae_encode_f13",
  "vae_encode_f5",
  "vae_encode_f8",
  "vae_encode_f9",
  "vae_encode_tiled_f5",
}


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FOLDER.names],
)
def test_case(name):
  results = run(FOLDER, name)
  assert results
  assert not [result for result in results if not result.passed]


def copy_of(folder: Path, *names: str) -> Folder:
  """A copy of the folder with these cases alone."""
  index = {**FOLDER.index, "sat": {}, "cases": {name: FOLDER.cases[name] for name in names}}
  (folder / "cases").mkdir()
  (folder / "index.json").write_text(json.dumps(index))
  for name in names:
    shutil.copy(FOLDER.path / FOLDER.cases[name]["file"], folder / "cases")
  return Folder(folder)


@pytest.mark.parametrize("spoil", [lambda x: x + 1e-3, lambda x: x * np.nan, lambda x: x[:-1]])
@pytest.mark.parametrize(
  ("case", "tensor"),
  [
    ("ddim_2b_8steps", "out.prev_sample"),
    ("dpm_5b_8steps", "out.pred_x0"),
    ("sched_tables_5b", "tab.betas"),
    ("crop_regions", "tab.crops"),
  ],
)
def test_a_spoilt_tensor_fails_its_case_and_the_run(tmp_path, capsys, case, tensor, spoil):
  spoilt = copy_of(tmp_path, case, "sched_tables_2b")
  path = tmp_path / "cases" / f"{case}.safetensors"
  tensors = load_file(path)
  tensors[tensor] = np.ascontiguousarray(spoil(np.float64(tensors[tensor])))
  save_file(tensors, path)
  assert main(str(spoilt.path)) == 1
  assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed"


def change_entry(folder: Folder, case: str, **fields) -> None:
  index = json.loads((folder.path / "index.json").read_text())
  index["cases"][case] |= fields
  (folder.path / "index.json").write_text(json.dumps(index))


def change_tensors(folder: Folder, case: str, change) -> None:
  path = folder.path / folder.cases[case]["file"]
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def test_a_case_that_cannot_be_compared_is_named_and_fails_alone(tmp_path, capsys):
  cases = "ddim_2b_8steps", "sched_tables_2b", "dpm_2b_8steps", "ddim_5b_8steps", "crop_regions"
  folder = copy_of(tmp_path, *cases)
  change_entry(folder, "ddim_2b_8steps", kind="flow")
  change_tensors(folder, "sched_tables_2b", lambda x: x.update({"out.more": np.zeros(3)}))
  change_tensors(folder, "dpm_2b_8steps", lambda x: x.pop("in.start"))
  call = {**FOLDER.cases["ddim_5b_8steps"]["call"], "prediction_type": "flow"}
  change_entry(folder, "ddim_5b_8steps", call=call)
  assert main(str(folder.path)) == 1
  out = capsys.readouterr().out
  for name, reason in (
    ("ddim_2b_8steps", "unknown kind of case: flow"),
    ("sched_tables_2b", "out.more was not computed"),
    ("dpm_2b_8steps", "the case has no tensor in.start"),
    ("ddim_5b_8steps", "prediction_type is 'flow'"),  # The package refuses it.
  ):
    assert any(line.startswith(name) and reason in line for line in out.splitlines()), name
  assert out.splitlines()[-1] == "1 passed, 4 failed"


def test_a_fault_of_the_code_is_not_taken_for_a_failed_case(tmp_path, monkeypatch):
  def broken(case):
    raise TypeError("a fault")

  folder = copy_of(tmp_path, "crop_regions")
  monkeypatch.setitem(goldens.runner.TABLES, "crop_regions", broken)
  with pytest.raises(TypeError, match="a fault"):
    main(str(folder.path))
