"""The layer rule: every module imports only from the layers below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "cogvideox_jax"

# From the bottom up. What stands on one line may not import one another, except within a folder.
LAYERS = (
  ("errors", "types", "config_keys", "version"),
  ("sharding", "hosts", "peers", "interrupts", "devices", "paths", "streams", "xla"),
  ("compiled_programs",),
  ("sharded_attention", "data", "models", "diffusion"),
  ("conversion", "sharded_vae"),
  ("config",),
  ("frozen_networks", "exclusive"),
  ("precompute", "inference", "evaluation"),
  ("training",),
  ("aot", "path_flags"),
  ("command", "model_flags", "machine_checks"),
  ("job", "dry_run"),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NOT_IN_THE_CORE = {"torch", "tensorflow", "gradio", "diffusers"}
EXTRAS = {"cogvideox_jax.conversion.torch_file"}  # Run in processes of their own.
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
VERBS = {
  name
  for name in MODULES
  if name.count(".") == 1 and name.split(".")[1] not in {*RANKS, "__init__"}
}


def imports(path: Path) -> set[str]:
  """Every module that a file names in an import, at its top or inside a function."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name}: imports are absolute"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def layer(module: str) -> str:
  """cogvideox_jax.data.video.read -> data"""
  return module.split(".")[1]


def faults(module: str, imported: str) -> str:
  """Why `module` may not import `imported`; empty if it may."""
  outside = imported.split(".")[0]
  if outside in NOT_IN_THE_CORE and module not in EXTRAS:
    return f"{outside} is not a dependency of the core"
  if outside == "ml_collections" and layer(module) not in {"config", "command"}:
    return "configs are read by config/read.py; all others take its dataclasses"
  if layer(module) == "data" and outside in {"jax", "flax"}:
    return "data/ runs on hosts, without jax"
  if outside != PACKAGE:
    return ""
  own, other = layer(module), layer(f"{imported}.__init__")
  if own == "data" and other == "sharding":
    return "sharding.py imports jax"
  if f"{PACKAGE}.{other}" in VERBS:
    return f"{other} is a command line: nothing imports it"
  if f"{PACKAGE}.{own}" in VERBS or own == "__init__" or own == other:
    return ""
  if other not in RANKS or RANKS[other] >= RANKS[own]:
    return f"{other} is not below {own}"
  return ""


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_below(module):
  found = [
    f"imports {name}: {fault}"
    for name in sorted(imports(MODULES[module]))
    if (fault := faults(module, name))
  ]
  assert not found


@pytest.mark.parametrize(
  ("module", "imported"),
  [
    ("cogvideox_jax.data.loader", "jax.numpy"),
    ("cogvideox_jax.data.loader", "cogvideox_jax.models.vae"),
    ("cogvideox_jax.data.loader", "cogvideox_jax.sharding"),
    ("cogvideox_jax.data.loader", "cogvideox_jax"),
    ("cogvideox_jax.models.dit", "cogvideox_jax.diffusion.noise.NoiseConfig"),
    ("cogvideox_jax.models.dit", "cogvideox_jax.training.step"),
    ("cogvideox_jax.inference.pipeline", "cogvideox_jax.evaluation.shape_scores"),
    ("cogvideox_jax.training.transformer_run", "cogvideox_jax.sample.main"),
    ("cogvideox_jax.sample", "cogvideox_jax.train"),
    ("cogvideox_jax.conversion.sat", "torch"),
    ("cogvideox_jax.training.stages", "ml_collections.ConfigDict"),
  ],
)
def test_the_rule_refuses(module, imported):
  assert faults(module, imported)


def loaded_modules(statement: str) -> set[str]:
  """What a new interpreter has loaded after a statement."""
  program = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
  result = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
  )
  return set(result.stdout.split())


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.data.video"])
def test_decode_workers_load_no_jax(module):
  assert not {"jax", "flax", "tensorflow", "torch"} & loaded_modules(f"import {module}")


def test_the_pipeline_is_public():
  loaded = loaded_modules(f"from {PACKAGE} import Pipeline")
  assert f"{PACKAGE}.inference.pipeline" in loaded
