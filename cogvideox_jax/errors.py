"""The exit codes of commands, and the exception for mistakes of users."""

# The command line or a file is wrong; SIGTERM came; another process of the job died; Ctrl-C.
USER_ERROR, PREEMPTED, PEER_DIED, INTERRUPTED = 2, 83, 84, 130


class UserError(Exception):
  """Says what is wrong, where, and how to mend it, in a few lines. Commands print it and exit 2."""
