"""The emulator in place of CuPy, which compiles the kernels that tests will need together."""

import cuda_emulator


def make_emulated_cupy(*mode):
    """Return the stand-in for CuPy."""
    stand_in = cuda_emulator.make_cupy(*mode)
    stand_in.RawModule.prebuild = staticmethod(_instances_beside)
    return stand_in


def _instances_beside(code, names):
    """Return what to compile along with some instances: all of their file and type of data."""
    from cupy_syncbn.backends.cuda import kernels

    for file in kernels.FILES:
        for dtype in kernels.TYPES:
            together = kernels.instances(file, dtype)
            if kernels.source(file) == code and set(names) <= set(together):
                return together
    return names
