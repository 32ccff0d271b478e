"""Checks a machine, or all hosts of a job, before a training begins there.

python -m cogvideox_jax.preflight --config=FILE --workdir=DIR [--topology=v5p:2x2x4]

It takes the config and the flags of `train` or `train_vae`, and looks at:

chips     the TPUs are those of --topology; without it, they are only counted
versions  jaxlib and libtpu are those that jax asks for, and the same on all hosts
bucket    the workdir can be written, read, listed and deleted from, and its clock is right
clock     the clocks of the hosts agree
digests   the files of the encoded datasets are as they were written
fit       the first stage's step fits --topology, by the TPU compiler; this takes minutes

Prints a line for each check. Exit code 0: all is well. 1: something is not. --json adds one object
as the last line: {"ok": bool, "checks": [{"check", "ok", "text", "host"}]}.
"""

import json
from collections.abc import Callable

from absl import flags
from etils import epath

from cogvideox_jax import command, hosts, job, path_flags
from cogvideox_jax import machine_checks as checks
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.machine_checks import Finding
from cogvideox_jax.sharding import split_cpu

NAMES = ("chips", "versions", "bucket", "clock", "digests", "fit")
CONFIG = command.config_flag(TrainConfig, VAETrainConfig)
WORKDIR = path_flags.define(
  "workdir", None, "Folder that the training will write to; may be a bucket.", required=True
)
TOPOLOGY = flags.DEFINE_string(
  "topology", "", "The TPUs that there should be, such as v5p:2x2x4; empty: any."
)
SKIP = flags.DEFINE_multi_enum("skip", [], NAMES, "A check to leave out; may be given repeatedly.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")
job.declare_flags()


def main() -> int:
  config, topology = CONFIG.value, TOPOLOGY.value
  if topology:
    checks.expected_devices(topology)  # Raises if it is none.
  split_cpu(config.cpu_devices)
  with job.joined():
    found = look(
      {
        "chips": lambda: checks.chips(topology),
        "versions": lambda: checks.versions(needs_tpu=bool(topology)),
        "bucket": lambda: checks.bucket(epath.Path(WORKDIR.value)),
        "clock": checks.clock,
        "digests": lambda: checks.datasets(config),
        "fit": lambda: checks.fit(config, topology),
      }
    )
  ok = all(finding.ok for _, finding in found)
  if JSON.value and hosts.is_first():
    listed = [{**finding._asdict(), "host": host} for host, finding in found]
    print(json.dumps({"ok": ok, "checks": listed}))
  return 0 if ok else 1


def look(named: dict[str, Callable[[], Finding]]) -> list[tuple[int, Finding]]:
  """Runs the checks that are not left out, on all hosts; the first process prints them.

  Returns:
    (number of the host, its finding), in every process.
  """
  found = []
  for name, check in named.items():
    if name in SKIP.value:
      continue
    of_hosts = [Finding(*json.loads(text)) for text in hosts.each(json.dumps(check()))]
    found += enumerate(of_hosts)
    if hosts.is_first():
      show(of_hosts)
  return found


def show(of_hosts: list[Finding]) -> None:
  """Prints the finding of the first host, or those of all hosts where something is not right."""
  bad = [(host, finding) for host, finding in enumerate(of_hosts) if not finding.ok]
  for host, finding in bad or [(0, of_hosts[0])]:
    where = f" (host {host})" if bad and len(of_hosts) > 1 else ""
    print(f"{'ok' if finding.ok else 'NO':3} {finding.check:9}{where} {finding.text}", flush=True)


if __name__ == "__main__":
  command.run(main)
