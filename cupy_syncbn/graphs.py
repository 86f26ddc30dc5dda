"""A step on the GPU as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from cupy_syncbn.arrays import array_module


class CapturedStep:
    """A step on the GPU that a CUDA graph does again at each call, without the time that Python takes.

    A graph writes to the same memory whenever it is replayed, whoever has that by then. So the step works in
    a memory pool of its own. The pool, what the step returned, and the memory in which the package's kernels
    add up live as long as this object.

    Parameters
    ----------
    step : callable
        Called without arguments. It reads arrays that stay where they are, into which the program copies each
        batch, and returns the arrays that the program wants to see, in any structure. It works on the current
        stream, must not wait for the GPU, and of several ranks uses NCCL alone.

    Raises
    ------
    RuntimeError
        If there is no GPU, or the step does what cannot be captured, which is CuPy's error.

    Notes
    -----
    **Collective** if the step is: each rank must capture it, and call it as often as the others.

    The constructor does the step once, which counts: it compiles kernels, and lets layers and ranks meet for
    the first time. Then it captures the step, which computes nothing. A call enqueues the graph on the
    current stream and returns the arrays of the captured step, the same ones each time. Settings are those of
    the capture: a layer that has been put into evaluation mode since is not, in the graph. What other
    ranks did wrong is told by the group's `check_errors`.

    Whoever captures a graph by CuPy's own means needs such a pool too, around the capture by
    ``with cupy.cuda.using_allocator(pool.malloc)``, and must keep it and all results. The memory in which
    kernels add up then lives as long as the process, and the graph clears it at each replay.

    Examples
    --------
    ::

        x, dy = cupy.empty(shape, "float32"), cupy.empty(shape, "float32")

        def step():
            bn.zero_grad()
            return bn(x), bn.backward(dy)

        captured = CapturedStep(step)
        for batch, gradient in batches:
            x[...], dy[...] = batch, gradient
            y, dx = captured()
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        cupy = array_module("cuda")
        from cupy_syncbn.backends.cuda import operations

        self._step = step  # and all that it refers to
        self._pool = cupy.cuda.MemoryPool()
        self._workspaces: operations.Workspaces = {}
        before, stream = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
        stream.wait_event(before.record())
        with stream, cupy.cuda.using_allocator(self._pool.malloc), operations.workspaces_in(self._workspaces):
            step()
            stream.synchronize()
            stream.begin_capture()
            try:
                self._results = step()
            except Exception as error:
                error.add_note(
                    "This happened while the step was captured as a CUDA graph: it must not wait for the "
                    "GPU, and several ranks must use NCCL (process_group=NCCLProcessGroup())."
                )
                with contextlib.suppress(Exception):  # by what has just been raised
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()

    def __call__(self) -> Any:
        """Do the step on the current stream, and return the arrays that the captured step returned.

        Returns
        -------
        object
            What `step` returned when it was captured; the arrays have new contents after each call.
        """
        self._graph.launch()
        return self._results
