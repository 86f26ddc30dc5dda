"""The tests of test_functional.py on the CUDA engine: its calls with arrays moved there and back."""

import numpy as np
import pytest

import cupy_syncbn
import test_functional as suite

globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})

UPDATED = ("running_mean", "running_var", "num_batches_tracked", "out")


def _memory_order(array):
    """Return the axes by falling strides."""
    return sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))


def to_gpu(cupy, array):
    """Return a CuPy array of the same memory order."""
    if not isinstance(array, np.ndarray):
        return array
    if array.ndim < 2:
        return cupy.asarray(array)
    order = _memory_order(array)
    return cupy.asarray(np.ascontiguousarray(array.transpose(order))).transpose(np.argsort(order).tolist())


def to_host(array):
    """Return a NumPy array of the same memory order; None stays None."""
    if array is None or array.ndim < 2:
        return None if array is None else array.get()
    order = _memory_order(array)
    return array.transpose(order).get().transpose(np.argsort(order))


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch, cupy):
    def forward(x, weight=None, bias=None, running_mean=None, running_var=None, **arguments):
        arguments |= {
            "weight": weight,
            "bias": bias,
            "running_mean": running_mean,
            "running_var": running_var,
        }
        moved = {name: to_gpu(cupy, value) for name, value in arguments.items()}
        y, saved = cupy_syncbn.sync_batch_norm(to_gpu(cupy, x), **moved)
        assert isinstance(y, cupy.ndarray)
        for name in UPDATED:
            if arguments.get(name) is not None:
                arguments[name][...] = to_host(moved[name])
        return (to_host(y) if arguments.get("out") is None else arguments["out"]), saved

    def backward(dy, saved, **arguments):
        gradients = cupy_syncbn.sync_batch_norm_backward(to_gpu(cupy, dy), saved, **arguments)
        return cupy_syncbn.functional.Gradients(*map(to_host, gradients))

    monkeypatch.setattr(suite, "sync_batch_norm", forward)
    monkeypatch.setattr(suite, "sync_batch_norm_backward", backward)
