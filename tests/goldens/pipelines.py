"""Whole pipelines, given the reference's draws."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from einops import rearrange

from cogvideox_jax.conversion import component_fields
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.noise_draws import INITIAL, POSTERIOR
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.inference.video_to_video import VideoToVideo

from .compared import PIPELINE, Compared
from .folder import Case, Folder, Stored
from .schedulers import SOLVERS

PIPELINES: dict[str, type[Pipeline]] = {
  "CogVideoXPipeline": Pipeline,
  "CogVideoXImageToVideoPipeline": ImageToVideo,
  "CogVideoXVideoToVideoPipeline": VideoToVideo,
}
NOT_ARGUMENTS = {"pipeline", "scheduler", "frames_out", "latent_frames_denoised"}


def pipeline(case: Case) -> Iterator[Compared]:
  call, stored = case.call, case.stored
  pipe = _make(case.folder, PIPELINES[call["pipeline"]], case.entry["model"])
  arguments = {name: x for name, x in call.items() if name not in NOT_ARGUMENTS}
  arguments["prompt_embeds"] = stored["in.prompt_embeds"]
  if call["guidance_scale"] > 1:
    arguments["negative_prompt_embeds"] = stored["in.negative_prompt_embeds"]
  if "in.image" in stored:
    arguments["image"] = np.moveaxis(stored["in.image"], 1, -1)
  if "in.video" in stored:
    arguments["video"] = np.moveaxis(stored["in.video"], 2, -1)
  draws = _draws(stored, case.entry["values"]["draw_sources"], call["num_inference_steps"])
  timesteps: list[int] = []

  def on_step(_, step: int, timestep: int, arrays: dict) -> dict:
    timesteps.append(timestep)
    return {}

  def run(output_type: str):
    return pipe(
      **arguments,
      solver=SOLVERS[call["scheduler"]],
      draws=lambda videos, draw, shape: draws[draw],
      output_type=output_type,
      callback_on_step_end=on_step,
    ).frames

  latents = rearrange(run("latent"), "b f h w c -> b f c h w")
  yield Compared("in.timesteps", timesteps, 0.0)
  yield Compared("out.latents", latents, PIPELINE)
  if "out.frames" in stored:
    yield Compared("out.frames", np.moveaxis(run("np"), -1, 2), PIPELINE)


def _make(folder: Folder, kind: type[Pipeline], components: dict) -> Pipeline:
  """The pipeline of a folder, or of single models."""
  progress = Progress(show=False)
  if "folder" in components:
    return kind.from_pretrained(folder.path / components["folder"], progress=progress)
  config, params = folder.model(components["vae"])
  return kind(
    folder.model(components["transformer"]),
    (dataclasses.replace(config, **components["vae_config_overrides"]), params),
    folder.model(components["text_encoder"]),
    None,
    component_fields.read_noise(components["scheduler_config"], "scheduler_config"),
    progress=progress,
  )


def _draws(stored: Stored, sources: list[str], steps: int) -> dict[int, np.ndarray]:
  """The reference's draws by what they are for.

  Its DPM solver draws twice in a step that looks back, and uses the second.
  """
  drawn = iter((source, stored[f"rng.draw{i:02d}"]) for i, source in enumerate(sources))
  draws = {}
  timesteps = stored["in.timesteps"].tolist()
  step = 0
  for source, array in drawn:
    if source == "vae":
      draws[POSTERIOR] = np.moveaxis(array, 1, -1)
    elif source.startswith("pipeline"):
      draws[INITIAL] = np.moveaxis(array, 2, -1)
    else:
      if step and timesteps[step] - 1000 // steps >= 0:
        _, array = next(drawn)
      step += 1
      draws[INITIAL + step] = np.moveaxis(array, 2, -1)
  return draws
