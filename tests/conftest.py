"""Every test runs on eight fake CPU devices. Set before anything imports jax.

What one test has compiled, another need not compile again, nor a command that a test runs.
"""

import atexit
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  COMPILED = tempfile.TemporaryDirectory(prefix="compiled_", ignore_cleanup_errors=True)
  atexit.register(COMPILED.cleanup)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
