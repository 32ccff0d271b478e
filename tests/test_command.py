"""Mistakes on a command line, made with a small command of our own: no models, no waiting."""

import errno
import os
import signal
from pathlib import Path

import pytest
from commands import Result, run_script

from cogvideox_jax import command
from configs import tiny

ROOT = Path(__file__).parent.parent
VERB = '''
"""Says what it was told."""
from absl import flags
from cogvideox_jax import command
from cogvideox_jax.config.schema import TrainConfig
CONFIG = command.config_flag(TrainConfig)
WORKDIR = flags.DEFINE_string("workdir", None, "Where.", required=True)
SOLVER = flags.DEFINE_enum("solver", "ddim", ["ddim", "dpm"], "How.")
STEPS = flags.DEFINE_integer("steps", 50, "How often.", lower_bound=1)
def main():
  print(CONFIG.value.train.steps, CONFIG.value.model.depth, STEPS.value)
  return 1 if SOLVER.value == "dpm" else None
if __name__ == "__main__":
  command.run(main)
'''
CONFIG, WORKDIR = "--config=configs/tiny.py", "--workdir=w"
FAULTY = "from configs import base\n\n\ndef get_config():\n  config = base.get_config()\n  {}\n"


@pytest.fixture(scope="module")
def verb(tmp_path_factory):
  folder = tmp_path_factory.mktemp("verb")
  (folder / "verb.py").write_text(VERB)

  def run(*args: str, cwd: Path = ROOT) -> Result:
    return run_script(folder, folder / "verb.py", *args, cwd=cwd)

  return run


def check_mistake(result: Result, words: tuple[str, ...]) -> None:
  assert result.code == 2
  assert not result.output
  assert len(result.errors.splitlines()) <= 8
  assert "Traceback" not in result.errors
  for word in words:
    assert word in result.errors


def test_flags_reach_the_command_from_any_folder(verb, tmp_path):
  config = f"--config={ROOT / 'configs' / 'tiny.py'}"
  result = verb(config, WORKDIR, "--config.model.depth=3", "--steps=7", cwd=tmp_path)
  assert (result.code, result.output) == (0, f"{tiny.get_config().train.steps} 3 7\n"), (
    result.errors
  )


def test_the_answer_no_is_exit_code_1(verb):
  assert verb(CONFIG, WORKDIR, "--solver=dpm").code == 1


def test_help_lists_the_flags_of_the_command_and_is_no_failure(verb):
  result = verb("--help")
  assert result.code == 0
  for word in ("Says what it was told.", "--config", "--workdir", "--solver"):
    assert word in result.output


@pytest.mark.parametrize(
  ("args", "words"),
  [
    ([CONFIG], ("--workdir",)),
    ([WORKDIR], ("--config",)),
    ([CONFIG, WORKDIR, "--stpes=3"], ("stpes", "Did you mean: steps")),
    ([CONFIG, WORKDIR, "--steps=0"], ("--steps=0", "50", "positive")),
    ([CONFIG, WORKDIR, "--steps=many"], ("--steps=many", "int", "50")),
    ([CONFIG, WORKDIR, "--solver=euler"], ("--solver=euler", "ddim|dpm")),
    ([CONFIG, WORKDIR, "steps=3"], ("steps=3", "--name=value")),
    ([CONFIG, WORKDIR, "--config.sede=1"], ("--config.sede=1", '"seed"')),
    ([CONFIG, WORKDIR, "--config.model.dpeth=1"], ("--config.model.dpeth=1", '"depth"')),
    ([CONFIG, WORKDIR, "--config.train.steps.x=1"], ("--config.train.steps.x=1", "base.py")),
    ([CONFIG, WORKDIR, "--config.seed=abc"], ("--config.seed=abc", "int", "such as 0")),
    ([CONFIG, WORKDIR, "--config.seed=1.5"], ("--config.seed=1.5", "int")),
    (
      [CONFIG, WORKDIR, "--config.train.explicit_uniform=1.5"],
      ("explicit_uniform=1.5", "bool", "True"),
    ),
    ([CONFIG, WORKDIR, "--config.text.drop_rate=x"], ("--config.text.drop_rate=x", "float")),
    (["--config.seed=1", CONFIG, WORKDIR], ("--config.seed=1", "before")),
    (["--config=nowhere.py", WORKDIR], ("nowhere.py", str(ROOT), "configs/tiny.py")),
    (["--config", "nowhere.py", WORKDIR, "--config.seed=1"], ("nowhere.py", "configs/tiny.py")),
  ],
  ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_in_a_few_lines(verb, args, words):
  check_mistake(verb(*args), words)


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("config.model.update(dpeth=3)", ('"depth" instead of "dpeth"',)),
    ("config.seed = 'one'", ("'seed'",)),
    ("config.sede += 1", ('"seed"',)),
    ("config.seed = = 1", ("invalid syntax",)),
    ("import nowhere", ("nowhere",)),
  ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(verb, tmp_path, line, words):
  path = tmp_path / "faulty.py"
  path.write_text(FAULTY.format(line))
  check_mistake(verb(f"--config={path}", WORKDIR), (f"{path}:6", *words))


@pytest.mark.parametrize(
  ("code", "word"), [(errno.ENOSPC, "full"), (errno.EACCES, "denied"), (errno.EROFS, "read-only")]
)
def test_a_fault_of_the_disk_is_told_in_one_line(capsys, code, word):
  with pytest.raises(SystemExit, match="2"), command.user_mistakes():
    raise OSError(code, os.strerror(code), "runs/x")
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert "runs/x" in lines[0]
  assert word in lines[0]


def test_ctrl_c_leaves_with_130_and_no_traceback(capsys):
  # A shell starts what runs in the background with this signal ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(SystemExit, match="130"), command.user_mistakes():
      signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)
  assert capsys.readouterr().err == "Interrupted.\n"


def test_our_own_faults_keep_their_traceback():
  with pytest.raises(FileNotFoundError), command.user_mistakes():
    raise FileNotFoundError(errno.ENOENT, "gone", "x")
