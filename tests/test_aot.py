"""Programs compiled for TPUs that are not attached, and the numbers that are read from them."""

import importlib
import json

import jax
import pytest
from commands import Result, run_command
from typed_config import typed

from cogvideox_jax.aot import fixes, hlo, programs, topology
from cogvideox_jax.aot.hlo import Traffic
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.size import Size, check_size
from cogvideox_jax.models.vae_config import VAEConfig

KEYS = {
  "program", "stage", "devices", "num_frames", "height", "width", "fits", "hbm_bytes",
  "bytes_per_chip", "parameters", "model_flops", "roofline_seconds", "estimated_seconds",
  "mfu_ceiling", "collectives", "compile_seconds", "fixes",
}  # fmt: skip
MODULE = """HloModule step

%scatter.all-reduce-scatter (a: f32[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} all-reduce(%a), to_apply=%add
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%r)
}

%inner (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = bf16[4]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"10"}
  %g = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), dimensions={0}
  %d = bf16[16]{0} all-gather-done(%g)
  %k = bf16[4]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[4]{0}) tuple(%next, %k)
}

%inner_condition (p: (s32[], bf16[4])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%outer (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %w = (s32[], bf16[4]) while(%p), condition=%inner_condition, body=%inner
  %c = f32[2,4]{1,0} fusion(%w), calls=%scatter.all-reduce-scatter
}

%outer_condition (p: (s32[], bf16[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[4]) -> bf16[4] {
  %w = (s32[], bf16[4]) while(%p), condition=%outer_condition, body=%outer, \
backend_config={"known_trip_count":{"n":"5"}}
  %y = bf16[4]{0} fusion(%w), calls=%f, backend_config={"estimated_cycles":"7"}
}
"""


def test_a_loop_counts_once_a_trip_and_an_asynchronous_start_and_done_count_once():
  found = hlo.costs(MODULE)
  assert found.cycles == 7 + 5 * 3 * 10
  assert found.collectives == {
    "all-gather": Traffic(15, 15 * 32),
    "reduce-scatter": Traffic(5, 5 * 128),
  }
  assert (found.kernels, found.open_loops) == (15, 0)


COUNTING = """\
%body (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4]{0} get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %moved = u32[] copy(%i)
  %step = u32[] copy(%two)
  %next = u32[]{:T(128)} add(%moved, %step), metadata={op_name="add"}
  %y = bf16[4]{0} fusion(%x), calls=%f, backend_config={"estimated_cycles":"10"}
  ROOT %t = (u32[]{:T(128)}, bf16[4]{0}) tuple(%next, /*index=1*/%y)
}

%condition (p: (s32[], bf16[4])) -> pred[] {
  %i = u32[] get-tuple-element(%p), index=0
  %n = u32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[4]) -> bf16[4] {
  %w = (u32[], bf16[4]) while(%p), condition=%condition, body=%body
}
"""


def test_the_trips_of_a_loop_follow_from_its_limit_and_its_step():
  found = hlo.costs(COUNTING)
  assert (found.cycles, found.open_loops) == (4 * 10, 0)
  found = hlo.costs(COUNTING.replace("add(%moved, %step)", "multiply(%moved, %step)"))
  assert (found.cycles, found.open_loops) == (10, 1)


def test_a_loop_of_unknown_trips_is_counted_as_open():
  found = hlo.costs(MODULE.replace('"known_trip_count":{"n":"5"}', ""))
  assert (found.cycles, found.open_loops) == (37, 1)


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:foo", "v5e:3x3", "v5p:2x2x1:0"])
def test_a_name_of_no_topology_is_refused_and_repeated(name):
  with pytest.raises(UserError, match=name):
    topology.open_topology(name)


@pytest.fixture
def run(tmp_path):
  """Runs a command in a process of its own, since compiling for TPUs changes what JAX sees."""

  def call(verb: str, *args: str) -> Result:
    return run_command(tmp_path, verb, *args, xla_flags="")

  return call


MODELS = {
  "tiny": (
    "--config=configs/tiny.py",
    "--config.model.depth=2",
    "--config.stages.tiny.rows=4",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
  ),
  "2b": (
    "--config=configs/2b.py",
    "--config.model.depth=2",
    "--config.stages.stage1.rows=4",
    "--config.stages.stage1.row_tokens=1024",
    "--config.stages.stage1.max_clips=1",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_layers_fit_a_small_pod(run, model):
  code, output, errors = run("compile", *MODELS[model], "--topology=v5p:2x2x1", "--json")
  assert code == 0, errors
  result = json.loads(output.splitlines()[-1])
  assert result.keys() >= KEYS
  assert result["fits"] and result["fixes"] == [] and result["devices"] == 4
  memory = result["bytes_per_chip"]
  assert 0 < memory["state"] < memory["arguments"] < memory["total"] < result["hbm_bytes"]
  assert result["collectives"]["all-gather"]["count"] > 0
  assert result["estimated_from"] == "cycles"
  assert 0 < result["roofline_seconds"] < result["estimated_seconds"]


def test_the_least_change_comes_first_where_it_is_enough():
  config = typed(importlib.import_module("configs.5b").get_config())
  pod = topology.Topology("v6e:8x8", "v6e", (8, 8), slices=1, devices=[None] * 64)
  limit, kept = pod.chip.hbm_bytes, 2 * 42 * 25_600 * 3072

  def first(total):
    size = Size(49, 256, 384)
    return fixes.suggest(config, pod, fixes.Demand("train", "stage1", size, 4, 2**30, total))[0]

  assert first(limit + kept - 1).startswith("Set config.remat=attention: what the MLPs of the 42")
  assert "6.2 GiB" in first(limit + 1)
  assert "remat=attention" not in first(limit + kept)


def test_frames_too_large_to_decode_whole_are_to_be_decoded_in_tiles():
  config = typed(importlib.import_module("configs.2b").get_config())
  chip = topology.Topology("v5e:1x1", "v5e", (1, 1), slices=1, devices=[None])

  def first(program, height, width):
    size = Size(49, height, width)
    return fixes.suggest(config, chip, fixes.Demand(program, "stage1", size, 1, 2**30, 2**35))[0]

  assert first("decode", 480, 720).startswith("Sample with --tiling: then 240x360 of the 480x720")
  assert "--height=240 --width=360" in first("decode", 240, 368)
  assert "tiling" not in first("decode", 240, 360) + first("encode", 480, 720)


def test_the_vae_alone_takes_sizes_that_no_patch_divides():
  check_size(Size(49, 240, 360), VAEConfig())
  with pytest.raises(UserError, match=r"width=364: .* multiple of 8 .*\n.* 360 and 368"):
    check_size(Size(49, 240, 364), VAEConfig())
  with pytest.raises(UserError, match=r"width=360: .* multiple of 16 .* patch's 2"):
    check_size(Size(49, 240, 360), VAEConfig(), patch=(1, 2, 2))


def test_the_5b_does_not_fit_one_small_chip_and_three_fixes_say_what_would(run):
  args = "--config=configs/5b.py", "--config.stages.stage1.rows=1"
  code, output, errors = run("compile", *args, "--topology=v5e:1x1", "--json")
  assert code == 1, errors
  result = json.loads(output.splitlines()[-1])
  assert result.keys() >= KEYS and not result["fits"] and len(result["fixes"]) == 3
  assert result["parameters"] == 5_570_283_072
  assert result["bytes_per_chip"]["state"] > result["hbm_bytes"]
  code, _, _ = run("train", *args, "--dry_run=v5e:1x1")
  assert code == 1


def pod(devices):
  """Devices of this machine in place of TPUs, for what is known before anything is compiled."""
  return topology.Topology("v5e:2x4", "v5e", (2, 4), 1, devices)


@pytest.mark.parametrize(("height", "tensor", "clips"), [(32, 8, 1), (48, 4, 2)])
def test_devices_share_the_height_of_the_clips_that_a_config_of_the_vae_codes(
  height, tensor, clips
):
  config = typed(importlib.import_module("configs.vae_tiny").get_config(), VAETrainConfig)
  given = {"num_frames": 17, "height": height, "width": 16}
  made = programs.make(config, pod(jax.devices()), "encode", "1", given)
  assert (made.rows, made.mesh["tensor"], made.mesh["data"]) == (clips, tensor, 8 // tensor)
  assert [executable.times for executable in made.executables] == [1, 1]
  frames, kept = made.arguments
  assert frames.sharding.shard_shape(frames.shape) == (1, 8, height // tensor, 16, 3)
  assert all(x.sharding.shard_shape(x.shape)[2] == x.shape[2] // tensor for x in kept)
  assert made.model_flops > 1e6


def test_a_config_of_the_vae_samples_nothing():
  config = typed(importlib.import_module("configs.vae").get_config(), VAETrainConfig)
  with pytest.raises(UserError, match="trains the VAE, which samples nothing"):
    programs.make(config, pod(jax.devices()), "sample", "1", {})


@pytest.mark.parametrize(
  ("changes", "stage", "size", "clips", "first"),
  [
    ({"train__remat": False}, "short", Size(17, 256, 256), 16, "Set config.train.remat=True"),
    ({}, "short", Size(17, 256, 256), 16, "Set config.train.microbatches=2: a device then"),
    (
      {"stages__with_context__context": 4},
      "with_context",
      Size(161, 256, 256),
      2,
      "Set config.stages.with_context.context=8: 8 devices then share the 161 frames",
    ),
    ({"mesh__context": 2}, "with_context", Size(161, 256, 256), 2, "Set config.mesh.context=4"),
    ({}, "with_context", Size(161, 256, 256), 1, "Train on clips of 128x128 pixels"),
  ],
)
def test_a_training_of_the_vae_that_does_not_fit_is_told_what_would(
  changes, stage, size, clips, first
):
  config = typed(importlib.import_module("configs.vae").get_config(), VAETrainConfig, **changes)
  demand = fixes.Demand("train", stage, size, clips, 2**30, 2**36)
  found = fixes.suggest(config, pod(jax.devices()), demand)
  assert found[0].startswith(first) and len(found) == 3
  sizes = [line for line in found if "config.stages." in line and "pixels" in line]
  assert not sizes or "63.0 GiB" in sizes[0]


@pytest.mark.slow
def test_the_tiny_vae_is_compiled_for_devices_that_share_a_clip(run):
  args = "--config=configs/vae_tiny.py", "--program=decode", "--num_frames=9", "--height=32"
  code, output, errors = run("compile", *args, "--width=32", "--topology=v5e:2x2", "--json")
  assert code == 0, errors
  result = json.loads(output.splitlines()[-1])
  assert result["rows"] == 1 and result["mesh"]["tensor"] == 4
  assert "all-gather" not in result["collectives"]
  assert result["collectives"]["collective-permute"]["count"] > 0


@pytest.mark.parametrize("mistake", ["--topology=v9:2x2", "--stage=7", "--program=fly"])
def test_mistakes_leave_with_code_2_and_are_named(run, mistake):
  args = ["--config=configs/2b.py", "--topology=v5p:2x2x1"]
  code, _, errors = run("compile", *args, mistake)
  assert code == 2
  assert mistake.split("=")[1] in errors and "Traceback" not in errors
