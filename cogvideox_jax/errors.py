"""The one exception that is a user's mistake rather than ours."""


class UserError(Exception):
  """What is wrong, where, and how to mend it, in a few lines. Command lines print it and exit 2."""
