"""The emulator, for `import cupy` in a rehearsal of scripts/gpu_check.sh."""

import sys

import cuda_emulator
from support.emulated import make_emulated_cupy

_found = make_emulated_cupy()
cuda_emulator.devices.attributes |= {"MultiProcessorCount": 2, "L2CacheSize": 1 << 12}
# What only the benchmark and the script ask for.
_found.get_default_memory_pool = _found.cuda.MemoryPool
_found.cuda.set_allocator = lambda allocator: None
_found.cuda.runtime.memGetInfo = lambda: (1 << 30, 2 << 30)
_properties = _found.cuda.runtime.getDeviceProperties
_found.cuda.runtime.getDeviceProperties = lambda number: _properties(number) | {"totalGlobalMem": 2 << 30}
sys.modules |= {"cupy": _found, "cupy.cuda": _found.cuda, "cupy.cuda.runtime": _found.cuda.runtime}
