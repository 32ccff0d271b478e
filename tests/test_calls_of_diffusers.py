"""Calls as people write them for diffusers: the lines of model cards and of CogVideo's cli_demo.

Each snippet runs with its import changed, on a small model.
"""

import dataclasses
import shutil
import textwrap

import numpy as np
import pytest
import torch
from drawn import DIT_CONFIG, draw, make_pipeline
from model_folder import make_model
from PIL import Image
from safetensors.numpy import save_file

from cogvideox_jax import load_image, load_video
from cogvideox_jax.conversion import diffusers
from cogvideox_jax.data.video import probe
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.offload import is_on_host
from cogvideox_jax.models.dit import DiT

CALL = "num_inference_steps=2, guidance_scale=2, num_frames=9"
QUICK = {"num_inference_steps": 2, "num_frames": 1, "output_type": "latent"}
LOAD = 'pipe = CogVideoXPipeline.from_pretrained("MODEL", torch_dtype=torch.bfloat16)'
LORA = 'pipe.load_lora_weights("LORA", weight_name="pytorch_lora_weights.safetensors", '
SNIPPETS = {
  "card of 2B": f"""
    pipe = CogVideoXPipeline.from_pretrained("MODEL", torch_dtype=torch.float32)
    pipe.enable_model_cpu_offload()
    pipe.enable_sequential_cpu_offload()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    video = pipe(
      prompt="a panda", num_videos_per_prompt=1, {CALL},
      generator=torch.Generator(device="cpu").manual_seed(42),
    ).frames[0]
    export_to_video(video, "OUT/output.mp4", fps=8)
    assert is_on_host(pipe._params)
  """,
  "half precision": """
    pipe = CogVideoXPipeline.from_pretrained("MODEL", torch_dtype=torch.bfloat16).to("cuda")
    video = pipe("a panda", num_inference_steps=1, num_frames=1).frames[0]
  """,
  "cli_demo": f"""
    {LOAD}
    {LORA} adapter_name="test_1")
    pipe.fuse_lora(components=["transformer"], lora_scale=1 / 128)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(
      pipe.scheduler.config, timestep_spacing="trailing"
    )
    pipe.to("cuda")
    video = pipe(
      prompt="a panda", height=16, width=24, num_videos_per_prompt=1, use_dynamic_cfg=True, {CALL},
      generator=torch.Generator().manual_seed(42),
    ).frames[0]
    assert pipe.settings.solver == "dpm"
    export_to_video(video, "OUT/output.mp4", fps=8)
  """,
  "cli_demo, video to video": """
    pipe = CogVideoXVideoToVideoPipeline.from_pretrained("MODEL", torch_dtype="float32")
    frames = [Image.new("RGB", (24, 16), (10 * i, 0, 0)) for i in range(9)]
    video = pipe(
      video=frames, prompt="a panda", strength=0.8, num_inference_steps=2, guidance_scale=6.0,
      generator=torch.Generator(device="cpu").manual_seed(1),
    ).frames[0]
  """,
  "card of 5B-I2V": f"""
    image = load_image(image="OUT/input.jpg")
    pipe = CogVideoXImageToVideoPipeline.from_pretrained("I2V", torch_dtype=torch.float32)
    pipe.enable_sequential_cpu_offload()
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    video = pipe(
      prompt="a panda", image=image, num_videos_per_prompt=1, {CALL},
      generator=torch.Generator(device="cpu").manual_seed(42),
    ).frames[0]
    export_to_video(video, "OUT/output.mp4", fps=8)
    assert [frame.size for frame in load_video("OUT/output.mp4")] == [(24, 16)] * 9
  """,
  "a state dict as an adapter": f"""
    {LOAD}
    base = pipe("a panda", **QUICK).frames
    {LORA} adapter_name="a")
    expected = pipe("a panda", **QUICK).frames
    pipe.delete_adapters("a")
    named = load_file("LORA/pytorch_lora_weights.safetensors")
    pipe.load_lora_weights({{k: torch.from_numpy(x) for k, x in named.items()}}, adapter_name="b")
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, expected)
    pipe.set_adapters("b", 0.5)
    zeros = {{name: np.zeros_like(x) for name, x in named.items()}}
    pipe.load_lora_weights(zeros, adapter_name="b", hotswap=True)
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, base)
    half = {{k: torch.from_numpy(x).to(torch.float64) for k, x in named.items()}}
    pipe.load_lora_weights(half, adapter_name="b", hotswap=True)
    assert pipe._adapters["b"][1] == 0.5
    try:
      pipe.load_lora_weights(zeros, adapter_name="c", hotswap=True)
    except Exception as error:
      assert "There is no adapter 'c'" in str(error)
    else:
      raise AssertionError
  """,
  "scale of an old adapter": f"""
    {LOAD}
    {LORA} adapter_name="cogvideox-lora")
    pipe.set_adapters(["cogvideox-lora"], [32 / 64])
    pipe.set_adapters("cogvideox-lora", 1.0)
    video = pipe("a panda", **QUICK)
  """,
  "adapters on and off": f"""
    {LOAD}
    base = pipe("a panda", **QUICK).frames
    {LORA} adapter_name="a")
    changed = pipe("a panda", **QUICK).frames
    pipe.disable_lora()
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, base)
    pipe.enable_lora()
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, changed)
    pipe.delete_adapters(["a"])
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, base)
    assert np.abs(changed - base).max() > 1e-3
  """,
  "fuse and unfuse": f"""
    {LOAD}
    base = pipe("a panda", **QUICK).frames
    {LORA} adapter_name="a")
    changed = pipe("a panda", **QUICK).frames
    pipe.fuse_lora(lora_scale=1.0)
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, changed)
    pipe.unfuse_lora()
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, changed)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(pipe("a panda", **QUICK).frames, base)
  """,
  "generators for each prompt": f"""
    {LOAD}
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    both = pipe(["a panda", "a cat"], generator=generators, **QUICK).frames
    for i, prompt in enumerate(["a panda", "a cat"]):
      np.testing.assert_allclose(pipe(prompt, seed=3 + i, **QUICK).frames[0], both[i], atol=1e-5)
  """,
  "interrupt": f"""
    {LOAD}
    seen = []
    def stop(pipe, step, timestep, arrays):
      seen.append(step)
      pipe._interrupt = step == 1
      return arrays
    pipe("a panda", **{{**QUICK, "num_inference_steps": 5}}, callback_on_step_end=stop)
    assert seen == [0, 1]
  """,
  "prompt_embeds in a callback": f"""
    {LOAD}
    shapes = []
    def look(pipe, step, timestep, arrays):
      shapes.append(arrays["prompt_embeds"].shape)
      return {{"prompt_embeds": arrays["prompt_embeds"].at[:].add(step)}}
    call = {{**QUICK, "num_inference_steps": 3, "guidance_scale": 6}}
    names = ["latents", "prompt_embeds"]
    look = {{"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}}
    changed = pipe("a panda", **call, **look).frames
    assert set(shapes) == {{(2, 6, 8)}}
    assert np.abs(changed - pipe("a panda", **call).frames).max() > 1e-4
  """,
  "numbers of numpy": f"""
    {LOAD}
    one = pipe("a panda", seed=np.int64(3), **{{**QUICK, "num_frames": 9.0}}, height=np.int32(16))
    two = pipe("a panda", seed=[3], **{{**QUICK, "num_frames": np.int16(9)}}, width=24.0)
    np.testing.assert_array_equal(one.frames, two.frames)
  """,
  "arrays exported": """
    frames = np.linspace(0, 1, 9 * 16 * 24 * 3).reshape(9, 16, 24, 3)
    assert export_to_video(frames, "OUT/output.mp4") == "OUT/output.mp4"
    export_to_video([Image.fromarray(np.uint8(255 * x)) for x in frames], "OUT/output.mp4", fps=8)
  """,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("lora"), np.random.default_rng(0)
  name, width = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight", DIT_CONFIG.width
  shapes = {"A": (2, width), "B": (width, 2)}
  named = {name.format(x): rng.normal(size=shape) for x, shape in shapes.items()}
  save_file(
    {name: x.astype(np.float32) for name, x in named.items()},
    folder / "pytorch_lora_weights.safetensors",
  )
  return folder


@pytest.mark.filterwarnings("ignore:A prompt is longer", "ignore:.*longer than the model's")
@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_for_diffusers_runs_with_its_import_changed(model, lora, tmp_path, name):
  imported = (
    "import numpy as np, torch\nfrom PIL import Image\n"
    "from cogvideox_jax import CogVideoXDPMScheduler, CogVideoXPipeline\n"
    "from cogvideox_jax import CogVideoXImageToVideoPipeline, CogVideoXVideoToVideoPipeline\n"
    "from cogvideox_jax import export_to_video, load_image, load_video\n"
    "from safetensors.numpy import load_file\n"
  )
  code = textwrap.dedent(SNIPPETS[name])
  if "I2V" in code:
    config = dataclasses.replace(DIT_CONFIG, in_channels=2 * DIT_CONFIG.out_channels)
    shutil.copytree(model, tmp_path / "i2v")
    diffusers.save_transformer(tmp_path / "i2v" / "transformer", *draw(DiT, config))
    Image.new("RGB", (24, 16), (200, 30, 60)).save(tmp_path / "input.jpg")
  folders = {"MODEL": model, "LORA": lora, "OUT": tmp_path, "I2V": tmp_path / "i2v"}
  for word, path in folders.items():
    code = code.replace(f'"{word}', f'"{path}')
  exec(imported + code, {"QUICK": QUICK, "is_on_host": is_on_host})
  if "export_to_video" in code:
    assert probe(tmp_path / "output.mp4").num_frames == 9


@pytest.fixture(scope="module")
def pipe():
  return make_pipeline()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_inference_steps": None}, "num_inference_steps=None: must be a whole number"),
    ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: must be a whole number"),
    ({"num_frames": "9"}, "num_frames='9'"),
    ({"height": True}, "height=True"),
    ({"seed": None}, "seed=None"),
    ({"seed": 1.5}, "seed=1.5"),
    ({"seed": 1, "generator": torch.Generator()}, "either seed or generator"),
    ({"generator": np.random.default_rng(0)}, "generator cannot be given"),
  ],
)
def test_what_is_no_whole_number_is_refused_by_name(pipe, changes, message):
  with pytest.raises(UserError, match=message):
    pipe("a circle", **{**QUICK, **changes})


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda pipe: pipe.to(torch.float16), r"to\(torch.float16\): not a device"),
    (lambda pipe: type(pipe).from_pretrained("x", torch_dtype=torch.int8), "torch.int8"),
    (lambda pipe: pipe.fuse_lora(components=["text_encoder"]), "only the transformer has adapters"),
    (lambda pipe: pipe.delete_adapters("x"), "There is no adapter 'x'"),
    (lambda pipe: pipe.load_lora_weights({"a.lora_A.weight": "x"}), "is str, not an array"),
    (lambda pipe: pipe.load_lora_weights({}), "changes nothing of a transformer"),
    (lambda pipe: pipe.load_lora_weights({1: np.ones(2)}), "The state dict: 1 is no name"),
    (lambda pipe: pipe.load_lora_weights({"a": np.ones(2) > 0}), "an array of bool, not an array"),
    (lambda pipe: pipe.load_lora_weights({"a": np.ones(2) * 1j}), "an array of complex128, not"),
    (lambda _: load_image("https://host/a.png"), "nothing is fetched here; download it"),
    (lambda _: load_video("/no/such.mp4"), r"load_video\(/no/such.mp4\): "),
  ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_with_its_reason(pipe, call, message):
  with pytest.raises(UserError, match=message):
    call(pipe)


FRAMES = np.zeros((9, 16, 24, 3))


@pytest.mark.parametrize(
  ("video", "message"),
  [
    ([], r"video is \[\]: pass at least one"),
    (FRAMES.astype(np.int64), "an array of int64: give bytes"),
    (FRAMES.astype(np.uint16), "an array of uint16: give bytes"),
    (FRAMES.astype(bool), "an array of bool: give bytes"),
    (FRAMES + 255.0, "pixels from 255 to 255: give bytes"),
    (FRAMES * np.nan, "pixels from nan to nan: give bytes"),
    ([np.zeros((16, 24, 3)), np.zeros((8, 24, 3))], "frames of unequal sizes"),
    ([Image.new("RGB", (24, 16)), Image.new("RGB", (8, 16))], "frames of unequal sizes"),
  ],
)
def test_frames_that_are_not_what_they_must_be_are_refused_by_name(video, message):
  from cogvideox_jax.inference import pixels
  from cogvideox_jax.inference.size import Size

  with pytest.raises(UserError, match=message):
    pixels.videos(video, 1, Size(9, 16, 24))
