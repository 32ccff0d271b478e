"""Reference tensors of diffusers and transformers, through the public code, conversion included.

python -m tests.goldens FOLDER

runs every case of a folder of reference tensors, whose index.json says what each is. It prints a
table of tensors and last how many cases passed; the exit code is 1 unless all did. Tolerances, in
float32: networks 2e-5 when they are fed the stored timestep sinusoid, whose rounding takes 2e-4;
the VAE 2e-5, or 4 times what the reference's float32 differs from its float64; schedulers and
tables 1e-5; whole pipelines 2e-4.
"""

import dataclasses
import functools
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from safetensors.numpy import load_file

from cogvideox_jax.conversion import component_fields, diffusers, lora, sat, tensors
from cogvideox_jax.diffusion import guidance, noise, solvers
from cogvideox_jax.inference.denoising import INITIAL, POSTERIOR, clip_layout
from cogvideox_jax.inference.image_to_video import ImageToVideo
from cogvideox_jax.inference.pipeline import Pipeline
from cogvideox_jax.inference.progress import Progress
from cogvideox_jax.inference.video_to_video import VideoToVideo
from cogvideox_jax.models import positions, vae
from cogvideox_jax.models.attention import attention
from cogvideox_jax.models.dit import DiT, patchify, timestep_sinusoid, unpatchify
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Encoder
from cogvideox_jax.models.tiling import Side, Tiling
from cogvideox_jax.types import TEXT, VISION

NETWORK, SINUSOID, EXACT, PIPELINE = 2e-5, 2e-4, 1e-5, 2e-4

LOADS = {
  "CogVideoXTransformer3DModel": diffusers.load_transformer,
  "AutoencoderKLCogVideoX": diffusers.load_vae,
  "T5EncoderModel": diffusers.load_text_encoder,
}
PIPELINES: dict[str, type[Pipeline]] = {
  "CogVideoXPipeline": Pipeline,
  "CogVideoXImageToVideoPipeline": ImageToVideo,
  "CogVideoXVideoToVideoPipeline": VideoToVideo,
}
SOLVERS = {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}


class Compared(NamedTuple):
  """One of our arrays, laid out as the reference's of that name."""

  tensor: str
  ours: Any
  tolerance: float


class Result(NamedTuple):
  case: str
  tensor: str
  error: float  # The largest; nan and infinity where shapes or infinities differ.
  floor: float | None
  tolerance: float

  @property
  def passed(self) -> bool:
    return self.error <= self.tolerance  # False for nan.


class Folder:
  """A folder of reference tensors, with the models that were loaded of it."""

  def __init__(self, path: Path):
    self.path = path
    self.index = json.loads((path / "index.json").read_text())
    self.cases: dict[str, dict] = self.index["cases"]
    self.model = functools.cache(self._load)
    self.tensors = functools.cache(self._tensors)

  @property
  def names(self) -> list[str]:
    """Of all cases; `sat:NAME` for a SAT file, on which its model's cases are run."""
    return [*self.cases, *(f"sat:{name}" for name in self.index.get("sat", {}))]

  def _load(self, name: str):
    model = self.index["models"][name]
    return LOADS[model["class"]](self.path / model["dir"])

  def _tensors(self, case: str) -> dict[str, np.ndarray]:
    return load_file(self.path / self.cases[case]["file"])

  def run(self, name: str) -> list[Result]:
    """Compares all that a case holds; one that is not known, or raises, has failed."""
    try:
      if name.startswith("sat:"):
        return list(self._run_sat(name))
      return list(self._compare(name, self._handler(name)(self, name)))
    except Exception as error:  # noqa: BLE001 - one case must not hide the others.
      traceback.print_exc(limit=-3)
      return [Result(name, f"{type(error).__name__}: {error}"[:60], math.nan, None, 0.0)]

  def _handler(self, name: str) -> Callable[["Folder", str], Iterator[Compared]]:
    kind = self.cases[name]["kind"]
    if kind == "table":
      kind = next((table for table in TABLES if name.startswith(table)), f"table {name}")
    if kind not in KINDS | TABLES:
      raise LookupError(f"unknown kind of case: {kind}")
    return (KINDS | TABLES)[kind]

  def _compare(
    self, name: str, compared: Iterator[Compared], label: str | None = None
  ) -> Iterator[Result]:
    stored, seen = self.tensors(name), set()
    floors = self.cases[name].get("noise_floor") or {}
    for tensor, ours, tolerance in compared:
      key = tensor.split(" ")[0]  # What follows says how it was computed.
      seen.add(key)
      floor = floors.get(key)
      yield Result(label or name, tensor, largest_error(ours, stored[key]), floor, tolerance)
    kinds = ("out.", "tab.") if self.cases[name]["kind"] == "table" else ("out.",)
    for key in sorted(set(stored) - seen):
      if key.startswith(kinds):
        yield Result(label or name, f"{key} was not computed", math.nan, None, 0.0)

  def _run_sat(self, name: str) -> Iterator[Result]:
    entry = self.index["sat"][name.removeprefix("sat:")]
    model, path = entry["model"], self.path / entry["file"]
    config, reference = self.model(model)
    is_vae = self.index["models"][model]["class"] == "AutoencoderKLCogVideoX"
    params = (sat.load_vae if is_vae else sat.load_transformer)(path, config)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
      if not np.array_equal(ours, theirs):
        raise ValueError("a converted weight is not that of the reference")
    of_model = [case for case in self.cases if self._uses(case, model)]
    if not of_model:
      raise LookupError(f"no case runs {model}")
    twin = Folder(self.path)
    twin.model = lambda other: (config, params) if other == model else self.model(other)
    for case in of_model:
      yield from twin._compare(case, twin._handler(case)(twin, case), f"{name} {case}")

  def _uses(self, case: str, model: str) -> bool:
    parts = self.cases[case]["model"]
    if isinstance(parts, dict):
      return "folder" not in parts and model in (parts["vae"], parts["transformer"])
    return parts == model and self.cases[case]["kind"] != "lora"


def largest_error(ours: Any, theirs: np.ndarray) -> float:
  ours = np.asarray(ours)
  if ours.shape != theirs.shape:
    return math.nan
  with np.errstate(invalid="ignore"):
    difference = np.abs(np.float64(ours) - np.float64(theirs))
  return float(difference.max(initial=0.0))  # nan if any is.


def channels_last(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, 1, -1)


def channels_first(x: Any) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, 1)


def text_encoder(folder: Folder, case: str) -> Iterator[Compared]:
  config, params = folder.model(folder.cases[case]["model"])
  model, stored = nnx.merge(graph_of(T5Encoder, config), params), folder.tensors(case)
  ids = jnp.asarray(stored["in.input_ids"])
  yield Compared("out.no_mask", model(ids), NETWORK)
  if "out.masked" in stored:
    mask = jnp.asarray(stored["in.attention_mask"])
    yield Compared("out.masked", model(ids, mask), NETWORK)


def vae_of(folder: Folder, case: str) -> tuple[vae.VAE, Tiling | None, Callable[[str], float]]:
  """The model, how its videos are tiled, and the tolerance of a tensor."""
  spec = folder.cases[case]
  config, params = folder.model(spec["model"])
  call, tiling = spec["call"], None
  if call.get("tiling"):
    height, width = (
      Side(
        call[f"tile_sample_min_{side}"],
        call[f"tile_latent_min_{side}"],
        call[f"tile_overlap_factor_{side}"],
      )
      for side in ("height", "width")
    )
    tiling = Tiling(height, width)
    if tiling != config.tiling:
      raise ValueError(f"the reference tiles as {tiling}, the model's config says {config.tiling}")
  floors = spec["noise_floor"]
  model = nnx.merge(graph_of(vae.VAE, config), params)
  return model, tiling, lambda key: max(NETWORK, 4 * floors.get(key, max(floors.values())))


def vae_encode(folder: Folder, case: str) -> Iterator[Compared]:
  model, tiling, tolerance = vae_of(folder, case)
  stored = folder.tensors(case)
  frames = jnp.asarray(channels_last(stored["in.sample"]))
  mean, logvar = vae.encode(model, frames, tiling=tiling)
  ours = {"mean": mean, "logvar": logvar, "std": jnp.exp(logvar / 2)}
  ours["moments"] = jnp.concatenate([mean, logvar], axis=-1)
  if "rng.eps" in stored:
    eps = jnp.asarray(channels_last(stored["rng.eps"]))
    ours["z"] = vae.sample_posterior(mean, logvar, eps)
  for name, array in ours.items():
    if f"out.{name}" in stored:
      yield Compared(f"out.{name}", channels_first(array), tolerance(f"out.{name}"))


def vae_decode(folder: Folder, case: str) -> Iterator[Compared]:
  model, tiling, tolerance = vae_of(folder, case)
  z = jnp.asarray(channels_last(folder.tensors(case)["in.z"]))
  frames = vae.decode(model, z, tiling=tiling)
  yield Compared("out.sample", channels_first(frames), tolerance("out.sample"))


def run_transformer(
  config, params, stored: dict[str, np.ndarray], time: Any, dtype: Any = jnp.float32
) -> jax.Array:
  """The network on a case's inputs, laid out as the reference's output."""
  latents = jnp.asarray(rearrange(stored["in.hidden_states"], "b f c h w -> b f h w c"))
  text = jnp.asarray(stored["in.encoder_hidden_states"])
  rows, length = text.shape[:2]
  layout = clip_layout(latents.shape[1:], length, config.patch)
  grid = tuple(layout.grids[0, 1].tolist())
  if config.positions != "sincos" and "in.rope_cos" not in stored:
    # The reference was given no rotation, as if all patches stood where there is none.
    config = dataclasses.replace(config, positions="rope_index")
    nowhere = np.where(layout.experts[..., None] == TEXT, layout.coordinates, 0)
    layout = layout._replace(coordinates=nowhere)
  vision = jnp.stack([patchify(clip, config.patch) for clip in latents])
  model = nnx.merge(graph_of(DiT, config, dtype=dtype), params)
  v = jax.jit(model.__call__, static_argnames="attention")(
    jnp.pad(vision, ((0, 0), (length, 0), (0, 0))),
    text[:, None],
    repeat(jnp.asarray(time), "b d -> b s d", s=2),
    jax.tree.map(lambda x: repeat(jnp.asarray(x), "1 ... -> b ...", b=rows), layout),
    attention=attention,
    ofs=jnp.asarray(stored.get("in.ofs", [2.0])[0]),
  )
  clips = [unpatchify(clip, config.patch, grid) for clip in v[:, length:]]
  return rearrange(jnp.stack(clips), "b f h w c -> b f c h w")


def transformer(folder: Folder, case: str) -> Iterator[Compared]:
  config, params = folder.model(folder.cases[case]["model"])
  stored = folder.tensors(case)
  own = timestep_sinusoid(jnp.asarray(stored["in.timestep"]), config.width)
  yield Compared("aux.time_proj", own, SINUSOID)
  if "in.rope_cos" in stored:
    yield from rotary_inputs(config, stored)
  given = run_transformer(config, params, stored, stored["aux.time_proj"])
  yield Compared("out.sample", given, NETWORK)
  yield Compared("out.sample with our sinusoid", run_transformer(config, params, stored, own), 2e-4)


def rotary_inputs(config, stored: dict[str, np.ndarray]) -> Iterator[Compared]:
  """The tables that the reference was given: ours are made inside the network."""
  _, frames, _, height, width = stored["in.hidden_states"].shape
  layout = jax.tree.map(jnp.asarray, clip_layout((frames, height, width), 0, config.patch))
  grid = positions.grid_of_token(layout.grids, layout.segment_ids)
  base = config.base_grid[1:]
  where = positions.rotary_positions(config.positions, layout.coordinates, grid, base)
  tables = positions.rotary_table(where, layout.experts, config.head_dim)
  for name, table in zip(("cos", "sin"), tables, strict=True):
    yield Compared(f"in.rope_{name}", np.repeat(table[0], 2, axis=-1), EXACT)


def low_rank(folder: Folder, case: str) -> Iterator[Compared]:
  """out.FILE.HOW: a LoRA file's updates at the weight that HOW says."""
  config, params = folder.model(folder.cases[case]["model"])
  stored = folder.tensors(case)
  weights = {"scale1": 1.0, "kwscale0.5": 0.5, "adapterweight2": 2.0, "fused1": 1.0}
  for key in sorted(stored):
    if not key.startswith("out."):
      continue
    changed = params
    if key != "out.base":
      file, how = key.removeprefix("out.").split(".", 1)
      updates = lora.load(folder.path / "lora" / f"{file}.safetensors")
      changed = tensors.materialize(lora.fuse(params, config, updates, weights[how]))
    yield Compared(key, run_transformer(config, changed, stored, stored["aux.time_proj"]), NETWORK)


def schedule_of(folder: Folder, case: str) -> noise.NoiseSchedule:
  return noise.noise_schedule(component_fields.read_noise(folder.cases[case]["call"], case))


def scheduler(folder: Folder, case: str) -> Iterator[Compared]:
  """Along the trajectory of a fixed function that stands for a network."""
  call, stored = folder.cases[case]["call"], folder.tensors(case)
  schedule = schedule_of(folder, case)
  make = {"ddim": solvers.ddim, "dpm": solvers.dpm}[SOLVERS[call["class"]]]
  solver = make(schedule, call["num_inference_steps"])
  yield Compared("in.timesteps", solver.timesteps, 0.0)
  if "tab.alphas_cumprod" in stored:
    yield Compared("tab.alphas_cumprod", schedule.alphas_cumprod, EXACT)
  x = x0 = jnp.asarray(stored["in.start"])
  path, clean = [], []
  for step, timestep in enumerate(solver.timesteps.tolist()):
    v = 0.8 * jnp.sin(1.3 * x + 0.002 * timestep) + 0.3 * x * math.cos(timestep / 300)
    weights = solvers.Weights(*(column[step] for column in solver.weights))
    added = stored.get("rng.noise_used", np.zeros((step + 1, *x.shape), np.float32))[step]
    x, x0 = solvers.solver_step(weights, x, v, x0, jnp.asarray(added))
    path.append(x)
    clean.append(x0)
  yield Compared("out.prev_sample", jnp.stack(path), EXACT)
  if "out.pred_x0" in stored:
    yield Compared("out.pred_x0", jnp.stack(clean), EXACT)


def noise_schedule(folder: Folder, case: str) -> Iterator[Compared]:
  stored, schedule = folder.tensors(case), schedule_of(folder, case)
  config = schedule.config
  alpha = schedule.alpha(jnp.asarray(stored["in.timesteps"]))[:, None, None, None, None]
  x0, drawn = jnp.asarray(stored["in.original"]), jnp.asarray(stored["in.noise"])
  yield Compared("tab.alphas_cumprod", schedule.alphas_cumprod, EXACT)
  yield Compared("tab.betas", noise.betas(config), EXACT)
  yield Compared("out.add_noise", noise.add_noise(x0, drawn, alpha), EXACT)
  yield Compared("out.velocity", noise.velocity(x0, drawn, alpha), EXACT)


def sinusoids(folder: Folder, case: str) -> Iterator[Compared]:
  stored = folder.tensors(case)
  for key in stored:
    if key.startswith("out.dim"):
      width = int(key.removeprefix("out.dim"))
      yield Compared(key, timestep_sinusoid(jnp.asarray(stored["in.timesteps"]), width), SINUSOID)


def timesteps_and_guidance(folder: Folder, case: str) -> Iterator[Compared]:
  scale = folder.cases[case]["call"]["guidance_scale"]
  for key in folder.tensors(case):
    _, table, steps = key.split(".")
    ours = solvers.spaced_timesteps(int(steps), 1000)
    if table == "dynamic_cfg":
      ours = guidance.dynamic_scales(scale, ours, int(steps))
    yield Compared(key, ours, EXACT)


def along_axes(size: int) -> np.ndarray:
  """Coordinates along t at h = w = 0, along h, and along w: [3 size 3]."""
  edges = np.zeros((3, size, 3), np.int32)
  for axis in range(3):
    edges[axis, :, axis] = np.arange(size)
  return edges


def rotary_tables(folder: Folder, case: str) -> Iterator[Compared]:
  """At real sizes. The reference stores its separable tables axis by axis, each angle twice."""
  call, entries = folder.cases[case]["call"], folder.cases[case]["values"]["rope"]
  head_dim = call["head_dim"]
  edges = along_axes(max(max(entry["grid"]) for entry in entries))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def tables(rule, base, coordinates, grids):
    where = positions.rotary_positions(rule, coordinates, grids, base)
    return positions.rotary_table(where, jnp.full(where.shape[:2], VISION), head_dim)

  for entry in entries:
    key, grid = entry["key"], entry["grid"]
    published = key.startswith("tab.rope10")
    rule, base = ("rope", call["base10"]) if published else ("rope_index", call["base15"])
    grids = np.broadcast_to(np.array(grid, np.int32), edges.shape)
    ends = np.cumsum([head_dim // 8, head_dim // 16 * 3])
    for name, table in zip(("cos", "sin"), tables(rule, tuple(base), edges, grids), strict=True):
      for axis, part in enumerate(np.split(np.asarray(table), ends, axis=-1)):
        pairs = np.repeat(part[axis, : grid[axis]], 2, axis=-1)
        yield Compared(f"{key}.{name}_{'thw'[axis]}", pairs, EXACT)


def crop_regions(folder: Folder, case: str) -> Iterator[Compared]:
  """The reference's rows end in the crop that its positions are taken from."""
  table = folder.tensors(case)["tab.crops"]
  ours = []
  for height, width, base_width, base_height, *_ in table.tolist():
    (top, size_h), (left, size_w) = positions.crop((height, width), (base_height, base_width))
    ends = int(top) + int(size_h), int(left) + int(size_w)
    ours.append([height, width, base_width, base_height, int(top), int(left), *ends])
  yield Compared("tab.crops", np.array(ours), EXACT)


def sincos_tables(folder: Folder, case: str) -> Iterator[Compared]:
  """At real sizes, axis by axis: the channels are those of time, of width, of height."""
  call, stored = folder.cases[case]["call"], folder.tensors(case)
  sizes = {"t": call["frames"], "h": call["grid_h"], "w": call["grid_w"]}
  edges = along_axes(max(sizes.values()))
  for width in sorted({int(key.removeprefix("tab.sincos").split(".")[0]) for key in stored}):
    experts = jnp.full(edges.shape[:2], VISION)
    table = np.asarray(positions.sincos_table(jnp.asarray(edges), experts, width, 1.875, 1.0))
    parts = np.split(table, [width // 4, width // 4 + width // 8 * 3], axis=-1)
    for axis, part in ((0, parts[0]), (2, parts[1]), (1, parts[2])):
      letter = "thw"[axis]
      yield Compared(f"tab.sincos{width}.{letter}", part[axis, : sizes[letter]], EXACT)


def pipeline(folder: Folder, case: str) -> Iterator[Compared]:
  spec, stored = folder.cases[case], folder.tensors(case)
  call, parts = dict(spec["call"]), spec["model"]
  kind = PIPELINES[call.pop("pipeline")]
  solver = SOLVERS[call.pop("scheduler")]
  arguments = {k: v for k, v in call.items() if k not in ("frames_out", "latent_frames_denoised")}
  pipe = make_pipeline(folder, kind, parts)
  arguments["prompt_embeds"] = stored["in.prompt_embeds"]
  if call["guidance_scale"] > 1:
    arguments["negative_prompt_embeds"] = stored["in.negative_prompt_embeds"]
  if "in.image" in stored:
    arguments["image"] = np.moveaxis(stored["in.image"], 1, -1)
  if "in.video" in stored:
    arguments["video"] = np.moveaxis(stored["in.video"], 2, -1)
  draws = recorded(stored, spec["values"]["draw_sources"], call["num_inference_steps"])
  steps: list[int] = []

  def on_step(_, step: int, timestep: int, arrays: dict) -> dict:
    steps.append(timestep)
    return {}

  def run(output_type: str):
    return pipe(
      **arguments,
      solver=solver,
      draws=lambda videos, draw, shape: draws[draw],
      output_type=output_type,
      callback_on_step_end=on_step,
    ).frames

  latents = rearrange(run("latent"), "b f h w c -> b f c h w")
  yield Compared("in.timesteps", steps, 0.0)
  yield Compared("out.latents", latents, PIPELINE)
  if "out.frames" in stored:
    yield Compared("out.frames", np.moveaxis(run("np"), -1, 2), PIPELINE)


def make_pipeline(folder: Folder, kind: type[Pipeline], parts: dict) -> Pipeline:
  progress = Progress(show=False)
  if "folder" in parts:
    return kind.from_pretrained(folder.path / parts["folder"], progress=progress)
  config, params = folder.model(parts["vae"])
  noise_config = component_fields.read_noise(parts["scheduler_config"], "scheduler_config")
  return kind(
    folder.model(parts["transformer"]),
    (dataclasses.replace(config, **parts["vae_config_overrides"]), params),
    folder.model(parts["text_encoder"]),
    None,
    noise_config,
    progress=progress,
  )


def recorded(
  stored: dict[str, np.ndarray], sources: list[str], steps: int
) -> dict[int, np.ndarray]:
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


KINDS: dict[str, Callable[[Folder, str], Iterator[Compared]]] = {
  "scheduler": scheduler,
  "transformer": transformer,
  "lora": low_rank,
  "vae_encode": vae_encode,
  "vae_decode": vae_decode,
  "t5": text_encoder,
  "pipeline": pipeline,
}
TABLES: dict[str, Callable[[Folder, str], Iterator[Compared]]] = {
  "crop_regions": crop_regions,
  "rope_tables": rotary_tables,
  "sincos_tables": sincos_tables,
  "sched_tables": noise_schedule,
  "timestep_sinusoids": sinusoids,
  "timesteps_and_dynamic_cfg": timesteps_and_guidance,
}


def main(path: str) -> int:
  folder = Folder(Path(path))
  passed = failed = 0
  print(f"{'case':44} {'tensor':44} {'error':>9} {'floor':>9} {'tolerance':>9}")
  for name in folder.names:
    results = folder.run(name)
    for result in results:
      floor = "–" if result.floor is None else f"{result.floor:.1e}"
      verdict = "pass" if result.passed else "FAIL"
      numbers = f"{result.error:9.1e} {floor:>9} {result.tolerance:9.1e}"
      print(f"{result.case:44} {result.tensor:44} {numbers} {verdict}", flush=True)
    good = bool(results) and all(result.passed for result in results)
    passed, failed = passed + good, failed + (not good)
  print(f"{passed} passed, {failed} failed")
  return 1 if failed else 0


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("usage: python -m tests.goldens FOLDER")
  sys.exit(main(sys.argv[1]))
