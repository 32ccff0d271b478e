"""The documentation matches the tree: links, paths, commands, flags, keys, layers and lengths."""

import ast
import functools
import re
from pathlib import Path

import pytest
from test_imports import LAYERS

from configs import base, vae_tiny

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cogvideox_jax"
FOLDERS = (".", "docs", "benchmarks", "launch")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
PATH = re.compile(r"(?<![\w./:<-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|yml|toml)\b|(?:[\w.-]+/)+")
COMMAND = re.compile(r"python -m cogvideox_jax\.([a-z]\w*)((?:[^\n\\]|\\\n)*)")
FLAG = re.compile(r"--(\w+)")
KEY = re.compile(r"(?<![\w.])config\.([a-z][\w]*(?:\.[a-z][\w]*)*)")
SHARED_FLAGS = ("command.py", "job.py", "model_flags.py")
# Addresses and names in a cloud, and shell variables, are no paths of the tree.
CLOUD = re.compile(r"gs://\S+|\$[A-Z]+\S*|\broles/\S+|\b[A-Z]+=\$\S+")
# Files of the reader, and of what the commands write.
READERS = re.compile(
  r"configs/mine\.py|surf\.txt|sha256sums\.txt|(benchmarks/)?NAME\.py|clips/|table/|table\.md|runs/.*|encoded/|checkpoints/|previews/"
  r"|(transformer|vae|text_encoder|tokenizer|scheduler|orbax)/|(STAGE|WORKDIR)/|\.venv/.*"
)


def name_of(page: Path) -> str:
  return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
  """The anchors that GitHub gives to a page's headings."""
  text = FENCE.sub("", page.read_text())
  return {
    re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)
  }


def code_of(page: Path) -> list[str]:
  """Everything that a page sets as code: blocks, then what stands between backticks."""
  text = page.read_text()
  return FENCE.findall(text) + INLINE.findall(FENCE.sub("", text))


def broken_links(page: Path, text: str) -> list[str]:
  targets = [target for target in LINK.findall(text) if "://" not in target]
  return [target for target in targets if not is_target(page, target)]


def is_target(page: Path, target: str) -> bool:
  path, _, anchor = target.partition("#")
  file = (page.parent / path).resolve() if path else page
  return file.exists() and (not anchor or anchor in anchors(file))


def missing_paths(page: Path, code: list[str]) -> list[str]:
  """Paths that are neither in the tree, nor in the package, nor beside the page."""
  named = [path for text in code for path in PATH.findall(CLOUD.sub("", text))]
  homes = (ROOT, PACKAGE, page.parent)
  return [
    path
    for path in named
    if not READERS.fullmatch(path) and not any((home / path).exists() for home in homes)
  ]


@functools.cache
def strings_in(path: Path) -> frozenset[str]:
  """Every string literal of a source file; the names of flags are among them."""
  nodes = ast.walk(ast.parse(path.read_text()))
  return frozenset(
    node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
  )


def wrong_commands(text: str) -> list[str]:
  """Commands that do not exist, and flags that their commands do not define."""
  wrong = []
  for name, arguments in COMMAND.findall(text):
    files = [PACKAGE / f"{name}.py", *(PACKAGE / shared for shared in SHARED_FLAGS)]
    if not files[0].exists():
      wrong.append(name)
      continue
    known = frozenset[str]({"help"}).union(*map(strings_in, files))
    wrong += [f"{name} --{flag}" for flag in FLAG.findall(arguments) if flag not in known]
  return wrong


def unknown_keys(text: str) -> list[str]:
  """Config keys that neither configs/base.py nor configs/vae_tiny.py has."""
  keys = [key for key in KEY.findall(text) if key not in {"json", "py"}]
  return [key for key in keys if not any(has(config, key) for config in KNOWN_CONFIGS)]


def has(config, key: str) -> bool:
  for name in key.split("."):
    if name not in config:
      return False
    config = config[name]
  return True


KNOWN_CONFIGS = (base.get_config(), vae_tiny.get_config())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
  assert not broken_links(page, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_that_a_page_names_exists(page):
  assert not missing_paths(page, code_of(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_flag_and_config_key_of_a_page_exists(page):
  code = "\n".join(code_of(page))
  assert not wrong_commands(code)
  assert not unknown_keys(code)


def test_what_does_not_exist_is_found():
  page = ROOT / "README.md"
  assert broken_links(
    page, "[a](docs/faq.md#no-such-heading) [b](docs/none.md) [c](docs/faq.md)"
  ) == [
    "docs/faq.md#no-such-heading",
    "docs/none.md",
  ]
  code = [
    "training/none.py",
    "data/nothing/",
    "types.py",
    "docs/faq.md",
    "--config=configs/none.py",
  ]
  assert missing_paths(page, code) == ["training/none.py", "data/nothing/", "configs/none.py"]
  assert wrong_commands("python -m cogvideox_jax.trian --config=F") == ["trian"]
  assert wrong_commands("python -m cogvideox_jax.sample \\\n  --model=tiny --promt=x") == [
    "sample --promt"
  ]
  assert unknown_keys("--config.train.setps=5 config.train.steps") == ["train.setps"]


def test_the_design_shows_the_layers_that_the_import_test_checks():
  design = (ROOT / "docs" / "design.md").read_text()
  shown = FENCE.search(design, design.index("## Layers"))
  assert shown is not None
  lines = [", ".join(names) for names in LAYERS]
  assert shown[0] == "\n".join(["```", *lines, "```"])


def test_the_readme_is_short_and_the_training_step_is_near():
  readme = (ROOT / "README.md").read_text()
  assert len(readme.split()) <= 900
  design = (ROOT / "docs" / "design.md").read_text()
  way = design[: design.index("5. **Transformer**")]
  assert len(readme.split()) + len(way.split()) <= 1500
  files = [path for text in INLINE.findall(way) for path in PATH.findall(text)]
  assert files[-1] == "cogvideox_jax/training/step.py" and len({"docs/design.md", *files}) <= 5


def test_every_benchmark_has_a_line_in_the_index_and_every_page_a_link():
  folder = ROOT / "benchmarks"
  index = (folder / "README.md").read_text()
  scripts = [path.name for path in folder.glob("*.py") if "\ndef main(" in path.read_text()]
  assert scripts and not [name for name in scripts if f"`{name}`" not in index]
  pages = {path.name for path in folder.glob("*.md")} - {"README.md"}
  assert pages == {target for target in LINK.findall(index) if "/" not in target}
