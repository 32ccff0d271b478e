"""Methods of diffusers' pipelines that scripts call beside those of `Pipeline`."""

import abc
import dataclasses
from typing import Any, TypeVar

from cogvideox_jax.conversion.folder import Settings
from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule
from cogvideox_jax.inference.calls_of_diffusers import Scheduler, check_device
from cogvideox_jax.inference.request import SampledModel

Owner = TypeVar("Owner", bound="SwitchesOfDiffusers")


class SwitchesOfDiffusers(abc.ABC):
  """Other names and forms of what a pipeline can do."""

  settings: Settings
  _noise: NoiseConfig
  _model: SampledModel

  @abc.abstractmethod
  def enable_slicing(self, enabled: bool = True) -> None:
    """See `Pipeline`."""

  @abc.abstractmethod
  def enable_tiling(self, enabled: bool = True) -> None:
    """See `Pipeline`."""

  @abc.abstractmethod
  def enable_model_cpu_offload(self) -> None:
    """See `Pipeline`."""

  def enable_sequential_cpu_offload(self) -> None:
    """The same as `enable_model_cpu_offload`: components take turns, not single layers."""
    self.enable_model_cpu_offload()

  def disable_slicing(self) -> None:
    """Undoes `enable_slicing`."""
    self.enable_slicing(False)

  def disable_tiling(self) -> None:
    """Undoes `enable_tiling`."""
    self.enable_tiling(False)

  @property
  def vae(self: Owner) -> Owner:
    """Where diffusers' calls switch tiling and slicing: `pipe.vae.enable_tiling()`."""
    return self

  def to(self: Owner, *devices: Any) -> Owner:
    """Returns the pipeline as it is, because JAX has put it on its devices.

    Raises:
      UserError: the argument is no device, such as a dtype.
    """
    for device in devices:
      check_device(device)
    return self

  @property
  def scheduler(self) -> Scheduler:
    """The noise schedule and the solver, as diffusers' calls replace them."""
    return Scheduler(self._noise, self.settings.solver)

  @scheduler.setter
  def scheduler(self, scheduler: Scheduler) -> None:
    self._noise = scheduler.noise
    self.settings = dataclasses.replace(self.settings, solver=scheduler.solver)
    schedule = noise_schedule(scheduler.noise)
    self._model = self._model._replace(schedule=schedule, settings=self.settings)
