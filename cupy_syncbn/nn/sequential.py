"""Modules one after the other, as a list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self, overload

from cupy_syncbn.arrays import type_name
from cupy_syncbn.nn.module import Module


class Sequential(Module):
    """Modules one after the other, named "0", "1" and so on.

    Parameters
    ----------
    *layers : Module
        The modules, in the order of the forward.

    Raises
    ------
    TypeError
        If one is not a Module.

    Notes
    -----
    Indices, slices, assignment, ``del``, ``len`` and loops do what they do with lists. A slice is a
    Sequential.

    Examples
    --------
    >>> net = Sequential(BatchNorm1d(4), BatchNorm1d(4))
    >>> list(net.state_dict())[:3]
    ['0.weight', '0.bias', '0.running_mean']
    >>> net
    Sequential(
      (0): BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
      (1): BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    )
    """

    def __init__(self, *layers: Module) -> None:
        self.layers = _layers(layers)

    def _members(self) -> Iterator[tuple[str, Any]]:
        yield from ((str(index), layer) for index, layer in enumerate(self.layers))
        yield from ((name, value) for name, value in vars(self).items() if name != "layers")  # of a subclass

    def forward(self, x: Any) -> Any:
        """Call each layer on the result of the one before; return the last result."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Any) -> Any:
        """Take the gradient of the last forward's result back to the input, through the last layer first."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def append(self, module: Module) -> Self:
        """Add a layer after the last; return this module.

        Parameters
        ----------
        module : Module
            The layer.

        Raises
        ------
        TypeError
            If it is not a Module.
        """
        return self.extend([module])

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add layers after the last; return this module.

        Parameters
        ----------
        modules : iterable of Module
            The layers, or a Sequential of them.

        Raises
        ------
        TypeError
            If one is not a Module; then none is added.
        """
        self.layers += _layers(modules)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Add a layer before another; return this module.

        Parameters
        ----------
        index : int
            Of the other; as for lists.
        module : Module
            The layer.

        Raises
        ------
        TypeError
            If it is not a Module.
        """
        self.layers[index:index] = _layers([module])
        return self

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Module:
        """Return a layer, or a Sequential of some layers, which it shares."""
        if not isinstance(index, slice):
            return self.layers[index]
        part = Sequential(*self.layers[index])
        part.training = self.training
        return part

    def __setitem__(self, index: int | slice, value: Any) -> None:
        """Replace a layer, or a slice of layers."""
        if isinstance(index, slice):
            self.layers[index] = _layers(value)
        else:
            self.layers[index] = _layers([value])[0]

    def __delitem__(self, index: int | slice) -> None:
        """Remove a layer, or a slice of layers."""
        del self.layers[index]

    def __iter__(self) -> Iterator[Module]:
        """Return an iterator over the layers."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self.layers)


def _layers(values: Iterable[Any]) -> list[Module]:
    """Return the layers of a Sequential; TypeError if one is none."""
    layers = list(values)
    for layer in layers:
        if not isinstance(layer, Module):
            is_collection = isinstance(layer, list | tuple)
            remedy = (
                "use Sequential(*layers)" if is_collection else "write a Module with forward and backward"
            )
            raise TypeError(
                f"expected the layers of a Sequential to be Modules (got {type_name(layer)}): {remedy}"
            )
    return layers
