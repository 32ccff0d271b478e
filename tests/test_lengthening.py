"""A run may be given more steps; what it has trained stays as it was."""

import pytest
from etils import epath
from typed_config import typed

from cogvideox_jax.config.read import read
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import resume, stages
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
