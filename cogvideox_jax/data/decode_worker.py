"""The process that decodes files, which may be hostile. decoding.py starts it and asks it.

It imports only data/video.py and what that imports. Both sides write lines of JSON, on stdin and
stdout. A line that announces a frame is followed by the frame's bytes:

  question {"path": ..., "fps": ..., "limits": Limits}  answer {"info": VideoInfo}
  question {"windows": [Window, ...]}   answers {"frame": number of its window}, ..., {"end": true}

The first question may hold the windows, too; then the file is not measured.

If the file cannot be used, the answer is {"fault": reason} instead. Too much time ends the process
by the kernel's alarm; too much memory ends it with the exit code MEMORY_FAULT.
"""

import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from PIL import Image

from cogvideox_jax.data import video
from cogvideox_jax.data.media import Limits

MEMORY = 448 * 2**20  # Bytes that it may allocate; with libraries it stays below 512 MB.
MEMORY_FAULT = 12  # The number of ENOMEM.
# A file may take SECONDS, one more for each BYTES that it has, and PACE more for each second of
# video up to the last frame that is read. The time in which the process waits for its parent does
# not count.
SECONDS = 60.0
BYTES = 16 * 2**20
PACE = 3.0


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
  """Answers until the questions end: however the parent ends, its end of the pipe closes."""
  _say(answers, {"ready": True})
  for line in questions:
    try:
      _decode(json.loads(line), questions, answers)
    except video.VideoError as error:
      if isinstance(error.__cause__, MemoryError):
        raise error.__cause__ from None
      _say(answers, {"fault": str(error)})
    finally:
      _allow(0)


def _decode(question: dict[str, Any], questions: BinaryIO, answers: BinaryIO) -> None:
  _allow(SECONDS)
  path, fps = epath.Path(question["path"]), question["fps"]
  limits, seconds = Limits(**question["limits"]), SECONDS
  if path.exists():
    seconds += path.stat().length / BYTES
    _allow(seconds)
  if (asked := question.get("windows")) is None:
    _say(answers, {"info": video.probe(path, limits)})
    asked = json.loads(questions.readline())["windows"]
  windows = [video.Window(*window) for window in asked]
  if windows:
    end = max(window.start + window.num_frames for window in windows)
    _allow(seconds + PACE * end / fps)
    for number, frame in video.read_windows(path, windows, fps=fps, limits=limits):
      _say(answers, {"frame": number}, frame)
  _say(answers, {"end": True})


def _allow(seconds: float) -> float:
  """Sets the alarm that ends the process; returns the seconds that the last alarm had left."""
  return signal.setitimer(signal.ITIMER_REAL, seconds)[0]


def _say(answers: BinaryIO, answer: dict[str, Any], frame: np.ndarray | None = None) -> None:
  left = _allow(0)  # The parent may read slowly.
  answers.write(json.dumps(answer).encode() + b"\n")
  if frame is not None:
    answers.write(np.ascontiguousarray(frame).data)
  else:
    answers.flush()
  _allow(left)


def main() -> None:
  resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
  Image.MAX_IMAGE_PIXELS = None  # The limits count the pixels of pictures.
  for number in (signal.SIGINT, signal.SIGHUP):  # The terminal's, which the parent handles.
    signal.signal(number, signal.SIG_IGN)
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=2**16)
  # A library that prints to stdout must not write among the answers.
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  try:
    serve(sys.stdin.buffer, answers)
  except MemoryError:
    os._exit(MEMORY_FAULT)
  except BrokenPipeError:
    os._exit(0)  # The parent is gone.


if __name__ == "__main__":
  main()
