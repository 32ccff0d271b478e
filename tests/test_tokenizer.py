"""Token ids against transformers' tokenizer, on the real vocabulary."""

import numpy as np
import pytest
from etils import epath
from transformers import T5Tokenizer

from cogvideox_jax.data.tokenizer import Tokenizer
from cogvideox_jax.errors import UserError

FOLDER = epath.resource_path("cogvideox_jax") / "assets" / "tiny" / "tokenizer"
PROMPTS = (
  "",
  " ",
  "a red ball rolls",
  "  leading, trailing and    inner spaces  ",
  "\ttabs\nand\r\nnew lines",
  "A panda, dressed in a small red jacket, sits on a wooden stool in a bamboo forest.",
  "Ein Bär läuft über die Straße; où est le café?",
  "日本語のプロンプト。中文提示。한국어",
  "напиши что-нибудь",
  "مرحبا بالعالم",
  "🎬🏽 🧑‍🚀 rides 🐎 in 🇫🇷",
  "ligatures ﬁ, fractions ½, circled ①, wide Ａ",
  "composed é, decomposed e\u0301, zero\u200bwidth, no\u00a0break, ideographic\u3000space",
  "\ufeffa byte order mark, a nul \x00 and a line\u2028separator",
  "x" * 300,
  "1234567890 3.14 1e-5 50% $9.99",
  "▁ pieces' own ▁ mark",
  "</s> and <pad> and <unk>, a <extra_id_0> b<extra_id_42>c <extra_id_99>",
  "not quite: < /s> <extra_id_100> <extra_id_> <PAD>",
)


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(FOLDER)


def test_ids_are_those_of_transformers(tokenizer):
  reference = T5Tokenizer.from_pretrained(str(FOLDER))
  expected = reference(list(PROMPTS), padding="max_length", max_length=226).input_ids
  for prompt, ours, theirs in zip(PROMPTS, tokenizer.encode(PROMPTS, 226), expected, strict=True):
    assert ours.tolist() == theirs, prompt


# First and last code points of what people, and mistakes, put into prompts.
RANGES = (
  (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF),
  (0x900, 0x97F), (0xE00, 0xE7F), (0x1F00, 0x1FFF), (0x2000, 0x206F), (0x2150, 0x218F),
  (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFB4F), (0xFE00, 0xFE0F),
  (0xFF00, 0xFFEF), (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x20000, 0x2A6DF),
)  # fmt: skip


def drawn_prompts(count):
  """Words of one alphabet each, of every length up to far beyond the model's."""
  rng = np.random.default_rng(0)
  for _ in range(count):
    words = []
    for _ in range(int(2 ** rng.uniform(0, 7))):
      first, last = RANGES[0 if rng.random() < 0.4 else rng.integers(len(RANGES))]
      words.append("".join(map(chr, rng.integers(first, last + 1, rng.integers(1, 9)))))
    yield " ".join(words)


@pytest.mark.filterwarnings("ignore:.*longer than the model's")
def test_ids_of_any_text_are_those_of_transformers(tokenizer):
  reference = T5Tokenizer.from_pretrained(str(FOLDER))
  prompts = list(drawn_prompts(600))
  settings = {"padding": "max_length", "max_length": 226, "truncation": True}
  expected = reference(prompts, **settings).input_ids
  assert sum(ids[-1] == 1 for ids in expected) > 20  # Those that were cut.
  for prompt, ours, theirs in zip(prompts, tokenizer.encode(prompts, 226), expected, strict=True):
    assert ours.tolist() == theirs, prompt


def test_the_empty_prompt_is_its_end_and_padding(tokenizer):
  np.testing.assert_array_equal(tokenizer.encode([""], 5), [[1, 0, 0, 0, 0]])


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_lost(tokenizer):
  reference = T5Tokenizer.from_pretrained(str(FOLDER))
  prompt = "a red circle moves right and a zebra sleeps"
  with pytest.warns(UserWarning, match=r"(?s)longer than the model's 8.*'a zebra sleeps'"):
    ids = tokenizer.encode([prompt], 8)
  expected = reference([prompt], max_length=8, truncation=True).input_ids
  np.testing.assert_array_equal(ids, expected)
  assert ids[0, -1] == 1


def test_a_prompt_that_just_fits_is_whole(tokenizer):
  ids = tokenizer.encode(["a red circle moves right"], 64)[0]
  length = int(np.argmax(ids == 1)) + 1
  np.testing.assert_array_equal(
    tokenizer.encode(["a red circle moves right"], length), [ids[:length]]
  )


def test_a_file_is_as_good_as_its_folder(tokenizer):
  file = Tokenizer(FOLDER / "spiece.model")
  np.testing.assert_array_equal(file.encode(PROMPTS[:5], 64), tokenizer.encode(PROMPTS[:5], 64))


def test_a_missing_or_damaged_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"No tokenizer at .*spiece\.model"):
    Tokenizer(tmp_path)
  (tmp_path / "spiece.model").write_bytes(b"not a model")
  with pytest.raises(UserError, match=r"spiece\.model is not a sentencepiece model"):
    Tokenizer(tmp_path)
