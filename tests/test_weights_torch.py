"""PyTorch's networks, drawn: weights taken over, outputs and training that goes on agree with PyTorch's own; and weights handed back."""

import numpy as np
import perceptron
import pytest
from test_layers import same_state

import cbn

torch = pytest.importorskip("torch", reason="compares with PyTorch's networks")
from torch import nn


def network(seed):
    rng, hidden = perceptron.drawn(seed)
    torch.manual_seed(seed)
    modules, units = [], perceptron.INPUTS
    for width, eps, momentum, affine, _ in hidden:
        modules += [nn.Linear(units, width), nn.BatchNorm1d(width, eps, None if width % 5 == 0 else momentum, affine), nn.ReLU()]
        units = width
    net = nn.Sequential(*modules, nn.Linear(units, perceptron.OUTPUTS)).double()
    train(net, perceptron.batches(rng))
    return rng, net


def train(net, data):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), perceptron.RATE)
    for x, target in data:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(torch.tensor(x)), torch.tensor(target)).backward()
        optimizer.step()
    net.eval()


def taken_over(net, source, **options):
    norms, layers = cbn.from_torch(source, **options), {}
    for name, module in net.named_children():
        if isinstance(module, nn.Linear):
            layers[name] = perceptron.Dense(module.weight.detach().numpy().T, module.bias.detach().numpy())
        elif name in norms:
            layers[name] = norms[name]
            layers[name].activation = "relu"
    return layers


@pytest.mark.parametrize("seed", range(25))
def test_training_goes_on(seed):
    rng, net = network(seed)
    layers = taken_over(net, net)
    x = rng.normal(1, 2, (5, perceptron.INPUTS))
    with torch.no_grad():
        perceptron.close(perceptron.forward(layers, x), net(torch.tensor(x)))
        data = perceptron.batches(rng)
        perceptron.train(layers, data)
    train(net, data)
    norms = {name: layer for name, layer in layers.items() if isinstance(layer, cbn.BatchNorm)}
    expected = net.state_dict()
    for name, array in cbn.to_torch(norms).items():
        perceptron.close(array, expected[name], 1e-8)
    for name, layer in layers.items():
        if name not in norms:
            perceptron.close(layer.weight.T, expected[f"{name}.weight"], 1e-8)
    with torch.no_grad():
        perceptron.close(perceptron.forward(layers, x), net(torch.tensor(x)), 1e-8)


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_layers_of_each_rank(kind, dtype):
    """By what goes in and out of them: of modules in modules, from their state dict in each type."""
    torch.manual_seed(1)
    rank = int(kind[-2])
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, kind)
    net = nn.Sequential(
        conv(3, 5, 3), norm(5), nn.ReLU(), nn.Sequential(conv(5, 7, 1), norm(7, affine=False), nn.InstanceNorm1d(7) if rank == 1 else nn.ReLU())
    )
    for _ in range(3):
        net(torch.randn(4, 3, *[8] * rank) * 2 + 1)
    net = net.to(getattr(torch, dtype)).float().eval()  # rounded
    state = {name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    for source in (net, state, net.state_dict()):
        layers = cbn.from_torch(source)
        assert list(layers) == ["1", "3.1"]
        assert all(type(layer) is (getattr(cbn, kind) if source is net else cbn.BatchNorm) for layer in layers.values())
        seen = []
        hooks = [
            net.get_submodule(name).register_forward_hook(lambda module, given, y, name=name: seen.append((name, given[0], y)))
            for name in layers
        ]
        with torch.no_grad():
            net(torch.randn(2, 3, *[8] * rank))
        for hook in hooks:
            hook.remove()
        assert len(seen) == 2
        for name, x, y in seen:
            np.testing.assert_allclose(layers[name](x.numpy()), y.numpy(), rtol=1e-5, atol=1e-5)


def test_handed_back():
    layers = {"a": cbn.BatchNorm1d(4, 1e-3, 0.3), "b.c": cbn.BatchNorm1d(4, weight=False), "d": cbn.BatchNorm1d(4, affine=False, momentum=None)}
    x = np.random.default_rng(3).normal(size=(3, 9, 4)).astype(np.float32)
    for layer in layers.values():
        layer(x[0]), layer(x[1])
        if layer.bias is not None:
            layer.bias[...] = [1, 2, 3, 4]
    make = lambda layer: nn.BatchNorm1d(4, layer.eps, layer.momentum, layer.affine)
    module = nn.ModuleDict({"a": make(layers["a"]), "b": nn.ModuleDict({"c": make(layers["b.c"])}), "d": make(layers["d"])})
    module.load_state_dict({name: torch.as_tensor(a) for name, a in cbn.to_torch(layers).items()})
    for mode in (True, False):
        for name, layer in layers.items():
            own = module.get_submodule(name).train(mode)
            perceptron.close(layer.train(mode)(x[2]), own(torch.tensor(x[2])).detach(), 1e-5)
            for key, array in cbn.to_torch({"": layer}).items():
                perceptron.close(array, own.state_dict()[key], 1e-6)
    with pytest.raises(ValueError, match=r"\ta.momentum: expected 0.1, that of the layer, got 0.3"):
        cbn.load_state_dict({"a": cbn.BatchNorm1d(4, 1e-3)}, module, prefix="", strict=True)
    assert layers["a"].load_state_dict(module.get_submodule("a")) == ([], [])
    same_state(layers["a"].state_dict(), {name: a.numpy() for name, a in module.get_submodule("a").state_dict().items()})


def test_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="reads safetensors")
    from safetensors.numpy import load_file

    _, net = network(7)
    net = net.bfloat16()
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    for state in (
        load_file(tmp_path / "net.safetensors"),
        safetensors.load_file(tmp_path / "net.safetensors"),
        torch.load(tmp_path / "net.pt"),
    ):
        for name, layer in cbn.from_torch(state).items():
            for key, array in layer.state_dict().items():
                np.testing.assert_array_equal(array, net.state_dict()[f"{name}.{key}"].double().numpy())


def test_parameters_that_require_gradients():
    module = nn.BatchNorm2d(3)
    layer = cbn.from_torch(dict(module.named_parameters()) | dict(module.named_buffers()))[""]
    np.testing.assert_array_equal(layer.weight, 1)


def test_uninitialized_modules():
    with pytest.raises(ValueError, match=r"Error\(s\) in from_torch:\n\t0: .*uninitialized"):
        cbn.from_torch(nn.Sequential(nn.LazyBatchNorm2d()))


def test_a_module_in_two_places():
    shared = nn.BatchNorm1d(3, eps=1e-3)
    layers = cbn.from_torch(nn.Sequential(shared, nn.ReLU(), shared))
    assert list(layers) == ["0", "2"] and layers["2"].eps == 1e-3
