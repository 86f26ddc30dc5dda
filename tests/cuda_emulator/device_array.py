"""The stand-in for cupy.ndarray: a NumPy array over emulated device memory, hidden in a class of its own.

A class of its own, since a subclass of numpy.ndarray would let through what CuPy refuses: mixing with NumPy
arrays, and becoming one unasked. Each operation makes a new allocation, or a view, as CuPy's would.
"""

import math

import numpy as np

from . import work
from .cuda import Device, get_current_stream, settle, submit, when_copied
from .device_memory import Allocation, BorrowedAllocation, find_allocation


class Flags:
    """The flags that CuPy has."""

    def __init__(self, values):
        self.c_contiguous = values.flags.c_contiguous
        self.f_contiguous = values.flags.f_contiguous
        self.owndata = values.flags.owndata

    @property
    def forc(self):
        return self.c_contiguous or self.f_contiguous

    @property
    def fnc(self):
        return self.f_contiguous and not self.c_contiguous

    def __getitem__(self, name):
        return getattr(self, name.lower())


class MemoryPointer:
    """Where an array's first element lies."""

    def __init__(self, ptr, device, mem):
        self.ptr, self.device, self.mem = ptr, device, mem
        self.device_id = device.id

    def __int__(self):
        return self.ptr


def _unsupported(value):
    return TypeError(f"Unsupported type {type(value)}")


def _operand(value):
    """Return the NumPy value of an operand of a device computation."""
    if isinstance(value, ndarray):
        return value._values
    if isinstance(value, bool | int | float | complex | np.generic):
        return value
    raise _unsupported(value)


class ndarray:  # noqa: N801 (CuPy's name)
    # _array is the NumPy array over the memory, _values the same when the current stream has come here.

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        dtype = np.dtype(dtype)
        if memptr is not None or strides is not None:
            raise NotImplementedError("the stand-in makes arrays by empty, asarray and views only")
        shape = (shape,) if np.ndim(shape) == 0 else tuple(int(size) for size in shape)
        nbytes = math.prod(shape) * dtype.itemsize
        self._allocation = Allocation(nbytes, f"{dtype.name}{list(shape)}", Device().id)
        self._array = self._allocation.view(shape, dtype)
        if order == "F":
            self._array = self._allocation.view(shape[::-1], dtype).T
        self._owner = None

    @classmethod
    def _over(cls, values, allocation, owner=None):
        """Return an array over a NumPy view of an allocation."""
        array = cls.__new__(cls)
        array._array, array._allocation, array._owner = values, allocation, owner
        return array

    @classmethod
    def _empty_like(cls, values, dtype, order):
        """Return a new array of this shape; order K keeps the order of the strides."""
        flags = values.flags
        if order in (None, "K") and not flags.forc:
            axes = sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis]))
            contiguous = cls([values.shape[axis] for axis in axes], dtype)
            return contiguous.transpose([axes.index(axis) for axis in range(values.ndim)])
        as_f = order == "F" or (order != "C" and flags.fnc)
        return cls(values.shape, dtype, order="F" if as_f else "C")

    @classmethod
    def _copy_of(cls, values, order="C", written=None):
        """Return a new array with the contents of a NumPy array."""
        values = np.asarray(values)
        array = cls._empty_like(values, values.dtype, order)
        array._array[...] = values
        array._mark_written(written)
        return array

    @classmethod
    def _from_cuda_array_interface(cls, owner):
        """Return an array over memory that another object describes, without a copy."""
        interface = owner.__cuda_array_interface__
        address, shape, dtype = interface["data"][0], interface["shape"], np.dtype(interface["typestr"])
        if 0 in shape:
            return cls(shape, dtype)
        allocation = find_allocation(address)
        if allocation is None:
            raise ValueError(f"no device memory at {address:#x}")
        offset = address - allocation.address
        return cls._over(allocation.view(shape, dtype, offset, interface.get("strides")), allocation, owner)

    @property
    def _values(self):
        settle()
        return self._array

    def _for_host(self, name):
        """Return the values to an operation for which the host waits."""
        stream = get_current_stream()
        stream._refuse_in_capture(name)
        work.synchronize(name, stream._under_way())
        return self._array

    def _view(self, values):
        return self._over(values, self._allocation, self._owner)

    def _for_work(self, stream=None):
        """Return this array to work that is done later: a graph does not keep its memory."""
        if not (stream or get_current_stream()).is_capturing():
            return self
        return self._over(self._array, BorrowedAllocation(self._allocation))

    def _mark_written(self, written=None):
        """Tell the runtime what the host wrote: all of this array, or what a map of written bytes says."""
        if self.size:
            self._allocation.written_map(self._array)[...] = 1 if written is None else written

    def _written_map(self):
        return self._allocation.written_map(self._array) if self.size else None

    # ---- What it is ----
    shape = property(lambda self: self._array.shape)
    strides = property(lambda self: self._array.strides)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    itemsize = property(lambda self: self._array.itemsize)
    flags = property(lambda self: Flags(self._array))

    @property
    def data(self):
        return MemoryPointer(self._address(), self.device, self._allocation)

    @property
    def device(self):
        return Device(self._allocation.device_id)

    def _address(self):
        return self._array.ctypes.data if self.size else 0

    @property
    def __cuda_array_interface__(self):
        self._allocation.mark_all_written()  # by whom the address is handed to, for all one knows
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self._address(), False),
            "stream": 1,
            "version": 3,
        }

    def __dlpack_device__(self):
        return 2, self._allocation.device_id  # kDLCUDA

    def __dlpack__(self, **options):
        raise NotImplementedError("the stand-in exports no DLPack capsule")

    # ---- To and from the host ----
    def get(self, stream=None, order="C", out=None, blocking=True):
        stream = stream or get_current_stream()
        if out is None:
            out = np.empty_like(self._array, order=order)
        else:
            self._check_output(out)
        if blocking:
            stream._refuse_in_capture("cudaMemcpy")
        target, source = when_copied(out), self._for_work(stream)

        def copy():
            source._allocation.check()
            target()[...] = source._array

        submit(copy, stream)
        if blocking:
            work.synchronize("cudaMemcpy", stream._under_way())
        return out

    def _check_output(self, out):
        if not isinstance(out, np.ndarray):
            raise TypeError(f"Only numpy.ndarray can be obtained from cupy.ndarray (got {type(out)})")
        if out.dtype != self.dtype:
            raise TypeError(f"{out.dtype.name} array cannot be obtained from {self.dtype.name} array")
        if out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
        if not (out.flags.c_contiguous or out.flags.f_contiguous):
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype.name} array cannot be set to {self.dtype.name} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        source, target = when_copied(arr), self._for_work(stream)

        def copy():
            target._allocation.check()
            target._array[...] = source()
            target._mark_written()

        submit(copy, stream)

    def item(self, *index):
        return self._for_host("item").item(*index)

    def tolist(self):
        return self._for_host("tolist").tolist()

    def tobytes(self, order="C"):
        return self._for_host("tobytes").tobytes(order)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    # ---- Views and copies ----
    @property
    def T(self):  # noqa: N802 (NumPy's name)
        return self._view(self._array.T)

    def transpose(self, *axes):
        return self._view(self._array.transpose(*axes))

    def swapaxes(self, first, second):
        return self._view(self._array.swapaxes(first, second))

    def reshape(self, *shape, order="C"):
        values = self._array.reshape(*shape, order=order)
        if self.size == 0 or np.shares_memory(values, self._array):
            return self._view(values)
        return self._copy_of(values)

    def ravel(self, order="C"):
        return self.reshape(-1, order=order)

    def flatten(self, order="C"):
        return self._copy_of(self._values.flatten(order))

    def squeeze(self, axis=None):
        return self._view(self._array.squeeze(axis))

    def view(self, dtype=None):
        return self._view(self._array.view(dtype if dtype is not None else self.dtype))

    def copy(self, order="C"):
        return self._copy_of(self._values, order, self._written_map())

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        with np.errstate(all="ignore"):  # a GPU warns of nothing
            return self._copy_of(self._values.astype(dtype, order="K"), order)

    def __getitem__(self, index):
        values = self._array[_index(index)]
        if isinstance(values, np.ndarray) and (values.size == 0 or np.shares_memory(values, self._array)):
            return self._view(values)
        if isinstance(values, np.ndarray):
            return self._copy_of(values)
        # One element: a view without dimensions, where NumPy has a scalar.
        return self._view(self._array[(*_tuple(_index(index)), Ellipsis)])

    def __setitem__(self, index, value):
        index = _index(index)
        target, source = self._for_work(), value._for_work() if isinstance(value, ndarray) else None
        operand = _operand(value) if source is None else source._array
        same_type = source is not None and source.dtype == self.dtype and source.size

        of_bytes = index
        if any(part is Ellipsis for part in _tuple(index)):
            of_bytes = (*_tuple(index), slice(None))  # the bytes of an element are one more axis

        def assign():
            for array in (target,) if source is None else (target, source):
                array._allocation.check()
            with np.errstate(all="ignore"):
                target._array[index] = operand
            if target.size:
                target._written_map()[of_bytes] = source._written_map() if same_type else 1

        submit(assign)

    def fill(self, value):
        self[...] = value

    def __len__(self):
        return len(self._array)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # ---- Computing ----
    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if method not in ("__call__", "reduce"):
            return NotImplemented
        if any(isinstance(value, ndarray) for value in (options.get("where"), options.get("axis"))):
            raise NotImplementedError("the stand-in's ufuncs take no array but the operands")
        if out is not None:
            if not all(isinstance(target, ndarray) for target in out):
                raise TypeError("return arrays must be of cupy.ndarray")
            options["out"] = tuple(target._values for target in out)
        with np.errstate(all="ignore"):  # a GPU warns of nothing
            results = getattr(ufunc, method)(*map(_operand, inputs), **options)
        if out is not None:
            for target in out:
                target._mark_written()
            return out[0] if len(out) == 1 else out
        if isinstance(results, tuple):
            return tuple(map(ndarray._copy_of, results))
        return ndarray._copy_of(results)

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"the stand-in for CuPy has no {function.__name__}")

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return self._reduced("sum", out, axis=axis, dtype=dtype, keepdims=keepdims)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return self._reduced("mean", out, axis=axis, dtype=dtype, keepdims=keepdims)

    def max(self, axis=None, out=None, keepdims=False):
        return self._reduced("max", out, axis=axis, keepdims=keepdims)

    def min(self, axis=None, out=None, keepdims=False):
        return self._reduced("min", out, axis=axis, keepdims=keepdims)

    def any(self, axis=None, out=None, keepdims=False):
        return self._reduced("any", out, axis=axis, keepdims=keepdims)

    def all(self, axis=None, out=None, keepdims=False):
        return self._reduced("all", out, axis=axis, keepdims=keepdims)

    def _reduced(self, name, out, **options):
        result = getattr(self._values, name)(**options)
        if out is None:
            return self._copy_of(result)
        out[...] = self._copy_of(result)
        return out

    def __float__(self):
        return float(self._for_host("float").item())

    def __int__(self):
        return int(self._for_host("int").item())

    def __index__(self):
        return self._for_host("index").__index__()

    def __bool__(self):
        return bool(self._for_host("bool"))

    __hash__ = None

    def __repr__(self):
        return repr(self._for_host("repr"))

    __str__ = __repr__


def _tuple(index):
    return index if isinstance(index, tuple) else (index,)


def _index(index):
    """Return an index for NumPy: of integers, slices, None, Ellipsis and stand-in arrays."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    if isinstance(index, ndarray):
        return index._values
    if isinstance(index, np.ndarray | list):
        raise TypeError(f"the stand-in takes no {type(index).__name__} as an index")
    return index


def _define_operators():
    binary = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "matmul": np.matmul,
        "truediv": np.true_divide,
        "floordiv": np.floor_divide,
        "mod": np.remainder,
        "pow": np.power,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "lshift": np.left_shift,
        "rshift": np.right_shift,
    }
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    unary = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}
    for name, ufunc in {**binary, **compare}.items():
        setattr(ndarray, f"__{name}__", lambda self, other, ufunc=ufunc: ufunc(self, other))
    for name, ufunc in binary.items():
        setattr(ndarray, f"__r{name}__", lambda self, other, ufunc=ufunc: ufunc(other, self))
        setattr(ndarray, f"__i{name}__", lambda self, other, ufunc=ufunc: ufunc(self, other, out=(self,)))
    for name, ufunc in unary.items():
        setattr(ndarray, f"__{name}__", lambda self, ufunc=ufunc: ufunc(self))


_define_operators()
