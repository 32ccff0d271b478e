"""One small training run to its end, made once for all tests and all workers of xdist.

Tests only look at it, because they come in any order; one that goes on with it copies it first.
"""

import fcntl
import os
from typing import NamedTuple

from etils import epath
from model_folder import make_model
from small_run import make_config, make_inputs

from cogvideox_jax.training import transformer_run


class FinishedRun(NamedTuple):
  """The folder that `small_run.make_config` takes, and the workdir of the run with that config.

  FOLDER/model is a whole model of drawn weights, whose transformer has the shapes of the run's.
  """

  inputs: epath.Path
  workdir: epath.Path


def finished_run(tmp_path_factory) -> FinishedRun:
  """Trains, unless another worker has; a worker that comes meanwhile waits."""
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent  # The workers' common one.
  run = FinishedRun(epath.Path(folder / "run_inputs"), epath.Path(folder / "finished_run"))
  with (folder / "finished_run.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / "finished_run.done").exists():
      make_model(make_inputs(run.inputs) / "model")
      assert transformer_run.train(make_config(run.inputs), run.workdir) == 0
      (folder / "finished_run.done").touch()
  return run
