"""Suggests what would make a step of the VAE's training fit; see fixes.py."""

from cogvideox_jax import sharding
from cogvideox_jax.aot.topology import GIB, Topology
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.inference.size import Size
from cogvideox_jax.training import vae_stages
from cogvideox_jax.training.vae_stages import VAEStage


def suggest(
  config: VAETrainConfig, topology: Topology, stage: str, size: Size, clips: int, beside: int
) -> list[str]:
  """Returns suggestions, those first that change no number of the training.

  Args:
    stage: its name; empty if the config has none.
    clips: those of a batch, on all devices.
    beside: bytes on a device that the step holds beside its state.
  """
  plan = vae_stages.plan(config)
  chosen = next((one for one in plan if one.stage.name == stage), plan[0])
  found = [] if config.train.remat else [_RECOMPUTE]
  mesh = vae_stages.make_mesh(config, chosen, topology.devices)
  alone = clips // sharding.row_shards(mesh, sharding.rules_named(config.sharding))
  if config.train.microbatches < alone:
    found.append(
      f"Set config.train.microbatches={alone}: a device then computes with one clip of its {alone} "
      "at a time."
    )
  found += _share_frames(config, chosen, topology, size)
  keys = f"config.stages.{stage}" if config.stages else "config.data"
  found.append(
    f"Train on clips of {size.height // 2}x{size.width // 2} pixels ({keys}.sizes): a quarter of "
    f"what a step holds beside its state, {beside / GIB:.1f} GiB now."
  )
  return [*found, f"Train on shorter clips than {size.num_frames} frames ({keys}.durations)."]


_RECOMPUTE = (
  "Set config.train.remat=True: what is inside each ResNet block is computed again in the backward "
  "pass."
)


def _share_frames(
  config: VAETrainConfig, stage: VAEStage, topology: Topology, size: Size
) -> list[str]:
  """Suggests that more devices share the frames of a clip, if there are such devices and frames."""
  now = vae_stages.make_mesh(config, stage, topology.devices).shape["context"]
  latents = (size.num_frames - 1) // config.model.temporal_compression + 1
  # Each device takes two latents or more, as a chunk does.
  if 2 * now > len(topology.devices) or latents < 4 * now:
    return []
  key = "config.mesh.context"
  if config.stages and not config.mesh.context:
    key = f"config.stages.{stage.stage.name}.context"
  more = f"{2 * now} devices then share the {size.num_frames} frames of a clip, not {now}."
  return [f"Set {key}={2 * now}: {more}"]
