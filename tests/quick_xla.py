"""Prints the flags with which XLA compiles soonest, for the jaxlib that is installed."""

from importlib.metadata import version

FLAGS = ["--xla_backend_optimization_level=0"]
# XLA ends the process at a flag that it does not know, and from 0.11 on it has no other emitters.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")

if __name__ == "__main__":
  print(*FLAGS)
