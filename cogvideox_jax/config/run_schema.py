"""Keys of a training config that say where it runs, and what it saves, measures and shows.

See `config/schema.py` for the whole config and for what the sources' names mean.
"""

from dataclasses import dataclass, field

from cogvideox_jax.config_keys import AT_LEAST_ZERO, Range, key
from cogvideox_jax.diffusion.solvers import SOLVERS

DEVICES = Range(
  "at least 1, or -1 for all devices that are left", lambda number: number == -1 or number >= 1
)
CONTEXT = Range(
  "at least 1, or -1 for all devices that are left, or 0 for what each stage says",
  lambda number: number >= -1,
)


@dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis, in each slice of the job. One axis may be -1."""

  data: int = field(
    metadata=key("Devices that share the rows and hold whole copies.", allowed=DEVICES)
  )
  fsdp: int = field(metadata=key("Devices that share the rows and the state.", allowed=DEVICES))
  context: int = field(
    metadata=key(
      "Devices that share the tokens of each row; for the VAE, the frames of each clip.",
      allowed=CONTEXT,
    )
  )
  tensor: int = field(
    metadata=key(
      "Devices that share the heads and the MLP's width; for the VAE, the height of each clip.",
      allowed=DEVICES,
    )
  )


@dataclass(frozen=True)
class CheckpointConfig:
  """When to save, and what to keep."""

  every: int = field(metadata=key("Updates from save to save. The end of a stage is always saved."))
  keep: int = field(metadata=key("Newest checkpoints to keep."))


@dataclass(frozen=True)
class ValidationConfig:
  """The loss on held-out clips."""

  every: int = field(
    metadata=key("Updates from measurement to measurement. 0: never.", allowed=AT_LEAST_ZERO)
  )
  batches: int = field(metadata=key("Batches of held-out clips in a measurement, at most."))


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
  """Videos sampled during training; also how `sample` samples a workdir by default."""

  every: int = field(
    metadata=key("Updates from preview to preview. 0: never.", allowed=AT_LEAST_ZERO)
  )
  prompts: tuple[str, ...] = field(
    metadata=key("Prompts to sample, each with a fixed seed.", form="hold texts", may_be_empty=True)
  )
  images: tuple[str, ...] = field(
    default=(),
    metadata=key(
      "Image files, one for each prompt, for models that see an image.",
      form="hold names of files",
      may_be_empty=True,
      is_path=True,
    ),
  )
  num_frames: int = field(metadata=key("Pixel frames of a preview, 4k+1."))
  height: int = field(metadata=key("Height of a preview in pixels."))
  width: int = field(metadata=key("Width of a preview in pixels."))
  steps: int = field(metadata=key("Sampling steps.", "published pipelines"))
  guidance_scale: float = field(
    metadata=key("Scale of classifier-free guidance.", "published pipelines", allowed=AT_LEAST_ZERO)
  )
  solver: str = field(
    metadata=key("Sampling method.", "published 2B scheduler", choices=tuple(SOLVERS))
  )
