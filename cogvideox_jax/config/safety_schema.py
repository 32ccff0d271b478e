"""The config keys of what keeps a training alive, which all trainings share."""

from dataclasses import dataclass, field

from cogvideox_jax.config_keys import AT_LEAST_ZERO, Range, key

SPIKE = Range("0, or at least 2", lambda number: number == 0 or number >= 2)


@dataclass(frozen=True)
class GuardConfig:
  """What becomes of a step whose numbers are wrong. If it is skipped, it changes no weight."""

  in_a_row: int = field(
    metadata=key(
      "After so many skipped steps in a row the run goes back to a checkpoint and leaves out the "
      "batches that were skipped. 0: no step is skipped, and the first whose loss or gradient is "
      "not finite ends the run.",
      allowed=AT_LEAST_ZERO,
    )
  )
  spike: float = field(
    metadata=key(
      "A step is also skipped if its loss or the norm of its gradient is above so many times the "
      "upper quartile of the last 64 good steps. 0: only what is not finite is skipped.",
      allowed=SPIKE,
    )
  )


# What versions did that had no guard.
NO_GUARD = GuardConfig(in_a_row=0, spike=0.0)


@dataclass(frozen=True)
class WatchdogConfig:
  """When a training counts as hung."""

  seconds: float = field(
    metadata=key(
      "Seconds that one step, batch, save, validation or compilation may take. After that the "
      "process says what it waits for and ends with exit code 85. 0: it waits for ever.",
      allowed=AT_LEAST_ZERO,
    )
  )


# What versions did that had no watchdog.
NO_WATCHDOG = WatchdogConfig(seconds=0.0)
