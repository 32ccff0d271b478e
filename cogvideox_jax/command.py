"""What all commands share: flags, exit codes, and plain messages for mistakes of users.

Exit codes: 0 success; 1 the answer is no; 2 a mistake of the user, explained on stderr; 83
preempted after a save; 84 another process of the job died; 85 a training hung; 130 interrupted.
"""

import contextlib
import math
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from cogvideox_jax import compiled_programs, interrupts, path_flags, streams
from cogvideox_jax.config.ablation_schema import VAEAblationConfig
from cogvideox_jax.config.choice import choose, shipped_folder
from cogvideox_jax.config.help import describe
from cogvideox_jax.config.locations import with_absolute_paths
from cogvideox_jax.config.read import entries, read
from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import INTERRUPTED, USER_ERROR, UserError, remedy

_Schema = TypeVar("_Schema")

# What the schemas of configs are for.
_TAKERS = {
  TrainConfig: (
    "the transformer's training",
    "train, encode, inspect, compile and demo take",
    "tiny",
  ),
  VAETrainConfig: ("the VAE's training", "train_vae and compile take", "vae_tiny"),
  VAEAblationConfig: ("ablations of the VAE", "evaluate vae --ablation=... takes", "table1"),
}
_CONFIG_FLAGS = ("config", "ablation")  # Flags that name a config file.

_PROGRAMS = path_flags.define(
  "compilation_cache",
  "",
  "Folder or bucket that keeps compiled programs for later starts; off: none. Default: what the "
  "variable JAX_COMPILATION_CACHE_DIR says, or else a folder in the user's cache; for a job of "
  "several processes in its workdir.",
  names=(compiled_programs.OFF,),
  may_be_empty=True,
)
flags.disclaim_key_flags()  # So that `--help` lists the flags below as those of the command.

# absl and ml_collections raise these for mistakes in flags and config files.
_FLAG_FAULTS = (flags.Error, AttributeError, ImportError, KeyError, SyntaxError)


def share_programs(folder: str) -> None:
  """Makes the processes of a job keep compiled programs in a folder, unless the user says where."""
  compiled_programs.keep(_PROGRAMS.value, folder)


def run(main: Callable[..., int | None], *operands: str) -> None:
  """Parses the flags, calls main with the operands and exits with what main returns.

  Args:
    main: returns the exit code; None is 0.
    operands: names of the arguments that must be given besides the flags.
  """

  def guarded(argv: list[str]) -> int | None:
    with streams.lasting(), user_mistakes():
      given = argv[1:]
      if given[len(operands) :]:
        raise UserError(
          f"Not a flag: {given[len(operands)]}\nFlags are written --name=value; see --help."
        )
      if missing := operands[len(given) :]:
        raise UserError(f"Missing: {' '.join(missing)}\nSee --help.")
      compiled_programs.keep(_PROGRAMS.value)
      return main(*given)

  interrupts.leave_on_signals()
  flags.declare_key_flag(_PROGRAMS.name)
  app.run(guarded, flags_parser=_parse_flags)


class _HelpConfig(flags.BooleanFlag):
  """The flag `--help_config`: describes the config and exits while the flags are being parsed.

  `_parse_flags` puts it last on the command line, so that the config and its overrides are known.
  No other flag is required then.
  """

  def __init__(self, config: "ConfigFlag"):
    super().__init__("help_config", False, "Describe every key of the config and exit.")
    self._config = config

  def parse(self, argument: str | bool) -> None:
    super().parse(argument)
    if self.value:
      print(describe(self._config.value))
      sys.exit(0)


class ConfigFlag(Generic[_Schema]):
  """The flag `--config`, or another of that kind, and the typed config that it gives."""

  def __init__(self, name: str, *schemas: type[_Schema]):
    self._name, self._schemas = name, schemas

  @property
  def given(self) -> bool:
    """Whether the command line names a config."""
    return self._parsed is not None

  @property
  def _parsed(self) -> ConfigDict | None:
    return flags.FLAGS[self._name].value

  @cached_property
  def value(self) -> _Schema:
    """The config with the overrides of the command line. Its paths are absolute.

    Raises:
      UserError: no config is given, or it has an unknown key, lacks one, or has a wrong type.
    """
    if self._parsed is None:
      raise UserError(f"Missing flag: --{self._name}=...\nSee --help for the flags.")
    return with_absolute_paths(read(self._schema_of(set(self._parsed)), self._parsed))

  def _schema_of(self, given: set[str]) -> type[_Schema]:
    """Returns the schema of a config with these keys; UserError if it is another command's."""
    names = {schema: {entry.name for entry in entries(schema)} for schema in _TAKERS}
    found = max(self._schemas, key=lambda schema: len(given & names[schema]))
    own = names.pop(found)
    for schema, others in names.items():
      if given & (others - own) and not given & (own - others):
        (what, takers, _), (_, _, example) = _TAKERS[schema], _TAKERS[found]
        raise UserError(
          f"This config is one of {what}, which {takers}.\n"
          f"Run such a command, or give another config here, such as --{self._name}={example}"
        )
    return found


def config_flag(
  *schemas: type[_Schema], required: bool = True, name: str = "config", what: str = "Config file"
) -> ConfigFlag[_Schema]:
  """Defines `--config=FILE`, with `--config.KEY=VALUE` to override a key, and `--help_config`.

  Args:
    schemas: the dataclasses of such configs, those of `_TAKERS`.
    required: whether the command needs a config.
    name: the flag's, one of `_CONFIG_FLAGS`.
    what: what `--help` says of the file.
  """
  config_flags.DEFINE_config_file(
    name, help_string=f"{what}; --{name}.KEY=VALUE changes one of its keys."
  )
  if required:
    flags.mark_flag_as_required(name)
  config = ConfigFlag(name, *schemas)
  flags.DEFINE_flag(_HelpConfig(config))
  for key_flag in (name, "help_config"):
    flags.declare_key_flag(key_flag)
  return config


@contextlib.contextmanager
def user_mistakes() -> Iterator[None]:
  """Prints mistakes of the user, and errors of the system that a user can solve, and exits.

  The exit code is USER_ERROR, or INTERRUPTED after Ctrl-C. Other errors keep their traceback.
  """
  try:
    yield
  except UserError as error:
    _leave(str(error), USER_ERROR)
  except KeyboardInterrupt:
    _leave("Interrupted.", INTERRUPTED)
  except OSError as error:
    if not (advice := remedy(error)):
      raise
    where = error.filename if isinstance(error.filename, str) else "A file"
    _leave(f"{where}: {advice} Then run the same command again.", USER_ERROR)


def _leave(message: str, code: int) -> None:
  sys.stdout.flush()
  print(message, file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
  with streams.lasting(), user_mistakes():
    argv, config = _choose_config(argv)
    if config:
      # Configs say `from configs import base`, which must work from any working directory.
      sys.path += [str(config.resolve().parent.parent), str(shipped_folder().parent)]
    flags.FLAGS.set_gnu_getopt()  # Flags may follow operands.
    try:
      others = flags.FLAGS(sorted(argv, key=_asks_for_help))
      _check_finite()
      return others
    except _FLAG_FAULTS as error:
      raise UserError(_explain(error, argv, config)) from error
    except SystemExit:  # After --help, for which absl has a failing exit code.
      sys.exit(0)
    except Exception as error:
      if not any(_place_in_config(cause, config) for cause in _chain(error)):
        raise
      raise UserError(_explain(error, argv, config)) from error


def _check_finite() -> None:
  """Raises UserError for a flag that is infinite or not a number. Keys have ranges of their own."""
  for name in flags.FLAGS:
    value = flags.FLAGS[name].value
    is_key = name.split(".")[0] in _CONFIG_FLAGS
    if isinstance(value, float) and not math.isfinite(value) and not is_key:
      raise UserError(f"Wrong value: --{name}={value}\nWanted: a finite number")


def _asks_for_help(argument: str) -> bool:
  """Whether an argument is `--help_config`, which is parsed after all others."""
  return re.match(r"--?help_config(=|$)", argument) is not None


def _choose_config(argv: list[str]) -> tuple[list[str], Path | None]:
  """Returns the arguments with the file in place of what a config flag names, and the file."""
  found, chosen, follows = [], None, False
  for argument in argv:
    match = re.fullmatch(rf"(--?({'|'.join(_CONFIG_FLAGS)}))(=(.*))?", argument, re.DOTALL)
    if follows or (match and match[3]):
      given = argument if follows or not match else match[4]
      choice = choose(given)
      chosen = choice.file
      argument = choice.argument if follows or not match else f"{match[1]}={choice.argument}"
    follows = not follows and match is not None and not match[3]
    found.append(argument)
  return found, chosen


def _explain(error: BaseException, argv: list[str], config: Path | None) -> str:
  """A message of a few lines about a mistake in the flags or in the config file."""
  chain = _chain(error)
  for cause in reversed(chain):
    place = _place_in_config(cause, config)
    if place:
      return f"Mistake in the config file, {place}:\n{_first_and_last_line(cause)}"
  nothing = any(f"--{name}=None" in str(error) for name in _CONFIG_FLAGS)
  if isinstance(error, flags.IllegalFlagValueError) and config and nothing:
    return f"get_config() of {config} returns nothing.\nEnd it with: return config"
  if isinstance(error, flags.IllegalFlagValueError):
    return _explain_value(str(error))
  if isinstance(chain[-1], KeyError):
    return _explain_key(error, str(chain[-1].args[0]), argv)
  return f"{error}\nSee --help for the flags."


def _chain(error: BaseException) -> list[BaseException]:
  """The error and its contexts, the earliest error last."""
  return [error] + (_chain(error.__context__) if error.__context__ else [])


def _place_in_config(error: BaseException, config: Path | None) -> str:
  """FILE:LINE in the config's folder that raised the error; empty if none did."""
  if config is None:
    return ""
  frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
  if isinstance(error, SyntaxError):
    frames.append((error.filename or "", error.lineno))
  folder = config.resolve().parent
  places = [f"{name}:{line}" for name, line in frames if Path(name).resolve().parent == folder]
  return places[-1] if places else ""


def _first_and_last_line(error: BaseException) -> str:
  """The message of an error without the middle, where ml_collections lists the whole config."""
  lines = str(error.args[0] if error.args else error).splitlines() or [type(error).__name__]
  return "\n".join(dict.fromkeys(textwrap.shorten(line, 100) for line in (lines[0], lines[-1])))


def _explain_value(message: str) -> str:
  """A message that names the flag, its value and the wanted type.

  Args:
    message: absl's, `flag --NAME=VALUE: REASON`.
  """
  setting, reason = message.split(": ", 1)
  name, given = setting.removeprefix("flag --").split("=", 1)
  if given == "None":
    return f"Missing flag: --{name}=...\nSee --help for the flags."
  flag = flags.FLAGS[name]
  wanted = f"Wanted: {flag.flag_type()}"
  if flag.default is not None:
    wanted += f", such as {flag.default!r}"
  return f"Wrong value: --{name}={given}\n{wanted}\n{textwrap.shorten(reason, 200)}"


def _explain_key(error: BaseException, key: str, argv: list[str]) -> str:
  """A message that names the override with the unknown key, and the most similar key."""
  names = {arg: arg.split("=")[0].split(".") for arg in argv}
  flag = next(
    (arg for arg, name in names.items() if key in name or key.endswith(" " + ".".join(name[1:]))),
    key,
  )
  nearest = re.search(r'Did you mean "[^"]+" instead of "[^"]+"\?', str(error))
  advice = nearest[0] if nearest else "The config file, and base.py beside it, list every key."
  return f"No such config key: {flag}\n{advice}"
