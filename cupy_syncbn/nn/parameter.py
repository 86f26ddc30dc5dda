"""Parameters: arrays that training changes, each with its gradient."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np

from cupy_syncbn.arrays import Array, is_cupy, module_of, type_name
from cupy_syncbn.checks import is_data_type


class Parameter:
    """An array that training changes, and its gradient.

    Parameters
    ----------
    data : array
        The values; kept, not copied.
    requires_grad : bool
        Whether it is trained.

    Attributes
    ----------
    data : array
        The values. An optimizer may change them in place, or assign others.
    grad : array or None
        The gradient, of the shape and type of `data`: None until a backward, which then adds to it.
    requires_grad : bool
        Whether a backward adds to the gradient, and `reduce_gradients` averages it. It must be set at the
        forward and at its backward, as in torch, and be the same on all ranks. A present gradient stays.

    Notes
    -----
    NumPy's functions take a parameter as its `data`. If that is a CuPy array, they raise TypeError, as
    for the array itself.

    Examples
    --------
    >>> import numpy as np
    >>> weight = Parameter(np.ones(3))
    >>> for _ in range(2):
    ...     weight.accumulate(np.full(3, 0.5))
    >>> weight.grad
    array([1., 1., 1.])
    >>> np.sum(weight), weight.shape
    (np.float64(3.0), (3,))
    """

    grad: Array | None = None
    requires_grad: bool = True

    def __init__(self, data: Array, requires_grad: bool = True) -> None:
        self.data, self.requires_grad = data, requires_grad
        self.grad = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`."""
        shape: tuple[int, ...] = self.data.shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of `data`."""
        dtype: np.dtype[Any] = self.data.dtype
        return dtype

    @property
    def size(self) -> int:
        """The number of values."""
        return self.data.size

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if is_cupy(self.data):  # as CuPy's arrays refuse
            raise TypeError(
                "expected a parameter of NumPy arrays for a conversion to NumPy (got one of CuPy): "
                "use .data, or .data.get() for a copy on the CPU"
            )
        return np.array(self.data, dtype=dtype, copy=copy)

    def accumulate(self, gradient: Array) -> None:
        """Add to the gradient, in place unless it is read-only; nothing without `requires_grad`.

        Parameters
        ----------
        gradient : array
            Like `data`. The first is kept, not copied.
        """
        if not self.requires_grad:
            return
        if self.grad is None:
            self.grad = gradient
            return
        if isinstance(self.grad, np.ndarray) and not self.grad.flags.writeable:
            self.grad = self.grad.copy()
        with np.errstate(all="ignore"):  # infinities and NaN are the data's, and pass through
            self.grad += gradient

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad`; return this parameter.

        Parameters
        ----------
        requires_grad : bool
            False to freeze it.
        """
        self.requires_grad = requires_grad
        return self

    def __repr__(self) -> str:
        frozen = "" if self.requires_grad else ", requires_grad=False"
        return f"Parameter(shape={self.data.shape}, dtype={self.data.dtype}{frozen})"


@np.errstate(all="ignore")  # infinities and NaN are the data's, and pass through
def accumulation(parameter: Parameter, gradient: Array) -> Callable[[], object]:
    """Return what adds a gradient to that of a parameter, all that can fail being done."""
    grad = parameter.grad
    if grad is None:
        return partial(setattr, parameter, "grad", gradient)
    if not isinstance(grad, np.ndarray | np.generic):  # of CuPy, whose sum is one kernel
        return partial(operator.iadd, grad, gradient)
    total = (grad + gradient).astype(grad.dtype, copy=False)
    if not grad.flags.writeable:
        return partial(setattr, parameter, "grad", total)
    return partial(grad.__setitem__, ..., total)


def check_gradient(name: str, parameter: Parameter) -> None:
    """Check that a parameter's gradient, which anybody may have assigned, can be added to.

    It must be None, or an array of floating-point numbers where the data is, of its shape.
    """
    grad, data = parameter.grad, parameter.data
    if grad is None:
        return
    kind = module_of(data).ndarray
    if isinstance(grad, np.generic) and data.shape == ():
        grad = np.asarray(grad)  # NumPy's sums give numbers for arrays without axes
    for role, array in (f"{name}.data", data), (f"{name}.grad", grad):
        if not isinstance(array, kind):
            raise TypeError(
                f"expected {role} to be a {kind.__module__}.{kind.__name__} "
                f"(got {type_name(array)}): convert it"
            )
        if not (is_data_type(array.dtype) or array.dtype.kind in "fc"):
            raise TypeError(f"expected {role} in floating point (got {array.dtype}): use .astype(...)")
    if grad.shape != data.shape:
        raise ValueError(f"expected {name}.grad of the shape of its data, {data.shape} (got {grad.shape})")
