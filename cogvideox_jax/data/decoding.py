"""Decodes many files at once in separate processes, so that no file can harm the job.

If a file crashes its process, hangs, or needs too much memory, it is refused like any other file
that cannot be used, and the process is started again. Files come out in the order in which they
went in, whatever the number of processes.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cogvideox_jax.data import decode_worker
from cogvideox_jax.data.media import DEFAULT_LIMITS, Limits, VideoError
from cogvideox_jax.data.video import VideoInfo, Window
from cogvideox_jax.errors import UserError

COMMAND = (sys.executable, "-W", "ignore", "-m", "cogvideox_jax.data.decode_worker")
SMALLER = "make it smaller, as by ffmpeg -i FILE -vf scale=-2:1440 SMALLER.mp4"
PIPE = 2**20  # Bytes of frames that a process may write before they are read.

Plan = Callable[[VideoInfo], Sequence[Window]]


class File(NamedTuple):
  """A file to decode."""

  path: str | os.PathLike[str]
  fps: float
  # The windows to read, maybe none; or a function that returns them once the file is measured,
  # which is called in another thread.
  windows: Sequence[Window] | Plan


class Piece(NamedTuple):
  """The frames of one window."""

  number: int  # The window's index among those of its file.
  frames: UInt8[np.ndarray, "F H W 3"]


class _Process(NamedTuple):
  """A running process and its pipes."""

  process: subprocess.Popen
  questions: Any  # Its stdin and stdout; Popen's types do not say that they are binary.
  answers: Any


class _DiedError(Exception):
  """A process ended by itself; the message is a reason for the quarantine."""


class _ClosedError(Exception):
  """The pieces are no longer wanted."""


class Decoders:
  """Processes that decode. Use it in a `with` statement, which ends them."""

  def __init__(self, count: int, limits: Limits = DEFAULT_LIMITS, command: Sequence[str] = COMMAND):
    self._workers = [_Worker(limits, command) for _ in range(count)]
    self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in self._workers:
      self._idle.put(worker)
    self._threads = ThreadPoolExecutor(count, "decode")
    self._closed = threading.Event()

  def __enter__(self) -> "Decoders":
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    for worker in self._workers:
      worker.end()
    self._threads.shutdown(cancel_futures=True)
    for worker in self._workers:
      worker.close()

  def decode(self, files: Iterable[File]) -> Iterator[Iterator[Piece]]:
    """Returns the pieces of each file, in the order of their last frames.

    Taking a piece raises VideoError if the file cannot be used, or cannot be decoded further. From
    now on a few files are decoded ahead of the one whose pieces are taken, each by at most two
    pieces.
    """
    started = map(self._start, files)
    return self._in_turn(started, deque(itertools.islice(started, len(self._workers) + 1)))

  def read(self, file: File, take: Callable[[Piece], None]) -> Future[None]:
    """Decodes a file in the background; calls `take` with each piece, in another thread.

    The future raises VideoError if the file cannot be used, or cannot be decoded further. Do not
    use it while an iterator of `decode` is open: that may occupy all processes until its pieces are
    taken.
    """
    return self._threads.submit(self._read, file, take)

  def _in_turn(
    self, started: Iterator[queue.Queue], ahead: deque[queue.Queue]
  ) -> Iterator[Iterator[Piece]]:
    while ahead:
      yield _pieces(ahead.popleft())
      ahead.extend(itertools.islice(started, 1))

  def _start(self, file: File) -> queue.Queue:
    pieces: queue.Queue = queue.Queue(maxsize=1)
    self._threads.submit(self._run, file, pieces)
    return pieces

  def _read(self, file: File, take: Callable[[Piece], None]) -> None:
    worker = self._idle.get()
    try:
      for piece in worker.decode(file):
        take(piece)
    finally:
      self._idle.put(worker)

  def _run(self, file: File, pieces: queue.Queue) -> None:
    """Puts the file's pieces into the queue, then None, or else the exception. Runs in a thread."""
    worker = self._idle.get()
    try:
      for piece in worker.decode(file):
        self._hand_on(piece, pieces)
      self._hand_on(None, pieces)
    except _ClosedError:
      pass
    except BaseException as error:
      self._hand_on(error, pieces)
      raise
    finally:
      self._idle.put(worker)

  def _hand_on(self, piece: Any, pieces: queue.Queue) -> None:
    while not self._closed.is_set():
      with contextlib.suppress(queue.Full):
        return pieces.put(piece, timeout=0.2)
    raise _ClosedError


def _pieces(pieces: queue.Queue) -> Iterator[Piece]:
  while (piece := pieces.get()) is not None:
    if isinstance(piece, BaseException):
      raise piece
    yield piece


class _Worker:
  """One process of decode_worker.py. Only one thread uses it at a time."""

  def __init__(self, limits: Limits, command: Sequence[str]):
    self._limits, self._command = limits, command
    self._running: _Process | None = None
    self._ended = False

  def decode(self, file: File) -> Iterator[Piece]:
    """Yields a file's pieces. Raises VideoError if it cannot be used.

    If a process dies that has decoded other files before, their remains may be the cause. So the
    file is tried again in a new process.
    """
    given = 0
    while True:
      fresh = self._running is None
      try:
        for count, piece in enumerate(self._attempt(file), start=1):
          if count > given:
            given = count
            yield piece
        return
      except _DiedError as death:
        if fresh:
          raise VideoError(str(death)) from death

  def end(self) -> None:
    """Kills the process for ever. Called from another thread."""
    self._ended = True
    if running := self._running:
      running.process.kill()

  def close(self) -> None:
    if running := self._running:
      self._running = None
      running.process.kill()
      running.process.wait()
      for pipe in (running.questions, running.answers):
        with contextlib.suppress(OSError):  # A question that was not yet sent is dropped.
          pipe.close()

  def _attempt(self, file: File) -> Iterator[Piece]:
    running = self._running or self._start()
    question = {
      "path": os.fspath(file.path),
      "fps": file.fps,
      "limits": dataclasses.asdict(self._limits),
    }
    if callable(file.windows):
      self._ask(running, question)
      windows = list(file.windows(VideoInfo(*self._answer(running)["info"])))
      self._ask(running, {"windows": windows})
    else:
      windows = list(file.windows)
      self._ask(running, {**question, "windows": windows})
    # The frames of each window that has begun, and how many of them have arrived.
    begun: dict[int, tuple[np.ndarray, int]] = {}
    while "frame" in (answer := self._answer(running)):
      number = answer["frame"]
      _, *shape = windows[number]
      frames, count = begun.pop(number, None) or (np.empty((*shape, 3), np.uint8), 0)
      self._read_into(running, frames[count])
      if count + 1 == len(frames):
        yield Piece(number, frames)
      else:
        begun[number] = frames, count + 1

  def _start(self) -> _Process:
    if self._ended:
      raise _ClosedError
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
      self._command,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      pipesize=PIPE,
    )
    running = self._running = _Process(process, process.stdin, process.stdout)
    try:
      self._answer(running)
    except _DiedError as death:
      raise UserError(
        f"a process to decode with does not start: {death}.\n"
        "Look above for its own words; too little memory is one cause, then use fewer workers."
      ) from death
    return running

  def _ask(self, running: _Process, question: dict[str, Any]) -> None:
    try:
      running.questions.write(json.dumps(question).encode() + b"\n")
      running.questions.flush()
    except OSError as error:
      raise self._death(running) from error

  def _answer(self, running: _Process) -> dict[str, Any]:
    line = running.answers.readline()
    if not line.endswith(b"\n"):
      raise self._death(running)
    answer = json.loads(line)
    if "fault" in answer:
      raise VideoError(answer["fault"])
    return answer

  def _read_into(self, running: _Process, frame: UInt8[np.ndarray, "H W 3"]) -> None:
    if running.answers.readinto(frame.data) < frame.nbytes:
      raise self._death(running)

  def _death(self, running: _Process) -> Exception:
    """Cleans up after a process that has ended; returns how it ended as an exception."""
    code = running.process.wait()
    self.close()
    return _ClosedError() if self._ended else _DiedError(_cause(code))


def _cause(code: int) -> str:
  """Returns what the exit code of a decoding process says about the file."""
  if code == decode_worker.MEMORY_FAULT:
    memory = decode_worker.MEMORY // 2**20
    return f"takes more than {memory} MB of memory to decode; {SMALLER}"
  if code == -signal.SIGALRM:
    return "takes too long to decode"
  if code < 0:
    return f"its decoder crashed ({signal.Signals(-code).name})"
  return f"its decoder failed with exit code {code}"
