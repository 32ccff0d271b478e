"""Prompts to T5's token ids, with sentencepiece: the same ids as transformers' `T5Tokenizer`."""

import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece
from etils import epath
from jaxtyping import Int

from cogvideox_jax.errors import UserError

PAD, END = 0, 1  # `<pad>` and `</s>`.
SENTINELS = 100  # `<extra_id_N>`, which T5 numbers backwards after the vocabulary's pieces.
# What T5Tokenizer reads as one token wherever it stands; sentinels swallow the spaces around them.
SPECIAL = re.compile(r"(<pad>|</s>|<unk>|\s*<extra_id_(?:\d|[1-9]\d)>\s*)")


class Tokenizer:
  """The sentencepiece model of a `spiece.model` file, or of the folder that holds one."""

  def __init__(self, path: epath.PathLike):
    path = epath.Path(path)
    file = path / "spiece.model" if path.is_dir() else path
    if not file.exists():
      raise UserError(
        f"No tokenizer at {file}.\nGive a folder with T5's spiece.model in it, such as the "
        "tokenizer/ of any CogVideoX model folder."
      )
    self.file = file
    try:
      self._pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError as error:
      raise UserError(f"{file} is not a sentencepiece model, or is damaged: {error}") from error

  def encode(self, prompts: Sequence[str], length: int) -> Int[np.ndarray, "b l"]:
    """Ids of each prompt, ended by `</s>` and padded to `length` tokens.

    A longer prompt is cut, keeping `</s>`, with a warning that shows what was lost.
    """
    ids = np.full((len(prompts), length), PAD, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
      tokens = list(self._tokens(prompt))
      if len(tokens) >= length:
        self._warn(prompt, tokens, length)
        tokens = tokens[: length - 1]
      row[: len(tokens) + 1] = [*tokens, END]
    return ids

  def _tokens(self, prompt: str) -> Iterator[int]:
    for part in SPECIAL.split(prompt):
      if SPECIAL.fullmatch(part):
        yield self._special(part.strip())
      else:
        yield from self._pieces.encode(part)

  def _special(self, token: str) -> int:
    if token.startswith("<extra_id_"):
      number = int(token.removeprefix("<extra_id_").removesuffix(">"))
      return self._pieces.vocab_size() + SENTINELS - 1 - number
    return self._pieces.piece_to_id(token)

  def _warn(self, prompt: str, tokens: list[int], length: int):
    cut = self._pieces.decode([i for i in tokens[length - 1 :] if i < self._pieces.vocab_size()])
    warnings.warn(
      f"A prompt of {len(tokens) + 1} tokens is longer than the model's {length}; this end of it "
      f"is ignored: {cut!r}. The prompt begins: {prompt[:60]!r}",
      stacklevel=3,
    )
