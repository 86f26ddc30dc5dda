"""The records that forwards leave for their backwards: which of them waits, and how several can."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from cupy_syncbn.functional import Saved

NO_FORWARD: Saved = object.__new__(Saved)
"""Stands for the record of a forward where there is none: of the same type, as a module's tree prefers."""

_REPLACED, _DROPPED, _SERVED = "training", "evaluation", "served"

_REMEDIES = (
    "run forwards that need no backward within no_backward(module), call module.forget() after one whose "
    "backward will not come, or keep each forward's record, record = module.take_record(), for "
    "record.backward(dy)"
)


class Waiting(NamedTuple):
    """The records of a layer's forwards that wait for their backward: one in each mode."""

    training: Saved = NO_FORWARD
    evaluation: Saved = NO_FORWARD
    """The record of a forward in evaluation mode, if there is one after that in training."""
    lost: str = ""
    """Whether a record is missing: "training" or "evaluation" if another forward in training has taken its
    place, "served" if only that of the training has gone."""

    def after(self, saved: Saved) -> Waiting:
        """Return what waits after one more forward."""
        training, evaluation, lost = self
        if not saved.plan.training:  # it leaves a training that waits alone
            return Waiting(training, saved, lost if lost == _REPLACED else "")
        if training is not NO_FORWARD:
            lost = _REPLACED
        elif evaluation is not NO_FORWARD and lost != _REPLACED:
            lost = _DROPPED
        return Waiting(saved, NO_FORWARD, lost)

    def last(self) -> Saved:
        """Return the record of the last forward."""
        return self.training if self.evaluation is NO_FORWARD else self.evaluation

    def without(self, saved: Saved) -> Waiting:
        """Return what waits after the backward of a record."""
        training, evaluation, lost = self
        if saved is evaluation:
            return Waiting(training, NO_FORWARD, lost)
        return NOTHING if evaluation is NO_FORWARD else Waiting(NO_FORWARD, evaluation, _SERVED)

    def choose(self, training_mode: bool, layer: str) -> Saved:
        """Return the record that a backward means, or raise RuntimeError if none can be meant."""
        training, evaluation, lost = self
        if lost == _REPLACED:
            raise RuntimeError(
                f"{layer} has seen another forward in training mode since the one that still waits for its "
                f"backward, and keeps only the last: {_REMEDIES}"
            )
        if training is evaluation or (lost == _SERVED and training_mode):
            raise RuntimeError(
                f"call the forward of {layer} first: each forward allows one backward, and one "
                "within no_backward(module) none"
            )
        if training is NO_FORWARD:
            return evaluation
        if not training_mode and (lost == _DROPPED or evaluation is not NO_FORWARD):
            raise RuntimeError(
                f"forwards of {layer} in training and in evaluation mode wait for their backward: call "
                "module.train() for that of the training, or keep the record of the evaluation right after "
                "it, record = module.take_record(), for record.backward(dy)"
            )
        return training


NOTHING = Waiting()


class _Part(Protocol):
    """A module, as records see it."""

    def _take_left(self) -> Any: ...

    def _swap_left(self, left: Any) -> Any: ...

    def _set_aside(self) -> Callable[[], object]: ...


class Record:
    """The record of a forward, from `Module.take_record`: for one backward, at any later time.

    It holds the records of all batch normalizations within the module, and the values that the forward has
    left in attributes of other modules, such as their inputs. It does not hold parameters, buffers, modules
    and modes.

    Parameters
    ----------
    backward : callable
        The module's.
    parts : iterable of tuple
        Each module with what the forward has left there.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_syncbn import BatchNorm1d
    >>> bn, views = BatchNorm1d(3, device="cpu"), np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f4")
    >>> records = []
    >>> for view in views:
    ...     y = bn(view)
    ...     records.append(bn.take_record())
    >>> [record.backward(np.ones_like(y)).shape for record in records]
    [(4, 3), (4, 3)]
    """

    def __init__(self, backward: Callable[..., Any], parts: Iterable[tuple[_Part, Any]]) -> None:
        self._backward = backward
        self._parts = list(parts)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backward of the module for this forward; other forwards go on waiting.

        Parameters
        ----------
        *args, **kwargs
            Those of the module's backward.

        Returns
        -------
        Any
            The backward's result.

        Raises
        ------
        RuntimeError
            If the record has had its backward.
        Exception
            What the backward raises. The record can be used again afterwards, if the backward can.

        Notes
        -----
        **Collective** if the module's backward is: the ranks take their records in the same order.
        """
        if not self._parts:
            raise RuntimeError("this record has had its backward: each forward allows one backward")
        parts, self._parts = self._parts, []
        others = [(part, part._swap_left(left)) for part, left in parts]
        try:
            result = self._backward(*args, **kwargs)
        except BaseException:
            self._parts = [(part, part._swap_left(left)) for part, left in others]
            raise
        for part, left in others:
            part._swap_left(left)
        return result


class NoBackward(contextlib.ContextDecorator, contextlib.AbstractContextManager[None]):
    """The context of `no_backward`, which may be entered again, within itself too."""

    def __init__(self, parts: Iterable[_Part]) -> None:
        self._parts = list(parts)
        self._entered: list[list[Callable[[], object]]] = []

    def __enter__(self) -> None:
        self._entered.append([part._set_aside() for part in self._parts])

    def __exit__(self, *error: object) -> None:
        for put_back in self._entered.pop():
            put_back()
