"""What `--dry_run` of the trainings does: compiles a step for TPUs that are not there."""

from cogvideox_jax.config.schema import TrainConfig
from cogvideox_jax.config.vae_schema import VAETrainConfig


def run(config: TrainConfig | VAETrainConfig, topology: str) -> int:
  """Compiles the first stage's step, prints what `compile` prints, and writes nothing.

  Returns:
    The exit code. 0: it fits. 1: it does not.
  """
  # It takes seconds, which --help can do without.
  from cogvideox_jax.aot.report import as_table, report

  result = report(config, topology)
  print(as_table(result))
  return 0 if result["fits"] else 1
