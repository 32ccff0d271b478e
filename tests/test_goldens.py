"""Reference tensors of diffusers and transformers, and that the runner tells right from wrong."""

import json
import shutil
from pathlib import Path

import goldens
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

FOLDER = goldens.Folder(Path(__file__).parent / "data" / "goldens")


def test_every_reference_model_counts_as_many_parameters():
  for name, model in FOLDER.index["models"].items():
    # A table of positions is a buffer to the reference, which does not count it.
    params = {k: x for k, x in FOLDER.model(name)[1].items() if k != "position_table"}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == model["num_params"], name


@pytest.mark.parametrize("name", FOLDER.names)
def test_case(name):
  results = FOLDER.run(name)
  assert results
  assert not [result for result in results if not result.passed]


def part(folder: Path, *names: str) -> goldens.Folder:
  """A copy of the folder with these cases alone."""
  index = {**FOLDER.index, "sat": {}, "cases": {name: FOLDER.cases[name] for name in names}}
  (folder / "cases").mkdir()
  (folder / "index.json").write_text(json.dumps(index))
  for name in names:
    shutil.copy(FOLDER.path / FOLDER.cases[name]["file"], folder / "cases")
  return goldens.Folder(folder)


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
  spoilt = part(tmp_path, case, "sched_tables_2b")
  path = tmp_path / "cases" / f"{case}.safetensors"
  tensors = load_file(path)
  tensors[tensor] = np.ascontiguousarray(spoil(np.float64(tensors[tensor])))
  save_file(tensors, path)
  assert goldens.main(str(spoilt.path)) == 1
  assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed"


def test_a_case_that_is_not_known_or_not_computed_is_named_and_fails(tmp_path, capsys):
  folder = part(tmp_path, "ddim_2b_8steps", "sched_tables_2b")
  index = json.loads((tmp_path / "index.json").read_text())
  index["cases"]["ddim_2b_8steps"]["kind"] = "flow"
  (tmp_path / "index.json").write_text(json.dumps(index))
  path = tmp_path / "cases" / "sched_tables_2b.safetensors"
  save_file({**load_file(path), "out.more": np.zeros(3, np.float32)}, path)
  assert goldens.main(str(folder.path)) == 1
  out = capsys.readouterr().out
  assert "ddim_2b_8steps" in out
  assert "unknown kind of case: flow" in out
  assert "out.more was not computed" in out
  assert out.splitlines()[-1] == "0 passed, 2 failed"
