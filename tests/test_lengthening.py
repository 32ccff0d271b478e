"""A run may be given more steps; what it has trained stays as it was."""

import json

import numpy as np
import pytest
from etils import epath
from small_run import make_config, make_inputs
from typed_config import typed

from cogvideox_jax.config.read import read
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import resume, stages, transformer_run
from configs import tiny, tiny_stages, vae_tiny


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path)


def save(workdir, step):
  (workdir / "checkpoints" / str(step)).mkdir(parents=True)
  (workdir / "checkpoints" / str(step) / "digests.json").write_text("{}")


def test_steps_may_grow_and_not_shrink(workdir):
  config = typed(tiny.get_config(), train__steps=100)
  assert resume.check_config(workdir, config) == 100
  resume.store(workdir, config, {})
  save(workdir, 100)
  assert resume.check_config(workdir, typed(tiny.get_config(), train__steps=300)) == 100
  with pytest.raises(UserError, match=r"config\.train\.steps: was 100, is 50"):
    resume.check_config(workdir, typed(tiny.get_config(), train__steps=50))
  with pytest.raises(UserError, match=r"config\.stages\.tiny\.rows"):
    changes = {"train__steps": 300, "stages__tiny__rows": 16}
    resume.check_config(workdir, typed(tiny.get_config(), **changes))


def test_the_steps_of_a_vae_may_grow(workdir):
  config = vae_tiny.get_config()
  resume.store(workdir, read(VAETrainConfig, config), {})
  config.train.steps += 5
  assert resume.check_config(workdir, read(VAETrainConfig, config)) == config.train.steps - 5


def test_stages_that_have_begun_keep_their_first_step(workdir):
  config = typed(tiny_stages.get_config(), train__steps=100)
  resume.store(workdir, config, {})
  before = stages.plan(config)
  save(workdir, before[1].end)
  longer = typed(tiny_stages.get_config(), train__steps=170)
  with pytest.raises(UserError, match="The last stage alone is lengthened with") as told:
    resume.check_config(workdir, longer)
  flags = str(told.value).splitlines()[-1].split()
  shares = dict(flag.removeprefix("--config.").split("=") for flag in flags)
  changes = {name.replace(".", "__"): int(share) for name, share in shares.items()}
  longer = typed(tiny_stages.get_config(), train__steps=170, **changes)
  assert resume.check_config(workdir, longer) == 100
  after = stages.plan(longer)
  assert after[:-1] == before[:-1]
  assert (after[-1].start, after[-1].end) == (before[-1].start, 170)


def test_before_the_first_save_stages_may_move(workdir):
  resume.store(workdir, typed(tiny_stages.get_config(), train__steps=100), {})
  resume.check_config(workdir, typed(tiny_stages.get_config(), train__steps=170))


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps_with_their_schedule(tmp_path, capsys):
  inputs, folder = make_inputs(epath.Path(tmp_path)), epath.Path(tmp_path) / "run"
  changes = {"validation__every": 0, "checkpoint__every": 3}
  short, long = (make_config(inputs, train__steps=steps, **changes) for steps in (6, 9))
  assert transformer_run.train(short, folder) == 0
  assert transformer_run.train(long, folder) == 0
  printed = capsys.readouterr().out
  assert "lengthened from 6 to 9 steps" in printed and "resumed at step 6 of 9" in printed
  events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
  assert {"event": "lengthened", "steps_before": 6, "steps": 9} in events
  assert [one["step"] for one in events if one["event"] == "checkpoint_saved"] == [3, 6, 9]
  logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in logged] == list(range(1, 10))
  rates = [line["learning_rate"] for line in logged]
  for config, first, last in ((short, 1, 6), (long, 7, 9)):
    rate = stages.learning_rate(config, "tiny")
    wanted = [float(rate(step - 1)) for step in range(first, last + 1)]
    np.testing.assert_allclose(rates[first - 1 : last], wanted, rtol=1e-6)
  assert rates[5] < rates[6]  # The cosine of nine steps is higher there than the end of six.
  assert resume.read_config(folder).train.steps == 9
  with pytest.raises(UserError, match="was 9, is 6"):
    transformer_run.train(short, folder)
