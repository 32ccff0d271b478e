"""Turns prompts into T5's token ids: the same ids as transformers' `T5Tokenizer`."""

import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece
from etils import epath
from jaxtyping import Int

from cogvideox_jax.errors import UserError

PAD, END = 0, 1  # `<pad>` and `</s>`.
SENTINELS = 100  # The tokens `<extra_id_N>`: T5 numbers them backwards, after the vocabulary.
# Strings that T5Tokenizer always reads as one token. A sentinel includes the spaces around it.
SPECIAL = re.compile(r"(<pad>|</s>|<unk>|\s*<extra_id_(?:\d|[1-9]\d)>\s*)")


class Tokenizer:
  """T5's tokenizer: a sentencepiece model."""

  def __init__(self, path: epath.PathLike):
    """Opens a `spiece.model` file, or the one in a folder. UserError if there is no sound one."""
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
    """Returns the ids of each prompt, with `</s>` at the end and padding up to `length` tokens.

    A longer prompt is cut before its `</s>`, with a warning that shows what was lost.
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
    for text in SPECIAL.split(prompt):
      if SPECIAL.fullmatch(text):
        yield self._special(text.strip())
      else:
        yield from self._pieces.encode(text)

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
