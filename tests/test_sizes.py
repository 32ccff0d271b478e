"""The table of what fits where agrees with the compiler's logs, and these with the compiler."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load():
  spec = importlib.util.spec_from_file_location("make_sizes", ROOT / "launch" / "make_sizes.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


make_sizes = load()


def log_of(case):
  return json.loads((make_sizes.LOGS / f"{case.name}.json").read_text())


def test_every_case_has_a_log_of_its_command_and_the_table_says_what_they_say():
  assert len({case.name for case in make_sizes.CASES}) == len(make_sizes.CASES)
  for case in make_sizes.CASES:
    assert log_of(case)["command"] == " ".join(case.command), case.name
  assert make_sizes.TABLE.read_text() == make_sizes.table()


def test_the_promised_configs_fit_their_pods():
  logs = {case.name: log_of(case) for case in make_sizes.CASES}
  promised = ["5b-stage1-v5p-2x2x4", "2b-stage1-v6e-4x4", "2b-sample-v5e-1x1", "5b-sample-v6e-1x1"]
  for config in ("2b", "5b", "1_5_5b"):
    kinds = {
      name.split("-")[2]
      for name, log in logs.items()
      if name.startswith(f"{config}-stage2") and log["fits"]
    }
    assert kinds >= {"v5e", "v5p", "v6e", "tpu7x"}, config
    for stage in (1, 3):
      fitting = [n for n in logs if re.match(f"{config}-stage{stage}-", n) and logs[n]["fits"]]
      assert fitting, (config, stage)
  assert all(logs[name]["fits"] for name in promised)
  for log in logs.values():
    assert log["fits"] or len(log["fixes"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("case", make_sizes.CASES, ids=lambda case: case.name)
def test_the_compiler_says_it_again(case):
  log, again = log_of(case), make_sizes.run(case)
  assert again["fits"] == log["fits"]
  assert again["parameters"] == log["parameters"]
  assert again["bytes_per_chip"]["total"] == pytest.approx(log["bytes_per_chip"]["total"], rel=0.1)
