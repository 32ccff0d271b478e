"""The whole path in one command, on drawn models: clips, encoding, training, sampling, scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model_folder import make_model
from small_run import config_flags_of, settings

from cogvideox_jax.data.video import probe

ROOT = Path(__file__).parent.parent
WORDS = {"background", "colour", "shape", "motion"}


@pytest.mark.slow
def test_the_demo_trains_once_and_reports_in_its_last_line(tmp_path):
  changes = settings(
    tmp_path,
    data__path="",
    data__clips=60,
    components=str(make_model(tmp_path / "model")),
    model__sample_frames=9,
    model__sample_height=8,
    model__sample_width=12,
    stages__tiny__sizes="((32,48),)",
    stages__tiny__durations="(1,9)",
    stages__tiny__row_tokens=128,
    preview__steps=2,
    train__steps=3,
  )
  command = [
    sys.executable, "-m", "cogvideox_jax.demo", "--config=configs/tiny.py",
    f"--workdir={tmp_path / 'demo'}", "--prompts=2", *config_flags_of(changes),
  ]  # fmt: skip
  seconds = []
  for message in ("new run, 3 steps", "resumed at step 3 of 3"):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report) == {"video", "sheet", "scores", "train_seconds"}
    assert set(report["scores"]) == {"demo", "shipped", "untrained"}
    for scores in report["scores"].values():
      assert set(scores) == WORDS
      assert all(0 <= score <= 1 for score in scores.values())
    info = probe(report["video"])
    assert (info.num_frames, info.height, info.width) == (9, 32, 48)
    assert Path(report["sheet"]).stat().st_size > 0
    seconds.append(report["train_seconds"])
  assert seconds[1] < seconds[0]
