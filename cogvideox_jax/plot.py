"""Shows what became of a training's wall time: `python -m cogvideox_jax.plot RUN`.

RUN is the workdir of `train` or `train_vae`. Shares are of the whole time since the first start:
useful steps, compilation, waiting for data, saves, validation and previews, restarts, steps that
were taken again, and the time between a process and the next.
"""

from etils import epath

from cogvideox_jax import command, paths
from cogvideox_jax.training import goodput

WIDTH = 40  # Characters of a bar of all the time.


def main(run: str) -> None:
  lines = goodput.read(epath.Path(paths.absolute(run)))
  seconds = goodput.wall_time(lines)
  total = sum(seconds.values()) or 1.0
  for line in lines:
    if "from_step" in line:
      print(
        f"started at step {line['from_step']} on {line['host']}: {line['processes']} processes, "
        f"{line['devices']} x {line['device']}, cogvideox_jax {line['version']}, jax {line['jax']}"
      )
  print(f"{total:.0f} s in all")
  for name, x in sorted(seconds.items(), key=lambda item: -item[1]):
    bar = "#" * round(WIDTH * x / total)
    print(f"{goodput.NAMES.get(name, name):>12} {x / total:7.1%} {x:10.1f} s {bar}")


if __name__ == "__main__":
  command.run(main, "RUN")
