"""Whatever is assigned to a layer's attributes between calls, it does what PyTorch's module does: drawn sequences of both."""

import warnings

import numpy as np
import pytest

import cbn

torch = pytest.importorskip("torch", reason="compares with PyTorch's modules")

SEQUENCES = 3000
CHANNELS = 3
SHAPES = {"BatchNorm1d": [(4, 3), (2, 3, 5), (5, 3, 1)], "BatchNorm2d": [(2, 3, 4, 2), (1, 3, 2, 5)], "BatchNorm3d": [(2, 3, 2, 1, 3)]}
ARRAYS = "weight", "bias", "running_mean", "running_var"


def assign(rng, module, layer):
    """Set an attribute, or use a method, of both."""
    what = rng.choice(["mode", "track", "momentum", "eps", "affine", "none", "array", "count", "reset", "parameters", "load"])
    if what == "mode":
        mode = bool(rng.integers(2))
        if rng.integers(2):
            module.train(mode), layer.train(mode)
        else:
            module.training = layer.training = mode
    elif what == "track":
        module.track_running_stats = layer.track_running_stats = bool(rng.integers(2))
    elif what == "momentum":
        module.momentum = layer.momentum = [None, 0.0, 0.1, 0.5, 1.0][rng.integers(5)]
    elif what == "eps":
        module.eps = layer.eps = [1e-5, 1e-3, 0.5][rng.integers(3)]
    elif what == "affine":
        module.affine = layer.affine = bool(rng.integers(2)) if module.weight is not None and module.bias is not None else module.affine
    elif what == "none":
        name = ["weight", "bias", "running statistics", "num_batches_tracked"][rng.integers(4)]
        for name in ("running_mean", "running_var") if name == "running statistics" else (name,):
            setattr(module, name, None), setattr(layer, name, None)
    elif what == "array":
        name, values = ARRAYS[rng.integers(4)], rng.uniform(0.5, 2, CHANNELS)
        of = torch.nn.Parameter if name in ("weight", "bias") else lambda a: a
        if module.running_mean is None and name.startswith("running"):
            return  # half of a pair of running statistics is an error
        setattr(module, name, of(torch.tensor(values))), setattr(layer, name, values)
    elif what == "count":
        count = int(rng.integers(5))
        module.num_batches_tracked, layer.num_batches_tracked = torch.tensor(count), count
    elif what == "reset":
        if module.running_mean is not None and module.num_batches_tracked is not None:
            module.reset_running_stats(), layer.reset_running_stats()
    elif what == "parameters":
        if all(getattr(module, name) is not None for name in (*ARRAYS, "num_batches_tracked")):
            module.reset_parameters(), layer.reset_parameters()
    else:
        state = {name: rng.uniform(0.5, 2, tensor.shape) for name, tensor in module.state_dict().items() if name in ARRAYS}
        module.load_state_dict({name: torch.tensor(a) for name, a in state.items()}, strict=False)
        layer.load_state_dict(state, strict=False)


def call(rng, kind, module, layer):
    x = rng.normal(1, 2, SHAPES[kind][rng.integers(len(SHAPES[kind]))])
    tensor = torch.tensor(x, requires_grad=True)
    try:
        y = module(tensor)
    except (ValueError, RuntimeError) as error:
        with pytest.raises(ValueError):
            layer(x)
        return str(error)
    np.testing.assert_allclose(layer(x), y.detach().numpy(), rtol=1e-9, atol=1e-9)
    module.zero_grad()
    y.backward(torch.ones_like(y) * tensor.detach())
    np.testing.assert_allclose(layer.backward(x), tensor.grad.numpy(), rtol=1e-7, atol=1e-7)
    for name in ("weight", "bias"):
        grad = getattr(layer, f"{name}_grad")
        assert (grad is None) == (getattr(module, name) is None)
        if grad is not None:
            np.testing.assert_allclose(grad, getattr(module, name).grad.numpy(), rtol=1e-7, atol=1e-7)


def compare(module, layer):
    expected, state = module.state_dict(), layer.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(state[name], tensor.numpy(), rtol=1e-10, atol=1e-12, err_msg=name)
    assert layer.training == module.training


def test_drawn_sequences():
    rng = np.random.default_rng(71)
    errors = calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(SEQUENCES):
            kind = list(SHAPES)[rng.integers(3)]
            options = {"eps": 1e-5, "momentum": [0.1, None][rng.integers(2)], "affine": bool(rng.integers(4)), "track_running_stats": bool(rng.integers(4))}
            module = getattr(torch.nn, kind)(CHANNELS, **options, dtype=torch.float64)
            layer = getattr(cbn, kind)(CHANNELS, **options, dtype=np.float64)
            done = []
            for _ in range(rng.integers(2, 9)):
                if rng.integers(2):
                    done.append("call")
                    errors += call(rng, kind, module, layer) is not None
                    calls += 1
                else:
                    assign(rng, module, layer)
                compare(module, layer)
    assert calls > 5000 and errors < calls / 10
