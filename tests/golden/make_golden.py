"""Write golden/*.npz: five training steps and an evaluation of torch's BatchNorm on a whole batch.

    python tests/golden/make_golden.py

The files in the repository were made with torch 2.13.0 on a CPU. Where torch is installed, the tests also
compare with the same training done on the spot.
"""

from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent
STEPS = 5
LEARNING_RATE = 0.1

# name: (shape, dtype, arguments of the layer)
CASES = {
    "2d": ((9, 5), "float32", {}),
    "3d": ((9, 3, 7), "float32", {}),
    "4d": ((9, 4, 3, 3), "float32", {}),
    "5d": ((9, 2, 2, 3, 2), "float32", {"eps": 1e-3, "momentum": 0.3}),
    "momentum_none": ((9, 3, 4), "float32", {"momentum": None}),
    "not_affine": ((9, 3, 4), "float32", {"affine": False}),
    "no_running_stats": ((9, 3, 4), "float32", {"track_running_stats": False}),
    "2d_float64": ((9, 5), "float64", {}),
    "4d_float64": ((9, 3, 3, 2), "float64", {}),
    "momentum_none_float64": ((9, 3, 2), "float64", {"momentum": None}),
    "not_affine_no_running_stats_float64": (
        (9, 3, 2),
        "float64",
        {"affine": False, "track_running_stats": False},
    ),
}


def make_inputs(name):
    """Return the batches, the gradients of the outputs and the first parameters of a case."""
    shape, dtype, arguments = CASES[name]
    rng = np.random.default_rng(sorted(CASES).index(name))
    channels = (1, shape[1]) + (1,) * (len(shape) - 2)
    offset, scale = rng.normal(0, 3, channels), rng.uniform(0.2, 4, channels)
    inputs = {
        "x": offset + scale * rng.normal(size=(STEPS + 1, *shape)),
        "dy": rng.normal(size=(STEPS + 1, *shape)),
    }
    if arguments.get("affine", True):
        inputs["weight"] = rng.uniform(0.5, 1.5, shape[1])
        inputs["bias"] = rng.normal(size=shape[1])
    return {key: value.astype(dtype) for key, value in inputs.items()}


def train_torch(name, inputs):
    """Return what torch makes of the inputs, stacked over the five training steps and one evaluation."""
    import torch

    shape, dtype, arguments = CASES[name]
    layer_class = {
        2: torch.nn.BatchNorm1d,
        3: torch.nn.BatchNorm1d,
        4: torch.nn.BatchNorm2d,
        5: torch.nn.BatchNorm3d,
    }
    layer = layer_class[len(shape)](shape[1], dtype=getattr(torch, dtype), **arguments)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            parameter.copy_(torch.from_numpy(inputs[key]))

    records = []
    for step in range(STEPS + 1):
        layer.train(step < STEPS)
        x = torch.from_numpy(inputs["x"][step]).requires_grad_()
        y = layer(x)
        y.backward(torch.from_numpy(inputs["dy"][step]))
        record = {"y": y.detach(), "dx": x.grad}
        record |= {f"{key}_grad": parameter.grad for key, parameter in layer.named_parameters()}
        record |= dict(layer.named_buffers())
        records.append({key: value.numpy().copy() for key, value in record.items()})
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return {key: np.stack([record[key] for record in records]) for key in records[0]}


def main():
    for name in CASES:
        inputs = make_inputs(name)
        results = {f"torch_{key}": value for key, value in train_torch(name, inputs).items()}
        np.savez_compressed(DIRECTORY / f"{name}.npz", **inputs, **results)


if __name__ == "__main__":
    main()
