"""Manifests and folders: every good line is an item, every bad one a refusal with its reason."""

import json
import os
from pathlib import Path

import pytest

from cogvideox_jax.data.items import Refusal
from cogvideox_jax.data.manifest import read_manifest
from cogvideox_jax.errors import UserError

LINK = "a link that leads outside the manifest's folder; --allow_links follows such links"
CLIPS = Path(__file__).parent / "data" / "clips"


@pytest.fixture
def folder(tmp_path):
  """A folder with two files, in a folder with one that is none of its business."""
  (tmp_path / "secret.mp4").write_bytes(b"secret")
  folder = tmp_path / "clips"
  (folder / "sub").mkdir(parents=True)
  for name in ("a.mp4", "b.webm", "sub/c.jpg"):
    (folder / name).write_bytes(b"not looked into here")
  return folder


def write(folder: Path, *lines: object) -> Path:
  """Bytes and texts as they are, other values as JSON."""
  raw = [
    line
    if isinstance(line, bytes)
    else line.encode()
    if isinstance(line, str)
    else json.dumps(line).encode()
    for line in lines
  ]
  (folder / "manifest.jsonl").write_bytes(b"\n".join(raw) + b"\n")
  return folder / "manifest.jsonl"


def test_lines_become_items_in_their_order(folder):
  manifest = write(
    folder,
    {"file": "b.webm", "caption": " a wave "},
    "",
    {"file": "sub/c.jpg", "caption": "one", "captions": ["two", "drei"], "score": 3, "id": "c"},
    {"file": "a.mp4", "captions": ["été"], "unknown": [1]},
  )
  for path in (manifest, folder, str(folder)):
    items, refusals, _ = read_manifest(path)
    assert not refusals
    assert [tuple(item) for item in items] == [
      ("b.webm", folder / "b.webm", ("a wave",), None, 1, "b.webm"),
      ("c", folder / "sub/c.jpg", ("one", "two", "drei"), 3.0, 3, "sub/c.jpg"),
      ("a.mp4", folder / "a.mp4", ("été",), None, 4, "a.mp4"),
    ]


@pytest.mark.parametrize(
  ("line", "file", "reason"),
  [
    ("{'file': 'a.mp4'}", "", "the line is not JSON"),
    ("[" * 100_000, "", "the line is not JSON"),
    ('["a.mp4", "a wave"]', "", "not a JSON object"),
    (b'{"file": "a.mp4", "caption": "\xff\xfe"}', "", "not UTF-8"),
    ({"caption": "x"}, "", "no file"),
    ({"file": "", "caption": "x"}, "", "no file"),
    ({"file": 7, "caption": "x"}, "7", "file is not a text"),
    ({"file": "a.mp4"}, "a.mp4", "no caption"),
    ({"file": "a.mp4", "caption": "  \n"}, "a.mp4", "no caption"),
    ({"file": "a.mp4", "caption": None}, "a.mp4", "no caption"),
    ({"file": "a.mp4", "caption": ["x"]}, "a.mp4", "caption is not a text"),
    ({"file": "a.mp4", "captions": []}, "a.mp4", "no caption"),
    ({"file": "a.mp4", "captions": "x"}, "a.mp4", "captions is not a list"),
    ({"file": "a.mp4", "captions": ["x", 1]}, "a.mp4", "caption is not a text"),
    ('{"file": "a.mp4", "caption": "\\ud800"}', "a.mp4", "character"),
    ('{"file": "a\\u0000.mp4", "caption": "x"}', "a\0.mp4", "character"),
    ({"file": "a.mp4", "caption": "x", "score": "high"}, "a.mp4", "score is not a number"),
    ('{"file": "a.mp4", "caption": "x", "score": NaN}', "a.mp4", "score is not a number"),
    ({"file": "a.mp4", "caption": "x", "id": ""}, "a.mp4", "no id"),
    ({"file": "a.mp4", "caption": "x", "id": "a#12"}, "a.mp4", "'a#12' ends as the names of clips"),
    ({"file": "a.mp4", "caption": "x", "id": "b.webm"}, "a.mp4", "'b.webm' is that of line 1"),
    ({"file": "b.webm", "caption": "x"}, "b.webm", "'b.webm' is that of line 1"),
    ({"file": "d.mp4", "caption": "x"}, "d.mp4", "absent"),
    ({"file": "x" * 5000, "caption": "x"}, "x" * 5000, "absent"),
    ({"file": "sub", "caption": "x"}, "sub", "not a regular file"),
    ({"file": "pipe.mp4", "caption": "x"}, "pipe.mp4", "not a regular file"),
    ({"file": "../secret.mp4", "caption": "x"}, "../secret.mp4", "outside"),
    ({"file": "sub/../../secret.mp4", "caption": "x"}, "sub/../../secret.mp4", "outside"),
    ({"file": "../clips2/a.mp4", "caption": "x"}, "../clips2/a.mp4", "outside"),
    ({"file": "/etc/passwd", "caption": "x"}, "/etc/passwd", "an absolute path, outside"),
    ({"file": "link.mp4", "caption": "x"}, "link.mp4", LINK),
    ({"file": "links/secret.mp4", "caption": "x"}, "links/secret.mp4", LINK),
    ({"file": "https://host/a.mp4", "caption": "x"}, "https://host/a.mp4", "a URL, outside"),
    ({"file": "gs://host/a.mp4", "caption": "x"}, "gs://host/a.mp4", "a URL, outside"),
    ({"file": "./b.webm", "caption": "x"}, "./b.webm", "'b.webm' is that of line 1"),
    ({"file": "sub//../b.webm", "caption": "x"}, "sub//../b.webm", "'b.webm' is that of line 1"),
  ],
)
def test_a_bad_line_is_refused_and_stops_no_other(folder, line, file, reason):
  (folder / "link.mp4").symlink_to(folder.parent / "secret.mp4")
  (folder / "links").symlink_to(folder.parent)
  os.mkfifo(folder / "pipe.mp4")
  (folder.parent / "clips2").mkdir()
  (folder.parent / "clips2" / "a.mp4").write_bytes(b"another's")
  manifest = write(
    folder,
    {"file": "b.webm", "caption": "first"},
    line,
    {"file": "sub/c.jpg", "caption": "last"},
  )
  items, refusals, _ = read_manifest(manifest)
  assert [(item.id, item.line) for item in items] == [("b.webm", 1), ("sub/c.jpg", 3)]
  [refusal] = refusals
  assert (refusal.file, refusal.line) == (file, 2)
  assert reason in refusal.reason and "\n" not in refusal.reason
  assert json.loads(json.dumps(refusal._asdict())) == refusal._asdict()


def test_a_link_that_stays_inside_is_a_file(folder):
  (folder / "d.mp4").symlink_to(folder / "a.mp4")
  items, refusals, _ = read_manifest(write(folder, {"file": "d.mp4", "caption": "x"}))
  assert [item.id for item in items] == ["d.mp4"] and not refusals


def test_a_folder_reached_by_a_link_is_as_good(folder):
  write(folder, {"file": "a.mp4", "caption": "x"})
  link = folder.parent / "by_link"
  link.symlink_to(folder)
  items, refusals, _ = read_manifest(link)
  assert [item.file for item in items] == [link / "a.mp4"] and not refusals


def test_windows_line_ends_and_byte_order_marks_are_no_fault(folder):
  line = b'{"file": "a.mp4", "caption": "x"}'
  (folder / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")
  items, refusals, _ = read_manifest(folder)
  assert [item.captions for item in items] == [("x",)] and not refusals


def test_a_folder_pairs_files_with_texts_by_name(folder):
  (folder / "a.txt").write_text("a wave\n")
  (folder / "c.v2.PNG").write_bytes(b"image")
  (folder / "c.v2.txt").write_text("a lion")
  (folder / "d.mov").write_bytes(b"video")
  (folder / "d.txt").write_bytes(b"\xff\xfe")
  (folder / "e.mkv").write_bytes(b"video")
  (folder / "e.txt").write_text(" \n")
  (folder / "f.mp4").symlink_to(folder.parent / "secret.mp4")
  (folder / "f.txt").write_text("what is not ours")
  (folder / "notes.md").write_text("not a clip")
  items, refusals, _ = read_manifest(folder)
  assert [tuple(item) for item in items] == [
    ("a.mp4", folder / "a.mp4", ("a wave",), None, 0, "a.mp4"),
    ("c.v2.PNG", folder / "c.v2.PNG", ("a lion",), None, 0, "c.v2.PNG"),
  ]
  assert refusals == [
    Refusal("b.webm", 0, "no caption: there is no b.txt"),
    Refusal("d.mov", 0, "no caption: d.txt cannot be read as UTF-8 text"),
    Refusal("e.mkv", 0, "no caption"),
    Refusal("f.mp4", 0, LINK),
    Refusal("sub/c.jpg", 0, "no caption: there is no sub/c.txt"),
  ]


def test_a_text_cannot_be_a_way_to_read_another_file(folder):
  (folder / "a.txt").symlink_to(folder.parent / "secret.mp4")
  items, refusals, _ = read_manifest(folder)
  assert not items
  assert refusals[0] == Refusal("a.mp4", 0, LINK)


def test_nothing_to_read_is_the_users_mistake(tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "blank.jsonl").write_text("\n \n")
  for name, words in {
    "absent": ("there is no manifest or folder at", "Give a folder"),
    "absent.jsonl": ("there is no manifest or folder at", "Give a folder"),
    "empty": ("holds no clips", "NAME.txt"),
    "blank.jsonl": ("is empty", "Write a line a clip"),
  }.items():
    with pytest.raises(UserError) as caught:
      read_manifest(tmp_path / name)
    assert all(word in str(caught.value) for word in (*words, str(tmp_path / name)))


def test_a_single_clip_is_no_manifest():
  with pytest.raises(UserError, match="is a single clip"):
    read_manifest(CLIPS / "v1.m4v")


def test_a_long_caption_is_cut_and_a_long_name_is_not_echoed(tmp_path):
  (tmp_path / "a.mp4").touch()
  lines = [
    {"file": "a.mp4", "caption": "ab " * 10_000},
    {"file": "b" * 100_000, "caption": "x"},
    {"file": "a.mp4", "id": "c" * 100_000, "caption": "x"},
  ]
  (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
  items, refusals, _ = read_manifest(tmp_path)
  assert [item.captions for item in items] == [(("ab " * 10_000)[:4096].rstrip(),)]
  assert [len(refusal.reason) < 200 and len(refusal.file) <= 8192 for refusal in refusals] == [
    True,
    True,
  ]


def test_a_text_beside_a_clip_may_have_a_mebibyte(tmp_path):
  for name, size in (("a", 2**20), ("b", 2**20 + 1)):
    (tmp_path / f"{name}.mp4").touch()
    (tmp_path / f"{name}.txt").write_text("x" * size)
  items, [refusal], _ = read_manifest(tmp_path)
  assert [len(item.captions[0]) for item in items] == [4096]
  assert refusal.file == "b.mp4" and "1048577 bytes; it may have 1048576" in refusal.reason
