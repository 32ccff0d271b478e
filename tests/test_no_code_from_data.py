"""No path leads from data to code: the tree has no call that runs what it reads, but those listed.

`subprocess`, `importlib` and unpicklers are in the list with the files that use them, so that a new
use is seen in a review.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cogvideox_jax", "configs", "launch", "benchmarks", "tests")
FILES = sorted(
  path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.is_file()
)
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml"}
BUILTINS = {"eval", "exec", "__import__"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput"}
# What a file may use, and why.
ALLOWED = {
  # Makes numpy arrays alone, of files whose sha256 is known.
  "cogvideox_jax/evaluation/metric_packages.py": {"import pickle"},
  # Catches torch's UnpicklingError.
  "cogvideox_jax/conversion/torch_file.py": {"import pickle"},
  # Loads names of its own table when they are first used.
  "cogvideox_jax/__init__.py": {"import_module of a variable"},
  # Make hostile pickles, and the files that the package must read.
  "tests/test_metric_packages.py": {"import pickle"},
  "tests/test_malicious_files.py": {"import pickle"},
  # Run the code blocks of the documentation, and configs of this tree.
  "tests/test_calls_of_diffusers.py": {"exec"},
  "tests/test_config_forms.py": {"import_module of a variable"},
  "tests/goldens_maker/draws.py": {"import_module of a variable"},
  "tests/test_published.py": {"import_module of a variable"},
}


def uses(source: str) -> set[str]:
  """What a file uses that may run data."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = {alias.name.split(".")[0] for alias in node.names}
      found |= {f"import {name}" for name in names & MODULES}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"import {name}" for name in {node.module.split(".")[0]} & MODULES}
    elif isinstance(node, ast.Call):
      found |= _fault_of_call(node)
  return found


def _fault_of_call(node: ast.Call) -> set[str]:
  name = ast.unparse(node.func)
  last = name.split(".")[-1]
  options = {word.arg: ast.unparse(word.value) for word in node.keywords}
  found = set()
  if name in BUILTINS:
    found.add(name)
  if name.startswith(("os.", "subprocess.", "commands.")) and last in SHELLS:
    found.add(name)
  if options.get("shell", "False") != "False":
    found.add("shell")
  if last == "load" and options.get("allow_pickle", "False") != "False":
    found.add("allow_pickle")
  if name == "torch.load" and options.get("weights_only") != "True":
    found.add("torch.load without weights_only")
  if last == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
    found.add("import_module of a variable")
  if options.get("trust_remote_code", "False") != "False":
    found.add("trust_remote_code")
  return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_runs_nothing_that_it_reads(path):
  name = path.relative_to(ROOT).as_posix()
  assert uses(path.read_text()) - ALLOWED.get(name, set()) == set()


def test_what_is_allowed_is_used():
  for name, allowed in ALLOWED.items():
    assert allowed <= uses((ROOT / name).read_text()), name


@pytest.mark.parametrize(
  "source",
  [
    "import pickle",
    "from pickle import loads",
    "import os.path, marshal",
    "import yaml",
    "eval('1')",
    "exec(text)",
    "__import__(name)",
    "import os\nos.system('ls')",
    "os.popen(x)",
    "subprocess.run(x, shell=True)",
    "subprocess.run(x, shell=flag)",
    "subprocess.getoutput(x)",
    "np.load(file, allow_pickle=True)",
    "torch.load(file)",
    "torch.load(file, weights_only=False)",
    "importlib.import_module(name)",
    "importlib.import_module(f'configs.{name}')",
    "AutoModel.from_pretrained(x, trust_remote_code=True)",
  ],
)
def test_each_way_is_found(source):
  assert uses(source)


def test_what_is_harmless_is_not_found():
  assert not uses(
    "import json\nmodel.eval()\nnp.load(file)\nimportlib.import_module('a.b')\n"
    "torch.load(file, weights_only=True)\nsubprocess.run(['ls'])\nre.compile('a')"
  )
