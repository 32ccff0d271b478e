"""Exit codes of commands, the exception for mistakes of users, and remedies for system errors."""

import errno
import os

# The command line or a file is wrong; SIGTERM came; another process of the job died; nothing went
# on for long; Ctrl-C.
USER_ERROR, PREEMPTED, PEER_DIED, HUNG, INTERRUPTED = 2, 83, 84, 85, 130


class UserError(Exception):
  """Says what is wrong, where, and how to mend it, in a few lines. Commands print it and exit 2."""


# Errors of the system that a user can solve, with advice.
_REMEDIES = {
  errno.ENOSPC: "Free some space: the disk is full.",
  errno.EDQUOT: "Free some space: the disk quota is used up.",
  errno.EFBIG: "Free some space, or raise the limit of the size of a file.",
  errno.EACCES: "Permission denied: choose another place, or change its permissions.",
  errno.EPERM: "Not permitted: choose another place, or change its permissions.",
  errno.EROFS: "The file system is read-only: choose another place.",
  errno.ENAMETOOLONG: "The name is too long: choose a shorter one.",
  errno.EEXIST: "A file is in the place of the folder or above it: choose another path.",
  errno.ENOTDIR: "A part of the path is a file, not a folder: choose another path.",
  errno.ELOOP: "A link leads to itself, or stands where a file of this run would: remove it.",
  errno.EIO: "The disk or the network reports an error: check it.",
  errno.ESTALE: "The network file system lost the file: mount it again.",
  errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
  errno.ENFILE: "The machine has too many open files: close other programs.",
}


def remedy(error: BaseException) -> str:
  """Returns what to do about an error of the system, in one sentence; empty if that is not known.

  Libraries raise other exceptions with the system's words, so these are looked for, too.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return _REMEDIES.get(error.errno, "")
  text = str(error)
  return next((advice for code, advice in _REMEDIES.items() if os.strerror(code) in text), "")
