"""Folders as people have them: what is a clip, what is passed over, and where files may be."""

import json

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from cogvideox_jax.data.manifest import read_manifest
from cogvideox_jax.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cogvideox_jax.errors import UserError


def make(folder, *names, text="a caption"):
  """Files of that names; texts hold a caption."""
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if name.lower().endswith(".txt") else "not looked into here")
  return folder


def names(source):
  return [item.name for item in source.items]


def test_sub_folders_are_walked_and_a_flag_turns_it_off(tmp_path):
  make(tmp_path, "b.mp4", "b.txt", "a/c.mp4", "a/c.txt", "a/deep/d.jpg", "a/deep/d.txt")
  source = read_manifest(tmp_path)
  assert names(source) == ["a/c.mp4", "a/deep/d.jpg", "b.mp4"]
  assert source.items[1].file == tmp_path / "a" / "deep" / "d.jpg"
  assert source.notes == [] and source.refusals == []
  source = read_manifest(tmp_path, subfolders=False)
  assert names(source) == ["b.mp4"]
  assert source.notes == [f"Passed over in {tmp_path}: 1 sub-folder(s), by --nosubfolders."]


def test_every_suffix_that_can_be_read_is_a_clip_in_any_case(tmp_path):
  for number, suffix in enumerate(IMAGE_SUFFIXES + VIDEO_SUFFIXES):
    make(tmp_path, f"{number}{suffix}", f"{number}.txt")
    make(tmp_path, f"{number}x{suffix.upper()}", f"{number}x.TXT")
  source = read_manifest(tmp_path)
  assert len(source.items) == 2 * len(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
  assert not source.notes and not source.refusals


def test_what_is_passed_over_is_counted_by_kind(tmp_path):
  make(tmp_path, "a.mp4", "a.txt", "a.srt", "b.srt", "x/c.SRT", "README", "notes.md", "alone.txt")
  make(tmp_path, ".a.mp4", "._b.mp4", ".cache/b.mp4", "__MACOSX/c.mp4", "a.jpg", "@eaDir/t.jpg")
  source = read_manifest(tmp_path)
  assert names(source) == ["a.mp4"] and not source.refusals
  (note,) = source.notes
  assert note == (
    f"Passed over in {tmp_path}: 3 .srt, 3 hidden folder(s), 2 hidden file(s), 1 .md, "
    "1 picture(s) with the name of a video beside it (its thumbnail), "
    "1 text(s) without a clip (.txt), 1 without a suffix."
  )


def test_a_picture_of_its_own_name_is_no_thumbnail(tmp_path):
  make(tmp_path, "a.mp4", "a.txt", "b.jpg", "b.txt", "x/a.jpg", "x/a.txt")
  assert names(read_manifest(tmp_path)) == ["a.mp4", "b.jpg", "x/a.jpg"]


def test_texts_in_capitals_and_in_utf_16_are_captions(tmp_path):
  make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
  (tmp_path / "a.TXT").write_text("in capitals")
  (tmp_path / "b.txt").write_text("small")
  (tmp_path / "b.TXT").write_text("large")
  (tmp_path / "c.Txt").write_bytes("été".encode("utf-16"))
  captions = {item.name: item.captions for item in read_manifest(tmp_path).items}
  assert captions == {"a.mp4": ("in capitals",), "b.mp4": ("small",), "c.mp4": ("été",)}


def test_videos_and_labels_as_sat_has_them_belong_together(tmp_path):
  make(tmp_path, "videos/1.mp4", "videos/x/2.mp4", "videos/3.mp4")
  make(tmp_path, "labels/1.txt", "labels/x/2.txt")
  source = read_manifest(tmp_path)
  assert names(source) == ["videos/1.mp4", "videos/x/2.mp4"]
  assert [r.reason for r in source.refusals] == ["no caption: there is no videos/3.txt"]


def test_what_encode_wrote_inside_is_not_read_as_clips(tmp_path):
  make(tmp_path, "a.mp4", "a.txt", "encoded/quarantine.jsonl", "encoded/tiny/clips.png")
  make(tmp_path, "run/metrics.jsonl", "run/previews/step_1.mp4")
  source = read_manifest(tmp_path)
  assert names(source) == ["a.mp4"] and not source.refusals
  assert source.notes == [
    f"Passed over in {tmp_path}: 2 folder(s) that encode or a training wrote."
  ]


@pytest.mark.parametrize(
  ("files", "words"),
  [
    (
      ("a.mp4", "b.mp4", "captions.xml"),
      r"none of the 2 clips .* has a caption\.\nThere are: 1 \.xml",
    ),
    (
      ("a.mp4", "labels.csv"),
      r"If labels\.csv names the clips and their captions, give it as --input",
    ),
    (
      ("00000.tar", "00001.tar"),
      r"holds no clips\.\nThere are: 2 \.tar\.\nArchives, such as WebDataset",
    ),
    (("notes.md",), r"holds no clips\.\nThere are: 1 \.md\."),
  ],
)
def test_a_folder_that_gives_nothing_is_one_message_about_what_is_in_it(tmp_path, files, words):
  make(tmp_path, *files)
  with pytest.raises(UserError, match=words) as caught:
    read_manifest(tmp_path)
  assert len(str(caught.value).splitlines()) <= 8


@pytest.fixture
def cache(tmp_path):
  """A folder made of links, as those of caches, and a link to a folder."""
  make(tmp_path / "blobs", "1", "2", "3.txt", "more/b.mp4", "more/b.txt")
  folder = tmp_path / "snapshot"
  folder.mkdir()
  (folder / "a.mp4").symlink_to("../blobs/1")
  (folder / "a.txt").symlink_to("../blobs/3.txt")
  (folder / "more").symlink_to(tmp_path / "blobs" / "more")
  (folder / "round").symlink_to(folder)
  return folder


def test_links_are_followed_on_purpose_alone(cache):
  source = read_manifest(cache)
  assert names(source) == []
  (refusal,) = source.refusals
  assert "a link that leads outside" in refusal.reason and "--allow_links" in refusal.reason
  assert "2 link(s) to folders, which --allow_links follows" in source.notes[0]
  source = read_manifest(cache, allow_links=True)
  assert names(source) == ["a.mp4", "more/b.mp4"] and not source.refusals
  assert source.items[0].captions == ("a caption",)
  assert "1 link(s) in a circle" in source.notes[0]


def test_links_of_a_manifest_are_followed_on_purpose_alone(cache):
  (cache / "manifest.jsonl").write_text(
    '{"file": "a.mp4", "caption": "x"}\n{"file": "../blobs/1", "caption": "y"}\n'
  )
  assert not read_manifest(cache).items
  source = read_manifest(cache, allow_links=True)
  assert names(source) == ["a.mp4"]
  assert source.refusals[0].reason == "the file is outside the manifest's folder"


def test_an_absolute_path_inside_says_what_to_write(tmp_path):
  folder = make(tmp_path / "clips", "sub/a.mp4")
  link = tmp_path / "link"
  link.symlink_to(folder)
  for start in (folder, link):
    (folder / "manifest.jsonl").write_text(
      json.dumps({"file": f"{start}/sub/a.mp4", "caption": "x"}) + "\n"
    )
    for given in (folder, link):
      (refusal,) = read_manifest(given).refusals
      assert refusal.reason == (
        "an absolute path, although the file is in the manifest's folder: write it relative to the "
        "folder, 'sub/a.mp4'"
      )


@pytest.mark.parametrize("url", ["https://host/clips", "http://host/a.jsonl", "ftp://host/x"])
def test_a_url_is_not_downloaded(url):
  with pytest.raises(UserError, match=r"is a URL, and nothing is downloaded\.\nFetch"):
    read_manifest(url)


@pytest.mark.parametrize(("url", "package"), [("s3://b/clips", "s3fs"), ("gs://b/clips", "gcsfs")])
def test_a_bucket_whose_package_is_missing_says_what_to_install(url, package, monkeypatch):
  def missing(name):
    raise ImportError(f"Install {package} to access {name}")

  monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", missing)
  with pytest.raises(UserError, match=f"pip install {package}"):
    read_manifest(url)


def test_a_bucket_is_read_where_its_package_is(monkeypatch):
  class Bucket(MemoryFileSystem):
    """A bucket in memory."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
      return "/" + str(path).removeprefix("s3://").strip("/")

  bucket = Bucket(skip_instance_cache=True)
  monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
  for name in ("a.mp4", "a.txt", "sub/b.mp4", "sub/b.txt", "sub/x.srt", ".hidden/c.mp4"):
    bucket.pipe(f"/bucket/clips/{name}", b"words")
  source = read_manifest("s3://bucket/clips")
  assert names(source) == ["a.mp4", "sub/b.mp4"] and not source.refusals
  assert source.items[1].captions == ("words",)
  assert source.items[1].file.read_bytes() == b"words"
  assert source.notes == ["Passed over in s3://bucket/clips: 1 .srt, 1 hidden folder(s)."]
  bucket.pipe("/bucket/clips/manifest.jsonl", b'{"file": "sub/b.mp4", "caption": "x"}')
  assert names(read_manifest("s3://bucket/clips")) == ["sub/b.mp4"]
