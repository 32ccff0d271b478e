"""The encodings of texts that people write: UTF-8 and UTF-16."""


def decode(data: bytes) -> str:
  """Returns the text of a file: UTF-8, or UTF-16 with a mark or with zeros beside Latin letters.

  Raises:
    UnicodeDecodeError: it is neither.
  """
  return data.decode(encoding_of(data))


def encoding_of(data: bytes) -> str:
  """Returns utf-16, utf-16-le or utf-16-be if a text has their signs, else utf-8-sig."""
  if len(data) > 2 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
    return "utf-16"
  head = data[:64]
  for encoding, zeros, letters in (
    ("utf-16-le", head[1::2], head[::2]),
    ("utf-16-be", head[::2], head[1::2]),
  ):
    if len(data) % 2 == 0 and zeros and not any(zeros) and all(letters):
      return encoding
  return "utf-8-sig"
