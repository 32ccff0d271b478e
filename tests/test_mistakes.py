"""The table of mistakes: a command line, its exit code, and what the message must say.

Each is said at once, in at most eight lines, with nothing on standard output and nothing written.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from in_process import run_here
from model_folder import make_model
from PIL import Image
from small_run import make_inputs
from typed_config import typed

from cogvideox_jax.config.choice import shipped_names
from cogvideox_jax.config.read import to_dict
from configs import tiny

ROOT = Path(__file__).parent.parent
LINES = 8
SAMPLE = "sample --prompt=a --model={model} --output=out.mp4"
TRAIN = "train --config=tiny --workdir=run"
VAE = "train_vae --config=vae_tiny --workdir=run"
ENCODE = "encode --config=tiny --input=clips --output=encoded --model=tiny"
CONVERT = "convert --source=tiny --target=new --format=sat"

# Command line -> words that must stand in the message. `{model}` is a model folder, `{data}` an
# encoded dataset; the command runs in a folder with what `place` makes. The exit code is 2.
TABLE = {
  # Flags.
  "sample": ["--model"],
  "sample --model=tiny --output=out.mp4": ["--prompt"],
  "train --config=tiny": ["--workdir"],
  "train --workdir=run": ["--config"],
  "encode --config=tiny --input=clips --output=x": ["--model"],
  "inspect": ["DATASET"],
  "inspect a b": ["Not a flag: b"],
  f"{SAMPLE} --stpes=3": ["stpes", "steps"],
  f"{SAMPLE} steps=3": ["steps=3", "--name=value"],
  f"{SAMPLE} --solver=euler": ["euler", "ddim", "dpm"],
  f"{CONVERT}x": ["satx", "diffusers"],
  "compile --config=tiny --topology=v9:1x1": ["v9"],
  "compile --config=tiny --topology=v5p:2x2x1 --stage=9": ["9"],
  "compile --config=tiny --topology=v5p:2x2x1 --height=0": ["height", "0"],
  # Sampling.
  f"{SAMPLE} --steps=0": ["steps", "0"],
  f"{SAMPLE} --steps=2000": ["2000", "1000"],
  f"{SAMPLE} --steps=1.5": ["--steps=1.5", "int"],
  f"{SAMPLE} --seed=-1": ["seed", "-1"],
  f"{SAMPLE} --seed=4294967296": ["seed", "4294967296"],
  f"{SAMPLE} --height=33": ["height=33", "nearest"],
  f"{SAMPLE} --width=0": ["width=0"],
  f"{SAMPLE} --num_frames=10": ["num_frames=10", "9", "13"],
  f"{SAMPLE} --num_frames=-3": ["num_frames=-3"],
  f"{SAMPLE} --fps=0": ["fps", "0"],
  f"{SAMPLE} --fps=nan": ["fps", "nan"],
  f"{SAMPLE} --guidance_scale=nan": ["guidance_scale", "nan"],
  f"{SAMPLE} --guidance_scale=inf": ["guidance_scale", "inf"],
  f"{SAMPLE} --lora_weight=nan --lora={{model}}": ["lora_weight", "nan"],
  f"{SAMPLE} --image=no.png": ["--image=no.png", "there is no"],
  f"{SAMPLE} --video=no.mp4": ["--video=no.mp4", "there is no"],
  f"{SAMPLE} --lora=no.safetensors": ["--lora=no.safetensors", "there is no"],
  f"{SAMPLE} --image=a.png --video=a.png": ["--image or --video"],
  f"{SAMPLE} --image=a.png": ["no image", "Use Pipeline"],
  f"{SAMPLE} --video=text.txt": ["text.txt"],
  f"{SAMPLE} --video=a.png --strength=1.5": ["strength", "1.5"],
  "sample --prompt=a --model={model} --output=out.avi": ["out.avi", "mp4"],
  "sample --prompt=a --model={model} --output=folder.mp4": ["folder.mp4", "directory"],
  "sample --prompt=a --model={model} --output=text.txt/out.mp4": ["text.txt", "written"],
  "sample --prompt=a --model={model} --output=": ["--output", "empty"],
  "sample --prompt=a --model=no --output=out.mp4": ["no model at", "tiny", "download"],
  "sample --prompt=a --model=~nobody_there/x --output=out.mp4": ["nobody_there"],
  "sample --prompt=a --model=empty --output=out.mp4": ["empty"],
  "sample --prompt=a --model=begun --output=out.mp4": ["config.json"],
  # Configs.
  "train --config=tyni --workdir=run": ["tyni", "tiny", "5b"],
  "train --config= --workdir=run": ["--config=", "tiny"],
  "train --config=no.py --workdir=run": ["no.py", "configs/tiny.py", "tiny_stages"],
  "train --config=folder --workdir=run": ["folder"],
  "train --config=./folder --workdir=run": ["folder", "config.json"],
  "train --config=broken.json --workdir=run": ["broken.json", "not JSON"],
  "train --config=list.json --workdir=run": ["list.json", "object"],
  "train --config=lacks.json --workdir=run": ["lacks.json", "config.seed"],
  "train --config=code.json --workdir=run": ["code.json", "not JSON"],
  "train --config=lacks.py --workdir=run": ["config.stages"],
  "train --config=nothing.py --workdir=run": ["returns nothing"],
  "train --config=divides.py --workdir=run": ["divides.py:2", "division by zero"],
  "train --config=names.py --workdir=run": ["names.py:2", "unknown_name"],
  "train --config=vae_tiny --workdir=run": ["VAE", "train_vae", "--config=tiny"],
  "encode --config=vae_tiny --input=a --output=b --model=tiny": ["VAE", "train_vae"],
  "train_vae --config=tiny --workdir=run": ["transformer", "--config=vae_tiny"],
  f"{TRAIN} --config.sede=1": ["--config.sede=1", '"seed"'],
  f"{TRAIN} --config.seed=-1": ["config.seed", "from 0 to 4294967295"],
  f"{TRAIN} --config.seed=4294967296": ["config.seed", "from 0 to 4294967295"],
  f"{VAE} --config.seed=4294967296": ["config.seed", "from 0 to 4294967295"],
  f"{TRAIN} --config.train.steps=0": ["config.train.steps", "above 0"],
  f"{TRAIN} --config.optimizer.warmup_steps=1600": ["warmup_steps", "1600"],
  f"{VAE} --config.optimizer.warmup_steps=1500": ["warmup_steps", "1500"],
  "train --config=tiny_stages --workdir=run --config.train.steps=3": ["3", "4 stages"],
  f"{TRAIN} --config.init_from=no": ["no model at", "no"],
  f"{TRAIN} --config.init_from=empty": ["empty"],
  f"{TRAIN} --config.components=no": ["no model at", "no"],
  f"{TRAIN} --config.data.path=no": ["no/tiny", "encode"],
  f"{TRAIN} --config.data.path=~nobody_there/x": ["config.data.path", "nobody_there"],
  f"{TRAIN} --config.preview.images=('no.png',)": ["preview.images"],
  f"{TRAIN} --config.stages.tiny.durations=(1,10)": ["10", "9"],
  f"{TRAIN} --config.sharding=zero3": ["zero3", "fsdp"],
  f"{TRAIN} --dry_run=v9:1": ["v9"],
  # Folders of a run.
  "train --config=tiny --workdir=": ["--workdir", "empty"],
  "train --config=tiny --workdir=text.txt": ["text.txt", "folder"],
  "train --config=tiny --workdir=text.txt/run": ["text.txt", "not a folder"],
  "train --config=tiny --workdir=begun": ["begun", "config.json", "step 5", "init_from"],
  "convert --source=begun --target=new --format=diffusers": ["config.json"],
  "convert --source=no --target=new --format=sat": ["no model at", "no"],
  "convert --source=tiny --target=folder --format=sat": ["folder", "there already"],
  "convert --source=tiny --target=text.txt --format=sat": ["text.txt", "there already"],
  "convert --source=tiny --target=text.txt/x --format=sat": ["text.txt", "in the place"],
  f"{CONVERT} --lora=no": ["no"],
  "inspect no": ["no"],
  "inspect empty": ["empty"],
  "inspect {data} --rows=5": ["--rows=5", "START:STOP"],
  ENCODE: ["clips"],
  "encode --config=tiny --input=empty --output=x --model=tiny": ["empty", "no clips"],
  "encode --config=tiny --input=empty --output=x --model=no": ["no model at"],
  "encode --config=tiny --input=empty --output=text.txt --model=tiny": ["text.txt"],
  f"{ENCODE} --workers=0": ["workers", "0"],
  f"{TRAIN} --process_count=0": ["process_count", "0"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with files and folders of all kinds, for commands to run in."""
  folder = tmp_path_factory.mktemp("place")
  for name in ("folder", "folder.mp4", "empty", "begun/checkpoints/5"):
    (folder / name).mkdir(parents=True)
  (folder / "folder" / "x").write_text("x")
  (folder / "text.txt").write_text("x")
  (folder / "begun" / "checkpoints" / "5" / "digests.json").write_text("{}")
  Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(folder / "a.png")
  code = "import pathlib\npathlib.Path('executed').touch()\n"
  fields = to_dict(typed(tiny.get_config()))
  lacks = {name: value for name, value in fields.items() if name != "seed"}
  for name, text in {
    "broken.json": "{",
    "list.json": "[]",
    "code.json": code,
    "lacks.json": json.dumps(lacks),
    "lacks.py": "from configs import tiny\ndef get_config():\n  config = tiny.get_config()\n"
    "  with config.unlocked():\n    del config.stages\n  return config\n",
    "nothing.py": "def get_config():\n  pass\n",
    "divides.py": "def get_config():\n  return 1 / 0\n",
    "names.py": "def get_config():\n  return unknown_name\n",
  }.items():
    (folder / name).write_text(text)
  return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
  folder = tmp_path_factory.mktemp("known")
  return {"model": make_model(folder / "model"), "data": make_inputs(folder, clips=8) / "data"}


@pytest.mark.parametrize("line", TABLE)
def test_a_mistake_is_said_at_once_in_a_few_lines(line, place, known, monkeypatch, capfd):
  before = sorted(place.rglob("*"))
  args = [word.format(**known) for word in line.split()]
  ended = run_here(monkeypatch, capfd, *args, folder=place)
  assert ended.code == 2, ended
  assert not ended.output
  assert len(ended.errors.splitlines()) <= LINES, ended.errors
  for word in TABLE[line]:
    assert word in ended.errors
  assert "Traceback" not in ended.errors
  assert sorted(place.rglob("*")) == before


def test_the_table_is_long_and_every_shipped_config_has_a_name():
  assert len(TABLE) >= 60
  assert {"tiny", "5b", "vae_tiny"} <= set(shipped_names())
