"""What diffusers' layout cannot say: the export is exact at its sample size, and says the rest."""

import dataclasses

import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from diffusers import CogVideoXPipeline
from drawn import DIT_CONFIG, T5_CONFIG, VAE_CONFIG, draw
from model_folder import make_model

from cogvideox_jax import convert
from cogvideox_jax.conversion import diffusers, diffusers_limits, tensors
from cogvideox_jax.conversion.card import Origin
from cogvideox_jax.conversion.diffusers_limits import SampleSize
from cogvideox_jax.conversion.folder import Settings, index_fields, open_model
from cogvideox_jax.conversion.model_contents import Model, Network
from cogvideox_jax.errors import UserError
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.models.dit import DiT
from cogvideox_jax.models.vae import VAE

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()
OWN = SampleSize(16, 24, 9)  # The sample size of DIT_CONFIG, whose latents are of 4 pixels.
SCALED = {"positions": "rope_scaled", "spatial_interpolation": 2.0}


def model_of(settings=None, sizes=(), vae=VAE_CONFIG, **changes) -> Model:
  """A model with changes of DIT_CONFIG."""
  config = dataclasses.replace(DIT_CONFIG, **changes)
  model = Model(Origin("drawn", "", ()))
  model.networks["transformer"] = Network("transformer", *draw(DiT, config), None)
  model.networks["vae"] = Network("vae", *draw(VAE, vae), None)
  model.index = index_fields(settings or Settings())
  model.trained_sizes = sizes
  return model


def fields_of(model: Model) -> dict:
  return dict(model.networks["transformer"].fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Model folders by their rule of positions."""
  folder = tmp_path_factory.mktemp("models")
  found = {"rope_index": make_model(folder / "index"), "rope_scaled": make_model(folder / "scaled")}
  scaled = dataclasses.replace(DIT_CONFIG, **SCALED)
  diffusers.save_transformer(found["rope_scaled"] / "transformer", *draw(DiT, scaled))
  return found


def export(source, target, size=None):
  values = {"source": str(source), "target": str(target), "format": "diffusers"}
  with flagsaver.flagsaver(**values, sample_size=size):
    convert.main()
  return target


def difference(source, exported, size: SampleSize) -> float:
  """The largest difference of the latents that both make of the same noise, at a size."""
  rng = np.random.default_rng(0)
  shape = (1, (size.frames - 1) // 4 + 1, size.height // 4, size.width // 4, 4)
  latents = rng.normal(size=shape).astype(np.float32)
  embeds = [
    rng.normal(size=(1, DIT_CONFIG.text_length, T5_CONFIG.width)).astype(np.float32) for _ in "np"
  ]
  call = {
    "height": size.height,
    "width": size.width,
    "num_frames": size.frames,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "output_type": "latent",
  }
  names = ("prompt_embeds", "negative_prompt_embeds")
  ours = Pipeline.from_pretrained(source, dtype="float32", progress=Progress(show=False))
  found = ours(latents=latents, **dict(zip(names, embeds, strict=True)), **call).frames
  theirs = CogVideoXPipeline.from_pretrained(exported, tokenizer=None)
  theirs.set_progress_bar_config(disable=True)
  given = {name: torch.from_numpy(x) for name, x in zip(names, embeds, strict=True)}
  noise = torch.from_numpy(latents).permute(0, 1, 4, 2, 3)
  expected = theirs(latents=noise, max_sequence_length=DIT_CONFIG.text_length, **given, **call)
  return np.abs(found - expected.frames.permute(0, 1, 3, 4, 2).numpy()).max()


def test_diffusers_computes_the_same_at_the_sample_size_and_others_elsewhere(folders, tmp_path):
  source = folders["rope_index"]
  there = export(source, tmp_path / "own")
  assert difference(source, there, OWN) < 1e-4
  other = SampleSize(24, 16, 5)
  assert difference(source, there, other) > 1e-2
  assert difference(source, export(source, tmp_path / "other", str(other)), other) < 1e-4


def test_scaled_positions_are_exact_at_a_chosen_size(folders, tmp_path, capsys):
  source = folders["rope_scaled"]
  with pytest.raises(UserError, match="rule of positions is rope_scaled"):
    export(source, tmp_path / "own")
  size = SampleSize(32, 16, 5)
  there = export(source, tmp_path / "there", str(size))
  assert difference(source, there, size) < 1e-4
  lines, card = capsys.readouterr().out, (there / "README.md").read_text()
  for text in (lines, card):
    assert "Positions (rope_scaled) are the model's at 32x16 pixels" in text
    assert "diffusers makes 16x8, from which it takes positions" in text
    assert "text_drop is zeros" in text
    assert "max_sequence_length=6" in text
  config = open_model(there).transformer()[0]  # For our own reader, the rule is the same.
  assert (config.positions, config.interpolations) == ("rope_scaled", (2.0, 1.0))


@pytest.mark.parametrize(
  ("changes", "size", "message"),
  [
    (SCALED, None, r"by \(2.0, 1.0\).*\n.*--sample_size=HxWxF with.*\n.*--format=orbax"),
    ({**SCALED, "sample_height": 8, "sample_width": 4}, None, "--sample_size=32x16x9 makes"),
    (SCALED, OWN, "diffusers would compute others at 16x24x9"),
    ({**SCALED, "temporal_interpolation": 2.0}, SampleSize(32, 16, 5), "would compute others"),
    ({**SCALED, "patch": (2, 2, 2)}, None, "would compute others at 16x24x9"),
    ({"positions": "rope"}, SampleSize(32, 16, 5), "depend on its sample size, 16x24x9"),
    ({}, SampleSize(30, 16, 5), "height must be a multiple of 8"),
    ({}, SampleSize(32, 16, 6), "frames - 1 must be a multiple of 4"),
  ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused_with_the_ways_out(changes, size, message):
  with pytest.raises(UserError, match=message):
    diffusers_limits.fit(model_of(**changes), size)


@pytest.mark.parametrize("text", ["480x720", "480x720x0", "axbxc", "480,720,49"])
def test_a_size_of_another_form_is_refused(text):
  with pytest.raises(UserError, match=f"--sample_size={text}: give HEIGHTxWIDTHxFRAMES"):
    SampleSize.parse(text)


@pytest.mark.parametrize(
  "changes",
  [
    {"positions": "rope"},
    {"positions": "sincos"},
    {"positions": "rope_index", "patch": (2, 2, 2)},
    {"text_length": 226, "positions": "rope_scaled", "spatial_interpolation": 1.0},
  ],
)
def test_a_rule_of_diffusers_own_leaves_the_config_as_it_is(changes):
  model = model_of(**changes)
  before = fields_of(model)
  diffusers_limits.fit(model)
  assert fields_of(model) == before


def test_the_sizes_of_the_training_that_differ_are_named():
  # Of 16 by 16 pixels, the crop of diffusers begins at 0, and the positions are the same.
  sizes = ((16, 24), (24, 16), (16, 16), (32, 48))
  (note,) = diffusers_limits.fit(model_of(sizes=sizes, text_length=226))
  assert "the model's at 16x24 pixels (height x width), at any" in note
  assert "such as 24x16, 32x48 of the training" in note


def test_sizes_that_diffusers_cannot_make_are_named():
  model = model_of(sizes=((16, 24), (32, 24)), patch=(2, 2, 2), text_length=226)
  (note,) = diffusers_limits.fit(model)
  assert "no video that is higher or wider than 16x24 pixels; 32x24 of" in note
  model = model_of(sizes=((16, 24), (32, 24)), patch=(2, 2, 2), text_length=226)
  assert not diffusers_limits.fit(model, SampleSize(32, 24, 9))
  assert fields_of(model)["sample_height"] == 8


@pytest.mark.parametrize(("solver", "name"), [("dpm", "DPM"), ("ddim", "DDIM")])
def test_the_solver_is_the_class_of_the_scheduler(solver, name):
  model = model_of(Settings(solver=solver, guidance_scale=4.0))
  model.scheduler = {"_class_name": "CogVideoXDDIMScheduler"}
  notes = diffusers_limits.fit(model)
  assert model.scheduler["_class_name"] == f"CogVideoX{name}Scheduler"
  assert model.index["scheduler"] == ["diffusers", f"CogVideoX{name}Scheduler"]
  assert "guidance_scale=4." in notes[-1]


def test_a_scheduler_without_settings_of_ours_keeps_its_class(folders, tmp_path):
  model = model_of()
  model.index = {"scheduler": ["diffusers", "CogVideoXDPMScheduler"]}
  diffusers_limits.fit(model)
  assert model.index == {"scheduler": ["diffusers", "CogVideoXDPMScheduler"]}


@pytest.mark.parametrize("inverts", [False, True])
@pytest.mark.parametrize("choice", ["raw", "scaled", "diffusers"])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_an_image_has_the_effect_on_the_model_that_it_had_in_training(choice, inverts, patch):
  vae = dataclasses.replace(VAE_CONFIG, invert_scale_latents=inverts, scaling_factor=0.5)
  model = model_of(Settings(image_scale=choice), vae=vae, in_channels=8, patch=patch)
  before = np.array(model.networks["transformer"].params["vision_in"]["kernel"])
  notes = diffusers_limits.fit(model)
  fields = model.networks["vae"].fields
  theirs = 2.0 if fields["invert_scale_latents"] else 0.5  # As diffusers multiplies the image.
  after = tensors.materialize(model.networks["transformer"].params)["vision_in"]["kernel"]
  noised = len(before) // 2
  np.testing.assert_array_equal(after[:noised], before[:noised])
  wanted = vae.image_scale(choice)
  np.testing.assert_allclose(after[noised:] * theirs, before[noised:] * wanted, rtol=1e-6)
  assert any("image_scale is raw" in note for note in notes) == (choice == "raw")
  assert model.index["cogvideox_jax"]["image_scale"] == "diffusers"


def test_a_sample_size_is_for_diffusers_alone(folders, tmp_path):
  values = {"source": str(folders["rope_index"]), "target": str(tmp_path / "x"), "format": "orbax"}
  with (
    flagsaver.flagsaver(**values, sample_size="16x24x9"),
    pytest.raises(UserError, match="orbax needs none"),
  ):
    convert.main()
