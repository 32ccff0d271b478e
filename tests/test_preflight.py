"""`preflight` says of each thing that a training needs whether the machine has it."""

import json
import os
from importlib import metadata
from types import SimpleNamespace

import jax
import pytest
from etils import epath
from host_processes import end_all, finish, start_job
from in_process import run_here
from small_run import write_dataset

from cogvideox_jax import hosts, machine_checks
from cogvideox_jax.data.dataset_index import damaged_files


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("preflight") / "data"
  write_dataset(folder / "tiny", seed=0, clips=4)
  return folder


def preflight(monkeypatch, capfd, *flags):
  return run_here(monkeypatch, capfd, "preflight", "--config=tiny", "--json", *flags)


def test_a_machine_with_all_that_a_training_needs_passes(monkeypatch, capfd, tmp_path, data):
  flags = (f"--workdir={tmp_path / 'run'}", f"--config.data.path={data}")
  result = preflight(monkeypatch, capfd, *flags)
  assert result.code == 0, result.output
  answer = json.loads(result.output.splitlines()[-1])
  assert answer["ok"] and {one["check"] for one in answer["checks"]} == {
    *("chips", "versions", "bucket", "clock", "digests", "fit")
  }
  assert list((tmp_path / "run").iterdir()) == []


def test_other_chips_than_those_of_the_topology_are_told(monkeypatch, capfd, tmp_path, data):
  result = preflight(
    monkeypatch, capfd, f"--workdir={tmp_path}", "--topology=v5p:2x2x4", "--skip=fit"
  )
  assert result.code == 1
  (line,) = [line for line in result.output.splitlines() if line.startswith("NO  chips")]
  assert f"{jax.device_count()} devices of kind cpu" in line
  assert "16 devices" in line and "TPU v5" in line
  wrong = preflight(monkeypatch, capfd, f"--workdir={tmp_path}", "--topology=v5q:2x2")
  assert wrong.code == 2 and "Not a TPU topology" in wrong.errors


@pytest.mark.parametrize(
  ("topology", "kind", "number"),
  [("v5e:4x4", "TPU v5 lite", 16), ("v5p:2x2x4:2", "TPU v5", 32), ("tpu7x:2x2x1", "TPU7x", 8)],
)
def test_the_chips_of_a_topology_pass_and_one_less_does_not(monkeypatch, topology, kind, number):
  devices = [SimpleNamespace(device_kind=kind)] * number
  monkeypatch.setattr(jax, "devices", lambda: devices)
  assert machine_checks.chips(topology).ok
  devices.pop()
  assert not machine_checks.chips(topology).ok
  devices[:] = [SimpleNamespace(device_kind="TPU v4")] * number
  assert not machine_checks.chips(topology).ok


def test_a_libtpu_that_jax_does_not_ask_for_is_told(monkeypatch):
  versions = {"cogvideox-jax": "1", "jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1"}
  needs = ["jaxlib<=0.10.2,>=0.10.2", 'libtpu==0.0.42.*; extra == "tpu"', "numpy>=2"]
  monkeypatch.setattr(metadata, "requires", lambda name: needs)
  monkeypatch.setattr(metadata, "version", lambda name: versions[name])
  assert machine_checks.versions(needs_tpu=True).ok
  versions["libtpu"] = "0.0.52"
  assert machine_checks.versions(needs_tpu=False).ok
  wrong = machine_checks.versions(needs_tpu=True)
  assert not wrong.ok and "0.0.42" in wrong.text and "0.0.52" in wrong.text
  versions["jaxlib"] = "0.9.0"
  assert not machine_checks.versions(needs_tpu=False).ok


def test_hosts_with_other_versions_or_clocks_are_told(monkeypatch):
  monkeypatch.setattr(hosts, "each", lambda text: [text, "jax 0.1"])
  assert "other hosts differ" in machine_checks.versions(needs_tpu=False).text
  monkeypatch.setattr(hosts, "each", lambda text: ["1000.0", "1000.5", "900.0"])
  wrong = machine_checks.clock()
  assert not wrong.ok and "process 2" in wrong.text
  monkeypatch.setattr(hosts, "each", lambda text: ["1000.0", "1000.5"])
  assert machine_checks.clock().ok


def forbidden(*args, **options):
  raise PermissionError("403 Forbidden")


@pytest.mark.parametrize(
  ("method", "stand_in", "words"),
  [
    ("write_bytes", forbidden, "cannot be written"),
    ("read_bytes", forbidden, "cannot be read"),
    ("unlink", forbidden, "cannot be deleted"),
    ("read_bytes", lambda path: b"other", "other bytes"),
    ("iterdir", lambda path: iter(()), "does not list"),
    ("unlink", lambda path: None, "keeps"),
    ("stat", lambda path: SimpleNamespace(mtime=0.0), "clock"),
  ],
)
def test_each_fault_of_a_bucket_is_told(tmp_path, monkeypatch, method, stand_in, words):
  folder = epath.Path(tmp_path)
  assert machine_checks.bucket(folder).ok
  monkeypatch.setattr(type(folder), method, stand_in)
  finding = machine_checks.bucket(folder)
  assert not finding.ok and words in finding.text and str(folder) in finding.text


def test_a_bucket_whose_package_is_not_installed_is_told():
  finding = machine_checks.bucket(epath.Path("gs://bucket/run"))
  assert not finding.ok and "gs://bucket/run" in finding.text


def test_damaged_and_missing_datasets_are_told(monkeypatch, capfd, tmp_path):
  write_dataset(tmp_path / "data" / "tiny", seed=1, clips=4)
  flags = (f"--workdir={tmp_path / 'run'}", f"--config.data.path={tmp_path / 'data'}", "--skip=fit")
  (shard,) = (tmp_path / "data" / "tiny").glob("*.array_record-*")
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  result = preflight(monkeypatch, capfd, *flags)
  assert result.code == 1 and f"damaged: {shard}" in result.output
  (tmp_path / "data" / "tiny" / "index.npz").unlink()
  result = preflight(monkeypatch, capfd, *flags)
  assert result.code == 1 and "not an encoded dataset" in result.output


def test_hosts_share_the_files_of_a_dataset(tmp_path, data):
  for file in (data / "tiny").iterdir():
    if file.is_file():
      (tmp_path / file.name).write_bytes(file.read_bytes())
  whole = set()
  for name in ("index.npz", *(path.name for path in tmp_path.glob("*.array_record-*"))):
    os.truncate(tmp_path / name, 1)
    whole.add(name)
  shares = [damaged_files(tmp_path, slice(host, None, 2)) for host in range(2)]
  assert all(shares) and sorted([*shares[0], *shares[1]]) == sorted(whole)


def test_a_program_that_does_not_fit_is_told_with_what_helps():
  result = {
    "bytes_per_chip": {"total": 2**34},
    "hbm_bytes": 2**33,
    "fits": False,
    "fixes": ["Use v5p."],
  }
  finding = machine_checks.fitting(result)
  assert not finding.ok and "16.00 of 8.00 GiB" in finding.text and "Use v5p." in finding.text


@pytest.mark.slow
def test_the_compiler_says_whether_the_training_fits(monkeypatch, capfd, tmp_path):
  monkeypatch.setenv("XLA_FLAGS", "")  # The TPU compiler refuses flags for CPUs.
  flags = ("--topology=v5e:1x1", "--skip=chips", "--skip=versions")
  result = preflight(monkeypatch, capfd, f"--workdir={tmp_path}", *flags)
  assert result.code == 0 and "ok  fit" in result.output, result.output


@pytest.mark.slow
def test_two_hosts_look_together(tmp_path, data):
  flags = ["--config=tiny", f"--workdir={tmp_path}", f"--config.data.path={data}", "--json"]
  try:
    codes, printed = finish(start_job("preflight", flags, 2))
  finally:
    end_all()
  assert codes == [0, 0], printed
  (line,) = [line for line in printed[0].splitlines() if line.startswith("{")]
  answer = json.loads(line)
  assert {one["host"] for one in answer["checks"]} == {0, 1}
