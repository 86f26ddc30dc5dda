"""The stand-in for cupy.RawModule: builds kernels for the CPU, checks how they are launched, runs them."""

import ctypes
import functools
import subprocess
import weakref

import numpy as np

from . import build, prepass
from .cuda import Device, find_pinned, submit
from .device_array import ndarray
from .runtime import (
    ALLOW_EXITED,
    CHECK_RACES,
    CHECK_WRITTEN,
    ORDERS,
    STRICT_SHUFFLES,
    Counters,
    EmulatorError,
    Failure,
    KernelInfo,
    LaunchConfig,
    current_schedule,
    native,
    stats,
)

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)
_THREADS_LIMIT = 1024
_BLOCKS_LIMIT = 1 << 24  # the emulator's own: more would take minutes
_SHARED_LIMIT = 48 << 10

# The NumPy types that CuPy passes on as they are; a subclass of int or float is not among them.
_SCALARS = tuple(np.dtype(character).type for character in "?bhilqBHILQefdFD")


class RawModule:
    """As cupy.RawModule. `mode` of the class is "checked" or "fast"."""

    mode = "checked"

    # prebuild(code, names) returns the names to build into one library with `names`: to compile many kernels
    # of a source at once takes little more than to compile one.
    prebuild = None

    def __init__(
        self,
        *,
        code,
        options=(),
        backend="nvrtc",
        translate_cucomplex=False,
        enable_cooperative_groups=False,
        name_expressions=None,
        jitify=False,
    ):
        if not isinstance(options, tuple):
            raise TypeError("compiler options must be a tuple")
        if translate_cucomplex or enable_cooperative_groups or jitify or backend != "nvrtc":
            raise NotImplementedError("the stand-in has NVRTC's plain kernels only")
        self.code = code
        self.options = tuple(option for option in options if option.startswith(("-D", "-U", "-I")))
        self.name_expressions = None if name_expressions is None else tuple(name_expressions)

    def get_function(self, name):
        if name not in self._asked():
            raise EmulatorError(f'CUDA_ERROR_NOT_FOUND: {name} is neither a name expression nor extern "C"')
        names = self._names()
        return RawKernel(name, self._library(names), names.index(name), checked=self.mode == "checked")

    def compile(self, log_stream=None):
        self._library(self._names())

    def _asked(self):
        return self.name_expressions or tuple(prepass.extern_c_kernels(self.code))

    def _names(self):
        return _together(type(self).prebuild, self.code, self._asked())

    def _library(self, names):
        return _library(self.code, names, self.options, self.mode)


@functools.cache
def _together(prebuild, code, names):
    together = tuple(prebuild(code, names)) if prebuild else ()
    return together + tuple(name for name in names if name not in together)


@functools.cache
def _library(code, names, options, mode):
    runtime = native()
    library = ctypes.PyDLL(str(build.build_kernels(code, names, options, mode)))
    # The library brings its runtime along, which must be the one that is loaded already.
    if _address(library.emu_launch) != _address(runtime.emu_launch):
        raise RuntimeError("the place of the emulator's libraries has changed in this process")
    return library


def _address(function):
    return ctypes.cast(function, ctypes.c_void_p).value


class _Parameter:
    """What a kernel takes in one place."""

    def __init__(self, native_parameter):
        self.is_pointer = native_parameter.is_pointer
        kind, size = native_parameter.kind.decode(), native_parameter.size
        if kind in "vs":
            self.dtype = None  # void, or a struct: elements of any type
        elif kind == "f":
            self.dtype = f"float{8 * size}"
        elif kind in "iu":
            self.dtype = f"{'u' if kind == 'u' else ''}int{8 * size}"
        else:
            self.dtype = {"h": "float16", "b": "bfloat16", "?": "bool"}[kind]
        self.name = self.dtype or ("void" if kind == "v" else f"struct of {size} bytes")

    def __str__(self):
        return f"a pointer to {self.name}" if self.is_pointer else self.name


class RawKernel:
    """As what cupy.RawModule.get_function returns."""

    def __init__(self, name, library, number, checked):
        self.name, self._checked = name, checked
        export = getattr(library, f"emu_kernel_{number}")
        export.restype = ctypes.POINTER(KernelInfo)
        self._info = export()
        count = self._info.contents.parameter_count
        self._parameters = [_Parameter(self._info.contents.parameters[i]) for i in range(count)]

    @property
    def attributes(self):
        """What CuPy tells of a compiled kernel, as far as one for the CPU has that."""
        return {"num_regs": 0, "local_size_bytes": 0}

    def __call__(self, grid, block, args, *, shared_mem=0):
        grid, block = self._sizes("grid", grid), self._sizes("block", block)
        self._check_sizes(grid, block, shared_mem)
        packed, config = self._pack(args), self._config(grid, block, shared_mem)
        arrays = {
            number: array._for_work() for number, array in enumerate(args) if isinstance(array, ndarray)
        }
        pinned = {number: weakref.ref(memory) for number, memory in self._pinned_among(args)}

        def launch():
            for number, memory in pinned.items():
                if memory() is None:
                    raise EmulatorError(
                        f"{self.name}: argument {number}, pinned memory, was freed before the launch"
                    )
            self._launch(grid, block, arrays, packed, config)

        submit(launch)

    def _launch(self, grid, block, arrays, packed, config):
        pointers = (ctypes.c_void_p * max(1, len(packed)))(*map(ctypes.addressof, packed))
        counters, failure = Counters(), Failure()
        result = native().emu_launch(self._info, config, pointers, counters, failure)
        stats.add(self.name, grid, block, counters)
        if result:
            raise EmulatorError(self._describe(failure, arrays))
        if not self._checked:
            # Nobody has seen what was written: let a checked kernel that reads it later not complain.
            for array in arrays.values():
                array._allocation.mark_all_written()

    def _config(self, grid, block, shared_mem):
        schedule = current_schedule()
        flags = (CHECK_RACES | CHECK_WRITTEN) * self._checked
        flags |= ALLOW_EXITED * schedule.allow_exited | STRICT_SHUFFLES * schedule.strict_shuffles
        return LaunchConfig(
            grid=grid,
            block=block,
            dynamic_shared_bytes=shared_mem,
            order=ORDERS[schedule.order],
            seed=schedule.seed,
            resident_blocks=schedule.resident,
            flags=flags,
            preempt_per_mille=schedule.preempt,
            switch_limit=schedule.switch_limit,
        )

    # ---- The launch's shape ----
    def _sizes(self, what, sizes):
        if not isinstance(sizes, tuple):
            raise TypeError(f"{self.name}: expected a tuple as {what} (got {type(sizes).__name__})")
        return tuple(int(size) for size in (*sizes, 1, 1))[:3]

    def _check_sizes(self, grid, block, shared_mem):
        for what, sizes, limits in (("grid", grid, _GRID_LIMITS), ("block", block, _BLOCK_LIMITS)):
            for axis, size, limit in zip("xyz", sizes, limits, strict=True):
                if not 1 <= size <= limit:
                    raise EmulatorError(f"{self.name}: {what}.{axis} is {size}, not in 1 ... {limit}")
        if block[0] * block[1] * block[2] > _THREADS_LIMIT:
            raise EmulatorError(f"{self.name}: a block of {block} has more than {_THREADS_LIMIT} threads")
        if grid[0] * grid[1] * grid[2] > _BLOCKS_LIMIT:
            raise EmulatorError(f"{self.name}: a grid of {grid} is too much for the emulator")
        if not 0 <= shared_mem <= _SHARED_LIMIT:
            raise EmulatorError(f"{self.name}: shared_mem is {shared_mem}, not in 0 ... {_SHARED_LIMIT}")

    # ---- The arguments ----
    def _pack(self, args):
        if len(args) != len(self._parameters):
            raise EmulatorError(f"{self.name}: {len(args)} arguments for {len(self._parameters)} parameters")
        return [self._pack_one(i, *pair) for i, pair in enumerate(zip(args, self._parameters, strict=True))]

    def _pack_one(self, number, argument, parameter):
        if isinstance(argument, ndarray):
            return self._pack_array(number, argument, parameter)
        scalar = _as_cupy_packs(argument)
        if parameter.is_pointer:
            if scalar.dtype == np.int64 and (scalar == 0 or find_pinned(scalar)):
                return ctypes.c_void_p(int(scalar))
            self._refuse(number, parameter, f"{scalar.dtype.name} {scalar}, no address")
        if scalar.dtype.name != parameter.dtype:
            self._refuse(number, parameter, f"{scalar.dtype.name} {scalar}")
        return ctypes.create_string_buffer(scalar.tobytes(), scalar.itemsize)

    def _pinned_among(self, args):
        """Return the arguments that are addresses of pinned memory, with their numbers."""
        for number, (argument, parameter) in enumerate(zip(args, self._parameters, strict=True)):
            if parameter.is_pointer and isinstance(argument, int) and argument:
                yield number, find_pinned(argument)

    def _pack_array(self, number, array, parameter):
        if not parameter.is_pointer:
            self._refuse(number, parameter, f"a pointer to {array.dtype.name}")
        if parameter.dtype not in (None, array.dtype.name):
            self._refuse(number, parameter, f"a pointer to {array.dtype.name}")
        if array.device != Device():
            self._refuse(number, parameter, f"an array on {array.device}, while {Device()} is current")
        return ctypes.c_void_p(array.data.ptr)

    def _refuse(self, number, parameter, got):
        raise EmulatorError(f"{self.name}: argument {number} is {got}; expected {parameter}")

    # ---- Failures ----
    def _describe(self, failure, arrays):
        lines = [f"{self.name}: {failure.message.decode()}"]
        if failure.library:
            lines += [f"  at {place}" for place in _source_lines(failure.library.decode(), failure.offset)]
        for number, array in arrays.items():
            if failure.allocation and array._allocation.address == failure.allocation:
                lines.append(f"  '{array._allocation.name}' is argument {number}")
        return "\n".join(lines)


def _as_cupy_packs(argument):
    """Return the NumPy scalar whose bytes CuPy hands to the kernel."""
    if isinstance(argument, _SCALARS):
        return argument
    if isinstance(argument, bool):
        return np.bool_(argument)
    if isinstance(argument, int):
        return np.int64(argument)
    if isinstance(argument, float):
        return np.float64(argument)
    raise TypeError(f"Unsupported type {type(argument)}")


def _source_lines(library, offset):
    """Return the places in the source of an instruction, the innermost of inlined functions first."""
    command = ["addr2line", "-e", library, "-f", "-C", "-s", "-i", hex(offset)]
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []
    pairs = zip(lines[::2], lines[1::2], strict=False)
    return [f"{place} in {function}" for function, place in pairs if not place.startswith("cuda_on_cpu.h")]
