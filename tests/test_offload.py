"""Components that wait in the host's memory, and the error message when one alone does not fit."""

import gc
from functools import partial

import jax
import numpy as np
import pytest
from drawn import DIT_CONFIG, draw, make_pipeline
from safetensors.numpy import save_file

from cogvideox_jax import sharding
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference import frame_coding, out_of_memory, pipeline, prompt_encoding
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.offload import DEVICE, HOST
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.video_to_video import VideoToVideo
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.training import workdir

PIXELS = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), np.uint8)
GIVEN = {
  Pipeline: {"num_frames": 1},
  ImageToVideo: {"image": PIXELS[0], "num_frames": 1},
  VideoToVideo: {"video": PIXELS},
}
COMPUTES = {  # The function that computes in each phase, and the module that calls it.
  "encode_text": prompt_encoding,
  "encode": frame_coding,
  "denoise": pipeline,
  "decode": frame_coding,
}


def make(kind=Pipeline, **options) -> Pipeline:
  return make_pipeline(kind=kind, in_channels=8 if kind is ImageToVideo else 4, **options)


def frames_of(pipe: Pipeline, **changes) -> np.ndarray:
  quick = {"num_inference_steps": 2, "output_type": "np"}
  return pipe(**GIVEN[type(pipe)], prompt="a circle", **quick, **changes).frames


def components(pipe: Pipeline) -> dict[str, dict]:
  """The parameters of each component."""
  return {
    "transformer": pipe._params,
    "text encoder": pipe._prompt_encoder.params,
    "vae": pipe._frame_coder.params,
  }


def memory_kinds(pipe: Pipeline) -> set[str]:
  """The kinds of memory in which its parameters are."""
  leaves = jax.tree.leaves((components(pipe), pipe._base))
  return {leaf.sharding.memory_kind for leaf in leaves}


def live(shape: tuple[int, ...]) -> int:
  """How many arrays of a shape are in the devices' memory, whoever refers to them."""
  arrays = [x for x in jax.live_arrays() if x.shape == shape]
  return sum(x.sharding.memory_kind == DEVICE for x in arrays)


def marks(pipe: Pipeline) -> dict[str, tuple[int, ...]]:
  """The shape of an array of each component, which no other component has."""
  shapes = {name: {x.shape for x in jax.tree.leaves(p)} for name, p in components(pipe).items()}
  return {
    name: max(own - set().union(*(shapes[other] for other in shapes if other != name)))
    for name, own in shapes.items()
  }


def on_devices(pipe: Pipeline) -> dict[str, int]:
  """How many arrays like one of each component are in the devices' memory."""
  gc.collect()
  return {name: live(shape) for name, shape in marks(pipe).items()}


@pytest.fixture
def watch(monkeypatch):
  """watch(pipe) returns a list, which records the components on the devices in each phase."""

  def watch(pipe: Pipeline) -> list[tuple[str, set[str]]]:
    shapes, seen = marks(pipe), []
    before = on_devices(pipe)

    def watched(name, function, *args, **kwargs):
      there = {component for component, x in shapes.items() if live(x) > before[component]}
      seen.append((name, there))
      return function(*args, **kwargs)

    for name, module in COMPUTES.items():
      monkeypatch.setattr(module, name, partial(watched, name, getattr(module, name)))
    return seen

  return watch


def write_lora(folder, seed=0):
  rng, tensors = np.random.default_rng(seed), {}
  for half, shape in (("A", (2, DIT_CONFIG.width)), ("B", (DIT_CONFIG.width, 2))):
    name = f"transformer.transformer_blocks.1.attn1.to_q.lora_{half}.weight"
    tensors[name] = rng.normal(size=shape).astype(np.float32)
  save_file(tensors, folder / f"{seed}.safetensors")
  return folder / f"{seed}.safetensors"


@pytest.mark.parametrize(
  "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind is ImageToVideo)) for kind in GIVEN]
)
def test_only_the_component_in_use_is_on_the_devices_and_frames_keep_their_bits(kind, watch):
  expected = frames_of(make(kind))
  pipe = make(kind, offload=True)
  seen, before = watch(pipe), on_devices(pipe)
  np.testing.assert_array_equal(frames_of(pipe), expected)
  assert seen == [
    *([] if kind is Pipeline else [("encode", {"vae"})]),
    ("encode_text", {"text encoder"}),
    ("denoise", {"transformer"}),
    ("decode", {"vae"}),
  ]
  assert memory_kinds(pipe) == {HOST}
  assert on_devices(pipe) == before


def test_a_second_call_compiles_nothing():
  compiled = []

  def listen(event: str, *_, **__):
    compiled.append(event)

  pipe = make(offload=True)
  frames_of(pipe)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    frames_of(pipe, seed=1)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert not [event for event in compiled if "compile" in event]


def test_loading_never_puts_parameters_on_the_devices(monkeypatch):
  shardings, put = [], jax.device_put

  def spy(x, target=None, **options):
    shardings.append(target)
    return put(x, target, **options)

  monkeypatch.setattr(jax, "device_put", spy)
  pipe = workdir.load("tiny", offload=True)
  assert len(shardings) == len(jax.tree.leaves(components(pipe)))
  assert {target.memory_kind for target in shardings} == {HOST}


def on_a_mesh():
  """A transformer's config, and parameters that eight devices share."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "context": 1, "tensor": 1})
  config, params = draw(DiT, DIT_CONFIG)
  shardings = sharding.shardings(params, mesh, sharding.rules_named("fsdp"))
  return config, jax.device_put(params, shardings)


@pytest.mark.parametrize("offload", [False, True])
def test_arrays_are_sharded_alike_in_both_memories(offload):
  """A mesh splits the transformer; the VAE is on all devices, the text encoder on the first."""
  config, params = on_a_mesh()
  pipe = make(transformer=(config, params), offload=offload)
  memory = HOST if offload else DEVICE
  assert memory_kinds(pipe) == {memory}
  wanted = [leaf.sharding.with_memory_kind(memory) for leaf in jax.tree.leaves(params)]
  assert [leaf.sharding for leaf in jax.tree.leaves(pipe._params)] == wanted
  counts = {name: len(jax.tree.leaves(p)[0].devices()) for name, p in components(pipe).items()}
  assert counts == {"transformer": 8, "text encoder": 1, "vae": 8}


@pytest.mark.slow
def test_several_devices_make_the_same_frames_with_and_without():
  plain, offloaded = (make(devices=jax.devices()[:2], offload=offload) for offload in (False, True))
  np.testing.assert_array_equal(frames_of(offloaded), frames_of(plain))


def test_adapters_stay_in_the_parameters_memory_and_change_them_by_the_same_bits(tmp_path):
  path, half = write_lora(tmp_path), {"attention_kwargs": {"scale": 0.5}}
  plain, offloaded = make(), make(offload=True)
  base = frames_of(plain)
  for pipe in (plain, offloaded):
    pipe.load_lora_weights(path)
  for call in ({}, half, {}):
    np.testing.assert_array_equal(frames_of(offloaded, **call), frames_of(plain, **call))
    assert memory_kinds(offloaded) == {HOST}
  assert np.abs(frames_of(offloaded) - base).max() > 1e-2
  offloaded.unload_lora_weights()
  np.testing.assert_array_equal(frames_of(offloaded), base)


def test_adapters_change_by_the_same_bits_what_devices_share(tmp_path):
  plain, offloaded = (make(transformer=on_a_mesh(), offload=offload) for offload in (False, True))
  for pipe in (plain, offloaded):
    pipe.load_lora_weights(write_lora(tmp_path))
  assert memory_kinds(offloaded) == {HOST}
  for one, other in zip(*map(jax.tree.leaves, (plain._params, offloaded._params)), strict=True):
    np.testing.assert_array_equal(one, other)
    assert one.sharding == other.sharding.with_memory_kind(DEVICE)


def test_offloading_later_moves_all_parameters_and_shared_ones_once(tmp_path):
  pipe = make()
  pipe.load_lora_weights(write_lora(tmp_path))
  expected = frames_of(pipe)
  pipe.enable_model_cpu_offload()
  assert memory_kinds(pipe) == {HOST}
  shared = jax.tree.map(lambda total, base: total is base, pipe._params, pipe._base)
  changed = [path for path, same in jax.tree.leaves_with_path(shared) if not same]
  assert [sharding.path_name(path) for path in changed] == ["blocks/attention/query/kernel"]
  np.testing.assert_array_equal(frames_of(pipe), expected)


def fail(message: str):
  def function(*_, **__):
    raise jax.errors.JaxRuntimeError(message)

  return function


FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 9663676416 bytes."
CASES = {
  "encode_text": (Pipeline, "encoding the prompts", False),
  "encode": (VideoToVideo, "encoding the image or video", True),
  "denoise": (Pipeline, "denoising", False),
  "decode": (Pipeline, "decoding the video", True),
}


@pytest.mark.parametrize(("function", "case"), CASES.items())
def test_too_little_memory_is_explained_by_phase(monkeypatch, function, case):
  kind, phase, tiles = case
  monkeypatch.setattr(COMPUTES[function], function, fail(FULL))
  pipe = make(kind)
  with pytest.raises(UserError, match=f"Out of memory while {phase}") as caught:
    frames_of(pipe)
  assert "--offload (offload=True)" in str(caught.value)
  assert ("--tiling" in str(caught.value)) == tiles
  assert len(str(caught.value).splitlines()) <= 8
  assert str(caught.value.__cause__) == FULL


def test_too_little_memory_to_load_is_explained(monkeypatch):
  monkeypatch.setattr(jax, "device_put", fail(FULL))
  with pytest.raises(UserError, match=r"Out of memory while loading.*\n.*\n  --offload"):
    make()


def test_what_is_in_use_is_not_advised_and_an_error_keeps_nothing_on_the_devices(monkeypatch):
  pipe = make(offload=True)
  pipe.enable_tiling()
  before = on_devices(pipe)
  monkeypatch.setattr(frame_coding, "decode", fail(FULL))
  with pytest.raises(UserError, match="--height, --width") as caught:
    frames_of(pipe)
  assert "--offload" not in str(caught.value) and "--tiling" not in str(caught.value)
  assert on_devices(pipe) == before


def test_other_errors_stay_what_they_are(monkeypatch):
  monkeypatch.setattr(frame_coding, "decode", fail("INTERNAL: a fault of ours"))
  with pytest.raises(jax.errors.JaxRuntimeError, match="a fault of ours"):
    frames_of(make())
  explained = out_of_memory.explained(out_of_memory.TEXT, ())
  with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"), explained:
    raise ValueError("RESOURCE_EXHAUSTED")
