"""Tables that other tools write are read directly, or one message names what was seen."""

import json
import sys

import pyarrow
import pytest
from etils import epath
from pyarrow import parquet

from cogvideox_jax.data.layouts import find_table
from cogvideox_jax.data.manifest import read_manifest
from cogvideox_jax.errors import UserError

FILES = ("videos/a.mp4", "videos/b.mp4")
CAPTIONS = ("a wave, and a boat", "été 日本")


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "videos").mkdir()
  for name in FILES:
    (tmp_path / name).write_bytes(b"not looked into here")
  return tmp_path


def rows(file="file_name", caption="text", **more):
  return [{file: f, caption: c, **more} for f, c in zip(FILES, CAPTIONS, strict=True)]


def lines(values):
  return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def table(values, path):
  columns = {name: [value[name] for value in values] for name in values[0]}
  parquet.write_table(pyarrow.table(columns), path)


def as_csv(header, quote='"', separator=","):
  body = [
    f"{quote}{f}{quote}{separator}{quote}{c}{quote}" for f, c in zip(FILES, CAPTIONS, strict=True)
  ]
  return "\n".join([header, *body]) + "\n"


LAYOUTS = {  # Name of a file -> what writes it into the folder.
  "metadata.jsonl": lambda path: path.write_text(lines(rows())),
  "metadata.json": lambda path: path.write_text(json.dumps(rows(caption="prompt"), indent=2)),
  "dataset.json": lambda path: path.write_text(json.dumps(rows("video_file", "caption"))),
  "metadata.csv": lambda path: path.write_text(as_csv("file_name,text")),
  "dataset.csv": lambda path: path.write_bytes(
    b"\xef\xbb\xbf" + as_csv("video_file,caption").encode()
  ),
  "manifest.csv": lambda path: path.write_text(as_csv("File;Caption", separator=";")),
  "metadata.tsv": lambda path: path.write_text(as_csv("path\tprompt", "", "\t")),
  "metadata.parquet": lambda path: table(rows("video", "caption"), path),
  "musubi.jsonl": lambda path: path.write_text(lines(rows("video_path", "caption"))),
  "excel.csv": lambda path: path.write_bytes(as_csv("file,caption").encode("utf-16")),
  "windows.jsonl": lambda path: path.write_bytes(lines(rows("file", "caption")).encode("utf-16")),
  "big.jsonl": lambda path: path.write_bytes(lines(rows("file", "caption")).encode("utf-16-be")),
  "columns.json": lambda path: path.write_text(json.dumps({"file": FILES, "caption": CAPTIONS})),
  "by_name.json": lambda path: path.write_text(
    json.dumps(dict(zip(FILES, CAPTIONS, strict=True)), indent=1)
  ),
  "kohya.json": lambda path: path.write_text(
    json.dumps({f: {"caption": c} for f, c in zip(FILES, CAPTIONS, strict=True)})
  ),
  "nested.json": lambda path: path.write_text(
    json.dumps({"version": 1, "data": rows("path", "caption")}, indent=1)
  ),
  "list.csv": lambda path: path.write_text(as_csv("image_path,captions")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_table_of_another_tool_is_read(folder, name):
  LAYOUTS[name](folder / name)
  for source in (folder / name, *([folder] if find_table(epath.Path(folder)) else [])):
    items, refusals, _ = read_manifest(source)
    assert not refusals
    assert [(item.id, item.captions) for item in items] == [
      (file, (caption,)) for file, caption in zip(FILES, CAPTIONS, strict=True)
    ]


def test_our_own_manifest_comes_first(folder):
  (folder / "metadata.jsonl").write_text(lines(rows()))
  (folder / "manifest.jsonl").write_text('{"file": "videos/b.mp4", "caption": "ours"}\n')
  (item,), _, notes = read_manifest(folder)
  assert item.captions == ("ours",) and not notes
  (folder / "manifest.jsonl").unlink()
  assert read_manifest(folder).notes == [f"Read metadata.jsonl of {folder}."]


def test_a_list_of_captions_a_score_and_an_id_are_kept(folder):
  (folder / "metadata.csv").write_text("file,caption,score,id\nvideos/a.mp4,x,0.5,one\n")
  (item,) = read_manifest(folder).items
  assert (item.score, item.id) == (0.5, "one")
  table([{"file": FILES[0], "captions": ["x", "y"], "score": None}], folder / "t.parquet")
  (item,) = read_manifest(folder / "t.parquet").items
  assert item.captions == ("x", "y") and item.score is None


@pytest.mark.parametrize("videos", ["videos.txt", "video.txt"])
@pytest.mark.parametrize("prompts", ["prompts.txt", "prompt.txt", "captions.txt"])
def test_two_lists_are_read_line_by_line(folder, videos, prompts):
  (folder / videos).write_text("\n".join(FILES) + "\n\n")
  (folder / prompts).write_text("\r\n".join(CAPTIONS) + "\r\n")
  for source in (folder, folder / videos, folder / prompts):
    items, refusals, _ = read_manifest(source)
    assert not refusals
    assert [(item.id, item.captions[0], item.line) for item in items] == [
      (FILES[0], CAPTIONS[0], 1),
      (FILES[1], CAPTIONS[1], 2),
    ]


def test_lists_of_other_lengths_are_never_paired_by_guess(folder):
  (folder / "videos.txt").write_text("\n".join(FILES))
  (folder / "prompts.txt").write_text("\n".join([CAPTIONS[0], "", CAPTIONS[1]]))
  with pytest.raises(
    UserError, match=r"videos\.txt has 2 lines, but .*prompts\.txt has 3\.\nLine n"
  ):
    read_manifest(folder)


def test_a_missing_caption_in_a_list_is_the_refusal_of_its_line(folder):
  (folder / "videos.txt").write_text("\n".join((*FILES, "videos/c.mp4")))
  (folder / "prompts.txt").write_text(f"{CAPTIONS[0]}\n\nlast")
  items, refusals, _ = read_manifest(folder)
  assert [item.line for item in items] == [1]
  assert [(r.line, r.reason) for r in refusals] == [(2, "no caption"), (3, "the file is absent")]


@pytest.mark.parametrize(
  ("name", "write", "words"),
  [
    (
      "metadata.csv",
      lambda path: path.write_text("clip_id,prompt\n1,a wave\n2,a boat\n"),
      r"has 2 rows with the columns clip_id, prompt: none of them names the clip's file",
    ),
    (
      "metadata.jsonl",
      lambda path: path.write_text(lines(rows("file", "zh"))),
      r"has 2 rows with the columns file, zh: none of them is the caption",
    ),
    (
      "metadata.parquet",
      lambda path: table([{"video": {"bytes": b"x", "path": "a"}, "caption": "x"}], path),
      "holds the videos or images themselves",
    ),
    ("metadata.parquet", lambda path: path.write_bytes(b"PAR1 not"), "cannot be read: "),
    (
      "metadata.csv",
      lambda path: path.write_bytes(as_csv("file,caption").encode("cp1252", "replace")),
      r"cannot be read .*\nSave it as UTF-8",
    ),
    ("metadata.csv", lambda path: path.write_text("file,caption\n"), "is empty.\nName the columns"),
    (
      "captions.json",
      lambda path: path.write_text(json.dumps({"clips": {"a": 1}, "n": 2}, indent=1)),
      r"has 1 rows with the columns clips, n: none of them names the clip's file",
    ),
    (
      "clips.txt",
      lambda path: path.write_text("videos/a.mp4 a wave\nvideos/b.mp4 a boat\n"),
      r"is not a table of clips: none of its 2 lines can be read, the first\nbecause the line",
    ),
    ("shards.tar", lambda path: path.write_bytes(b""), "is an archive"),
  ],
)
def test_what_is_not_read_is_one_message(folder, name, write, words):
  write(folder / name)
  with pytest.raises(UserError, match=words) as caught:
    read_manifest(folder / name)
  assert len(str(caught.value).splitlines()) <= 8


def test_without_pyarrow_a_parquet_file_says_what_to_install(folder, monkeypatch):
  table(rows(), folder / "metadata.parquet")
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(UserError, match="pip install pyarrow"):
    read_manifest(folder)


@pytest.mark.parametrize("element", [["a.mp4", "x"], "a.mp4", None, 7])
def test_an_element_of_an_array_that_is_no_object_is_its_own_refusal(folder, element):
  (folder / "metadata.json").write_text(json.dumps([*rows(), element]))
  items, (refusal,), _ = read_manifest(folder)
  assert len(items) == 2
  assert (refusal.line, refusal.reason) == (3, "the line is not a JSON object")


def test_a_table_of_something_else_does_not_hide_the_clips_beside_their_captions(folder):
  (folder / "metadata.json").write_text(json.dumps({"camera": "x", "date": 1}))
  with pytest.raises(UserError, match="has 1 rows with the columns camera, date"):
    read_manifest(folder)
  (folder / "videos" / "a.txt").write_text("a wave")
  items, refusals, notes = read_manifest(folder)
  assert [item.name for item in items] == ["videos/a.mp4"] and len(refusals) == 1
  assert "none of them names the clip's file" in notes[0] and "1 .json" in notes[1]
