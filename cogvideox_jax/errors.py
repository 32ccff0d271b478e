"""What a command leaves with, and the exception that is a user's mistake rather than ours."""

USER_ERROR, PREEMPTED, PEER_DIED, INTERRUPTED = 2, 83, 84, 130  # Exit codes.


class UserError(Exception):
  """What is wrong, where, and how to mend it, in a few lines. Command lines print it and exit 2."""
