"""Whole pipelines, with every random draw that they make."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
  CogVideoXDDIMScheduler,
  CogVideoXDPMScheduler,
  CogVideoXImageToVideoPipeline,
  CogVideoXPipeline,
  CogVideoXVideoToVideoPipeline,
)
from torch import Tensor

from .draws import recorded_draws
from .folder import GoldensFolder
from .models import (
  empty_prompt,
  make_pipeline_vae,
  make_text_encoder,
  make_transformer,
  token_ids,
)
from .schedules import PUBLISHED

ABOUT = {
  "in.prompt_embeds": "what the text encoder makes of a prompt, without a mask",
  "in.negative_prompt_embeds": "the same of the empty prompt",
  "in.image": "[B,3,H,W] in [0, 1]",
  "in.video": "[B,F,3,H,W] in [0, 1]",
  "in.timesteps": "those that were run",
  "rng.draw": "every normal draw, in order; values.draw_sources says who drew it",
  "out.latents": "[B,F,C,H,W] at the end; the frames that 1.5 adds in front are among them",
  "out.frames": "[B,F,3,H,W] in [0, 1]; the frames that 1.5 adds in front are not",
  "dbg.latents": "after each step",
}


@dataclass(frozen=True)
class Case:
  pipeline: type
  transformer: str  # One of models.KINDS.
  scheduler: type
  call: dict[str, Any]
  snr_shift: float = 1.0
  scaling: float = 0.7
  invert: bool = False  # Whether an image's latents are divided by the scale.
  writes_folder: bool = False  # Others name their components among the models.
  decodes: bool = False


def cases(frames: int, odd_frames: int) -> dict[str, Case]:
  """odd_frames: such that 1.5 has to add a frame of latents in front."""
  dynamic = {"num_inference_steps": 4, "guidance_scale": 6.0, "use_dynamic_cfg": True}
  text, image, video = (
    CogVideoXPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXVideoToVideoPipeline,
  )
  ddim, dpm = CogVideoXDDIMScheduler, CogVideoXDPMScheduler
  of_2b = {"snr_shift": 3.0, "scaling": 1.15258426}
  guided = {"num_frames": frames, "num_inference_steps": 4, "guidance_scale": 6.0}
  unguided = {"num_frames": frames, "num_inference_steps": 3, "guidance_scale": 1.0}
  less = {"num_frames": odd_frames, "num_inference_steps": 4, "guidance_scale": 5.0}
  shortened = {**dynamic, "num_inference_steps": 5, "strength": 0.8}
  normal, odd = {"num_frames": frames, **dynamic}, {"num_frames": odd_frames, **dynamic}
  whole = {"writes_folder": True, "decodes": True}
  return {
    "t2v_2b_ddim": Case(text, "2b", ddim, guided, **of_2b, **whole),
    "t2v_2b_ddim_nocfg": Case(text, "2b", ddim, unguided, **of_2b),
    "t2v_5b_dpm_dyncfg": Case(text, "5b", dpm, normal),
    "t2v_15_dpm_padded": Case(text, "15", dpm, odd, invert=True, decodes=True),
    "i2v_5b_dpm": Case(image, "5b_i2v", dpm, normal),
    "i2v_15_ddim_padded": Case(image, "15_i2v", ddim, less, invert=True, **whole),
    "v2v_5b_dpm": Case(video, "5b", dpm, shortened),
  }


def make(folder: GoldensFolder) -> None:
  sizes, draws = folder.sizes, folder.draws
  folder.add_model("pvae", make_pipeline_vae(sizes, draws))
  encoder = make_text_encoder(sizes, draws)
  length = sizes.text_len
  prompt = token_ids(draws, "pipe/ids", length, [max(3, length // 2)])
  states = {
    "in.prompt_embeds": encoder(prompt)[0],
    "in.negative_prompt_embeds": encoder(empty_prompt(length))[0],
  }
  odd_frames = 9 if sizes.lat_f == 3 else 17
  for name, case in cases(sizes.frames, odd_frames).items():
    run(folder, name, case, states, encoder)


def run(
  folder: GoldensFolder, name: str, case: Case, states: dict[str, Tensor], encoder: Any
) -> None:
  """Writes the case pipe_NAME, and pipelines/NAME if it is one of a whole folder."""
  sizes, draws = folder.sizes, folder.draws
  schedule = {**PUBLISHED, "snr_shift_scale": case.snr_shift}
  pipe = case.pipeline(
    tokenizer=None,
    text_encoder=encoder,
    vae=make_pipeline_vae(sizes, draws, case.scaling, case.invert),
    transformer=make_transformer(case.transformer, sizes, draws),
    scheduler=case.scheduler(**schedule),
  )
  pipe.set_progress_bar_config(disable=True)
  components = {
    "transformer": f"transformer_{case.transformer}",
    "vae": "pvae",
    "text_encoder": "t5",
    "vae_config_overrides": {"scaling_factor": case.scaling, "invert_scale_latents": case.invert},
    "scheduler_config": {"_class_name": case.scheduler.__name__, **schedule},
  }
  if case.writes_folder:
    components["folder"] = f"pipelines/{name}"
    pipe.save_pretrained(folder.path / components["folder"])
  call = {**case.call, "height": 8 * sizes.lat_h, "width": 8 * sizes.lat_w}
  tensors = {**states, **pixels(folder, name, case, call)}
  arguments = {key.removeprefix("in."): x for key, x in tensors.items()}
  if case.call["guidance_scale"] <= 1:
    del arguments["negative_prompt_embeds"]
  arguments |= call | {"max_sequence_length": sizes.text_len, "return_dict": False}
  found, values = outputs(folder, name, pipe, arguments, case.decodes)
  folder.add_case(
    f"pipe_{name}",
    "pipeline",
    tensors | found,
    ABOUT,
    model=components,
    call={**call, "pipeline": case.pipeline.__name__, "scheduler": case.scheduler.__name__},
    values=values,
  )


def pixels(folder: GoldensFolder, name: str, case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
  """The image or video that a pipeline begins with."""
  size = 3, call["height"], call["width"]
  if case.pipeline is CogVideoXImageToVideoPipeline:
    return {"in.image": folder.draws.uniform(f"pipe/{name}/image", 1, *size)}
  if case.pipeline is CogVideoXVideoToVideoPipeline:
    video = folder.draws.uniform(f"pipe/{name}/video", 1, folder.sizes.frames, *size)
    return {"in.video": video}
  return {}


def outputs(
  folder: GoldensFolder, name: str, pipe: Any, arguments: dict[str, Any], decodes: bool
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
  """Outputs and draws, and who drew. Frames are of a second run with the same draws."""
  timesteps, latents = [], []

  def on_step_end(_: Any, step: int, timestep: Tensor, found: dict[str, Tensor]) -> dict:
    timesteps.append(timestep)
    latents.append(found["latents"].clone())
    return {}

  def generator() -> torch.Generator:
    return folder.draws.generator(f"generator/pipe/{name}")

  with recorded_draws() as draws:
    last = pipe(
      **arguments,
      generator=generator(),
      output_type="latent",
      callback_on_step_end=on_step_end,
    )[0]
  found = {"in.timesteps": torch.stack(timesteps), "out.latents": last}
  found |= {f"rng.draw{i:02d}": draw for i, (_, draw) in enumerate(draws)}
  if decodes:
    found["out.frames"] = pipe(**arguments, generator=generator(), output_type="pt")[0]
  if folder.sizes.debug:
    found["dbg.latents"] = torch.stack(latents)
  return found, {"draw_sources": [source for source, _ in draws]}
