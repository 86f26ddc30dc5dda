"""Batch normalization as the textbook has it, to compare the package with.

Everything is computed in float64 (or longdouble) on the whole, concatenated batch: the mean, then the mean of
the squared deviations, then the normalization; backwards the chain rule of Ioffe and Szegedy (2015, section
3), one partial derivative a line. Nothing is shared with the package: no shifted sums, no merges, no folded
coefficients.
"""

import numpy as np


class BatchNorm:
    """A batch norm layer on the whole batch, with the arguments and attributes of the package's layers."""

    def __init__(
        self,
        num_features,
        *,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        activation=None,
        channel_axis=1,
        dtype=np.float64,
    ):
        self.eps, self.momentum, self.activation = eps, momentum, activation
        self.channel_axis, self.dtype = channel_axis, dtype
        self.training = True
        self.weight = np.ones(num_features, dtype) if affine else None
        self.bias = np.zeros(num_features, dtype) if affine else None
        self.running_mean = np.zeros(num_features, dtype) if track_running_stats else None
        self.running_var = np.ones(num_features, dtype) if track_running_stats else None
        self.num_batches_tracked = 0
        self.weight_grad = self.bias_grad = None

    def forward(self, x, residual=None):
        self.x = x = np.asarray(x).astype(self.dtype)
        self.axes = tuple(axis for axis in range(x.ndim) if axis != self.channel_axis % x.ndim)
        self.count = x.size // x.shape[self.channel_axis]
        self.uses_batch = self.training or self.running_mean is None
        self.has_residual = residual is not None

        if self.count == 0:
            self.derivative = np.ones_like(x)
            return np.zeros_like(x)
        if self.uses_batch:
            self.mean = np.mean(x, axis=self.axes, keepdims=True)
            self.var = np.mean((x - self.mean) ** 2, axis=self.axes, keepdims=True)
        else:
            self.mean, self.var = self._broadcast(self.running_mean), self._broadcast(self.running_var)
        if self.training:
            self._update_running_statistics()

        self.std = np.sqrt(self.var + self.eps)
        self.xhat = (x - self.mean) / self.std
        y = self.xhat
        if self.weight is not None:
            y = y * self._broadcast(self.weight) + self._broadcast(self.bias)
        if residual is not None:
            y = y + np.asarray(residual).astype(self.dtype)
        value, self.derivative = self._activate(y)
        return value

    __call__ = forward

    def backward(self, dy):
        """Set weight_grad and bias_grad; return dx, or (dx, dresidual) after a forward with a residual."""
        dy = np.asarray(dy).astype(self.dtype)
        is_zero = self.derivative == 0  # whatever dy is
        dz = np.where(is_zero, 0, dy * np.where(is_zero, 1, self.derivative))
        if self.count == 0:
            dx = np.zeros_like(dz)
            if self.weight is not None:
                self.weight_grad, self.bias_grad = np.zeros_like(self.weight), np.zeros_like(self.bias)
            return (dx, dz) if self.has_residual else dx

        dxhat = dz
        if self.weight is not None:
            self.weight_grad = np.sum(dz * self.xhat, axis=self.axes)
            self.bias_grad = np.sum(dz, axis=self.axes)
            dxhat = dz * self._broadcast(self.weight)
        dx = dxhat / self.std
        if self.uses_batch:
            dvar = -np.sum(dxhat * self.xhat, axis=self.axes, keepdims=True) / (2 * self.std**2)
            dmean = -np.sum(dxhat, axis=self.axes, keepdims=True) / self.std
            dx = dx + dvar * 2 * (self.x - self.mean) / self.count + dmean / self.count
        return (dx, dz) if self.has_residual else dx

    def _broadcast(self, per_channel):
        shape = [1] * self.x.ndim
        shape[self.channel_axis] = -1
        return np.reshape(per_channel, shape)

    def _update_running_statistics(self):
        self.num_batches_tracked += 1
        if self.running_mean is None:
            return
        factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = self.var * self.count / max(self.count - 1, 1)
        self.running_mean = (1 - factor) * self.running_mean + factor * self.mean.ravel()
        self.running_var = (1 - factor) * self.running_var + factor * unbiased.ravel()

    def _activate(self, z):
        """Return the activation of z, and its derivative there."""
        if self.activation is None:
            return z, np.ones_like(z)
        name, slope = self.activation if isinstance(self.activation, tuple) else (self.activation, 0.01)
        derivative = np.where(z > 0, 1, 0 if name == "relu" else slope).astype(self.dtype)
        return z * derivative, derivative
