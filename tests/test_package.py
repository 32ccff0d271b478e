"""What an installed package holds beside its modules."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_has_the_types_marker_the_modules_the_configs_and_the_shipped_model(tmp_path):
  """Runs the step of a wheel's build that collects its files."""
  command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "work")]
  command += ["--build-lib", str(tmp_path / "built"), "egg_info", "--egg-base", str(tmp_path)]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  built = tmp_path / "built"
  files = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
  package = ROOT / "cogvideox_jax"
  wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
  assets = [path for path in (package / "assets").rglob("*") if path.is_file()]
  wanted |= {path.relative_to(ROOT).as_posix() for path in assets}
  configs = {path.name for path in (ROOT / "configs").glob("*.py")}
  wanted |= {f"cogvideox_jax/shipped/configs/{name}" for name in configs}
  assert files >= wanted | {"cogvideox_jax/py.typed"}
  assert "5b.py" in configs
