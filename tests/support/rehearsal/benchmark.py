"""The benchmark of GPUs on small tensors: its times are the emulator's, and mean nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts" / "benchmarks"))

import gpu

if __name__ == "__main__":
    gpu.QUICK = [(4, 6, 8, 8)]
    gpu.CACHE_FACTOR = gpu.LAUNCHES = gpu.EAGER_CALLS = gpu.HOST_CALLS = 1
    sys.exit(gpu.main([*sys.argv[1:], "--no-torch", "--dtypes", "float32"]))
