"""What became of a run's wall time, over starts that were killed, stopped or went back."""

import pytest
from etils import epath
from test_drive import run

from cogvideox_jax import plot
from cogvideox_jax.errors import UserError
from cogvideox_jax.training import goodput


def began(time, step, /, **seconds):
  return {"time": time, "from_step": step, "seconds": seconds}


def note(time, step, /, **seconds):
  return {"time": time, "step": step, "seconds": seconds}


def test_shares_sum_to_the_wall_time_and_steps_that_are_taken_again_are_lost():
  lines = [
    began(100, 0, start=10.0),
    note(150, 4, start=10.0, compile=20.0, step=30.0),
    note(200, 8, start=10.0, compile=20.0, step=60.0, data=20.0),  # Killed; step 4 was saved.
    began(265, 4, start=15.0),
    note(300, 9, start=15.0, step=30.0, save=5.0),
  ]
  found = goodput.wall_time(lines)
  assert found == {
    "start": 25.0, "compile": 20.0, "step": 60.0, "data": 20.0, "save": 5.0,
    "lost work": 30.0, "down": 50.0,
  }  # fmt: skip
  assert sum(found.values()) == 300 - 90


def test_a_process_that_went_back_is_not_counted_twice():
  lines = [
    began(100, 0, start=10.0),
    note(150, 8, start=10.0, step=50.0),
    began(155, 4, start=15.0, step=50.0),
    note(175, 9, start=15.0, step=70.0),
  ]
  found = goodput.wall_time(lines)
  assert found == {"start": 15.0, "step": 20.0, "lost work": 50.0, "down": 0.0}
  assert sum(found.values()) == 175 - 90


def test_a_training_notes_its_times_and_plot_shows_them(tmp_path, capsys):
  folder = epath.Path(tmp_path)
  run(folder, 4)
  run(folder, 6)
  said = capsys.readouterr().out
  assert said.count("useful steps") == 2
  lines = goodput.read(folder)
  starts = [line for line in lines if "from_step" in line]
  assert [line["from_step"] for line in starts] == [0, 4]
  assert starts[0].keys() >= {"time", "host", "processes", "device", "version", "jax", "python"}
  found = goodput.wall_time(lines)
  first, last = lines[0], lines[-1]
  begun = first["time"] - sum(first["seconds"].values())
  assert sum(found.values()) == pytest.approx(last["time"] - begun, abs=0.2)
  assert found["step"] > 0 and found["save"] > 0
  plot.main(str(folder))
  shown = capsys.readouterr().out
  assert "useful steps" in shown and "started at step 4 on" in shown and "#" in shown
  with pytest.raises(UserError, match="There is no"):
    plot.main(str(folder / "nowhere"))
