"""cbn.torch's modules in the place of PyTorch's: same results, gradients, states and errors, as operators, compiled, and in networks."""

import copy
import io
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import cbn

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")
pytest.importorskip("expecttest", reason="PyTorch's module of cases imports it")
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.common_modules import module_db

import cbn.torch

MODULES = {info.name: info for info in module_db if info.name in ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d")}
ACTIVATIONS = {
    None: lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    ("clip", -0.5, 1.0): lambda y: F.hardtanh(y, -0.5, 1.0),
    ("leaky_relu", 0.1): lambda y: F.leaky_relu(y, 0.1),
    "hard_swish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SHAPES = [(6, 5), (3, 5, 7), (4, 5, 6, 3), (2, 64, 9, 9), (2, 5, 3, 4, 6)]


def ours(name):
    return getattr(cbn.torch, name.removeprefix("nn."))


def layers(shape, dtype=torch.float32, **options):
    """PyTorch's module and cbn's, of the same parameters and running statistics."""
    name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)]
    theirs = getattr(nn, name)(shape[1], dtype=dtype)
    with torch.no_grad():
        theirs.weight.uniform_(-2, 2), theirs.bias.uniform_(-1, 1), theirs.running_mean.uniform_(-1, 1), theirs.running_var.uniform_(0.5, 2)
    module = ours(name)(shape[1], dtype=dtype, **options)
    module.load_state_dict(theirs.state_dict())
    return theirs, module


def close(actual, expected, tolerance=None):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = tolerance or TOLERANCE.get(expected.dtype, 0)
    largest = 1 + (expected.detach().abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance * largest)


def gradients(y, dy, *of):
    return torch.autograd.grad(y, of, dy)


def same_state(actual, expected, tolerance=None):
    assert list(actual.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        close(actual.state_dict()[name], value, tolerance)


def inputs(info, dtype, training, errors=False):
    torch.manual_seed(0)
    function = info.module_error_inputs_func if errors else info.module_inputs_func
    return function(info, device="cpu", dtype=dtype, requires_grad=not errors, training=training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_module_inputs(name, training, dtype):
    info = MODULES[name]
    cases = inputs(info, dtype, training)
    assert cases
    for case in cases:
        constructor, x = case.constructor_input, case.forward_input.args[0]
        theirs, module = (cls(*constructor.args, **constructor.kwargs, dtype=dtype) for cls in (info.module_cls, ours(name)))
        assert isinstance(module, info.module_cls) and repr(module) == repr(theirs)
        same_state(module, theirs)
        for step in range(3):
            theirs.train(training or step == 1), module.train(training or step == 1)
            y = theirs(x)
            dy = torch.linspace(-1, 2, y.numel(), dtype=dtype).reshape(y.shape)
            for actual, expected in zip(
                gradients(module(x), dy, x, *module.parameters()), gradients(y, dy, x, *theirs.parameters()), strict=True
            ):
                close(actual, expected)
            close(module(x), theirs(x))
            same_state(module, theirs)


@pytest.mark.parametrize("name", MODULES)
def test_module_error_inputs(name):
    cases = inputs(MODULES[name], torch.float32, True, errors=True)
    assert cases
    for case in cases:
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            ours(name)(*constructor.args, **constructor.kwargs)(*forward.args)


WRONG_OR_NOT = [
    (2,), (2, 3), (1, 3), (2, 3, 4), (2, 5, 4), (1, 3, 1), (2, 3, 4, 5), (2, 5, 4, 4), (1, 3, 1, 1), (2, 3, 4, 5, 6), (2, 5, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_errors_have_the_same_words(name):
    """Whatever PyTorch's module of 3 channels refuses is refused, with the same first words, and changes nothing."""
    for shape in WRONG_OR_NOT:
        for training in (True, False):
            x = torch.ones(shape)
            theirs, module = MODULES[name].module_cls(3).train(training), ours(name)(3).train(training)
            before = {key: value.clone() for key, value in module.state_dict().items()}
            try:
                theirs(x)
            except (ValueError, RuntimeError) as error:
                words = str(error).replace("torch.Size([", "(").replace("])", ")")
                with pytest.raises(ValueError, match="^" + re.escape(words)):
                    module(x)
                for key, value in module.state_dict().items():
                    assert torch.equal(value, before[key])
            else:
                close(module(x), theirs(x))


def of_layout(x, layout):
    if layout == "channels last" and x.ndim >= 4:
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        return torch.cat([x, x])[::2]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:, :1].expand(x.shape)
    return x


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drawn(shape, dtype, layout):
    """Each activation, with and without a residual, in both modes; parameters of 16-bit inputs are float32 and sometimes theirs."""
    torch.manual_seed(len(shape))
    for i, (activation, apply) in enumerate(ACTIVATIONS.items()):
        own = dtype in (torch.float16, torch.bfloat16) and i % 2
        theirs, module = layers(shape, dtype if own or dtype is torch.float64 else torch.float32, activation=activation)
        x, residual = (of_layout(torch.randn(shape, dtype=dtype), layout).requires_grad_() for _ in range(2))
        dy = torch.randn(shape, dtype=dtype)
        for training in (True, False):
            theirs.train(training), module.train(training)
            added = residual if (i + training) % 3 else None
            # PyTorch rounds to 16 bits between the steps, so it is asked in float64, with parameters of the same values.
            wide = copy.deepcopy(theirs).double()
            wx, wr = (t.detach().double().requires_grad_() for t in (x, residual))
            z = wide(wx) if added is None else wide(wx) + wr
            expected = apply(z)
            y = module(x, residual=added)
            theirs(x)
            assert y.stride() == torch.empty_like(x).stride()
            close(y, expected.to(dtype))
            # Off the corners, where rounding decides.
            keep = (z.detach()[..., None] - torch.tensor([0, 3, 6, -3, -0.5, 1.0])).abs().amin(-1) > 1e-2
            given = (dy * keep).to(dtype)
            of = (x, *module.parameters()) + (() if added is None else (residual,))
            wide_of = (wx, *wide.parameters()) + (() if added is None else (wr,))
            of_y = gradients(y, given, *of)
            assert of_y[0].stride() == torch.empty_like(x).stride()
            for actual, wanted in zip(of_y, gradients(expected, given.double(), *wide_of), strict=True):
                close(actual, wanted.to(actual.dtype), TOLERANCE[dtype] * 4)
            same_state(module, theirs)
            module.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_bits_are_those_of_the_layers(momentum):
    x, dy = torch.randn(2, 4, 6, 8, 8), torch.randn(4, 6, 8, 8)
    module, layer = cbn.torch.BatchNorm2d(6, momentum=momentum, activation="silu"), cbn.BatchNorm2d(6, momentum=momentum, activation="silu")
    for one in x:
        one.requires_grad_()
        dx, weight_grad, bias_grad = gradients(module(one), dy, one, *module.parameters())
        layer(one.detach())
        np.testing.assert_array_equal(dx, layer.backward(dy))
        np.testing.assert_array_equal(weight_grad, layer.weight_grad)
        np.testing.assert_array_equal(bias_grad, layer.bias_grad)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(module.state_dict()[name].numpy(), value)
    np.testing.assert_array_equal(module.eval()(one).detach(), layer.eval()(one.detach()))


OPTIONS = [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"bias": False}, {"eps": 1e-2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    theirs, module = nn.BatchNorm2d(3, **options), cbn.torch.BatchNorm2d(3, **options)
    for step in range(5):
        theirs.train(step % 3 < 2), module.train(step % 3 < 2)
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        for actual, expected in zip(
            gradients(module(x), x.detach(), x, *module.parameters()), gradients(theirs(x), x.detach(), x, *theirs.parameters()), strict=True
        ):
            close(actual, expected)
        same_state(module, theirs)


def test_statistics_taken_away():
    """In eval mode the batch's are used then, as in PyTorch, and nothing is counted."""
    theirs, module = nn.BatchNorm2d(3).eval(), cbn.torch.BatchNorm2d(3).eval()
    for layer in (theirs, module):
        layer.running_mean = layer.running_var = None
    x = torch.randn(4, 3, 5, 5)
    close(module(x), theirs(x))
    same_state(module, theirs)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_empty(shape, training):
    theirs, module = nn.BatchNorm2d(3).train(training), cbn.torch.BatchNorm2d(3, activation="relu").train(training)
    x = torch.zeros(shape, requires_grad=True)
    for actual, expected in zip(
        gradients(module(x), x.detach(), x, *module.parameters()), gradients(theirs(x), x.detach(), x, *theirs.parameters()), strict=True
    ):
        assert torch.equal(actual, expected)
    same_state(module, theirs)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradcheck(activation, training, residual):
    torch.manual_seed(3)
    module = cbn.torch.BatchNorm2d(3, dtype=torch.float64, activation=activation).train(training)
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x).requires_grad_() if residual else None
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, weight, bias, *r):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x, *r))

    assert torch.autograd.gradcheck(call, (x, weight, bias) + ((r,) if residual else ()), fast_mode=False)


def test_frozen_affine():
    """Of what needs no gradient there is none; eval mode with fixed parameters gives that of the input, which it doesn't keep."""
    theirs, module = layers((4, 3, 5, 5))
    for layer in (theirs, module):
        layer.eval().requires_grad_(False)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = module(x)
    assert not any(t is not None and t.shape == x.shape for t in y.grad_fn.saved_tensors)
    close(gradients(y, x.detach(), x)[0], gradients(theirs(x), x.detach(), x)[0])
    module.train().requires_grad_(True)
    y = module(x.detach())
    y.backward(x.detach())
    assert module.weight.grad is not None and x.grad is None


def test_double_backward_is_refused():
    for training in (True, False):
        module = cbn.torch.BatchNorm2d(3).train(training)
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"cbn::batch_norm_backward: .*double backward"):
            dx.sum().backward()


def test_function_transforms_are_refused():
    module = cbn.torch.BatchNorm2d(3).eval()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: module(x).sum())(torch.randn(4, 3, 5, 5))


def test_changes_are_noticed():
    module = cbn.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    given = x * 1
    y = module(given)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    before = module.running_mean._version
    module(x)
    assert module.running_mean._version == before + 1


def test_training_between_forward_and_backward():
    """Gradients by running statistics are by those of the call."""
    module = cbn.torch.BatchNorm2d(3).eval()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = module(x)
    expected = gradients(module(x), x.detach(), x, *module.parameters())
    module.train()(x)
    for actual, wanted in zip(gradients(y, x.detach(), x, *module.parameters()), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype, layout, activation, added", [
    (torch.float32, "contiguous", ("relu", []), True),
    (torch.float32, "channels last", (None, []), True),
    (torch.float64, "transposed", ("clip", [-0.5, 1.0]), False),
    (torch.bfloat16, "channels last", (None, []), False),
])  # fmt: skip
def test_operators(dtype, layout, activation, added):
    torch.manual_seed(7)
    x, r, dy = (of_layout(torch.randn(3, 4, 5, 2, dtype=dtype), layout) for _ in range(3))
    weight, bias, mean, var = (t.clone() for t in torch.rand(4, 4, dtype=torch.float64 if dtype is torch.float64 else torch.float32))
    after = 1e-5, *activation
    r = r if added else None
    for flags in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(torch.ops.cbn.batch_norm_backward.default, (dy, x, mean.double(), var.double(), weight, bias, r, *flags, *after),
                              test_utils=("test_schema", "test_faketensor"))
    for t in (x, weight, bias):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.cbn.batch_norm.default, (x, mean, var, weight, bias, r, *after))
    train = torch.ops.cbn.batch_norm_train.default
    torch.library.opcheck(train, (x, mean, var, torch.tensor(2), weight, bias, r, 0.1, *after))
    torch.library.opcheck(train, (x, None, None, None, weight, None, r, None, *after))
    y, *statistics = train(x, None, None, None, weight, None, r, None, *after)
    assert y.requires_grad and not any(t.requires_grad for t in statistics)
    written = [argument.name for argument in train._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == ["running_mean", "running_var", "num_batches_tracked"]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile(momentum):
    """Without a break in the graph, in both modes and for other batch sizes: the bits are the same."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = cbn.torch.BatchNorm2d(4, momentum=momentum, activation="relu")
            self.second = cbn.torch.BatchNorm2d(4, momentum=momentum, activation=("leaky_relu", 0.1))

        def forward(self, x):
            return self.second(self.first(x * 2), residual=x)

    eager = Block()
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True)
    for training, n in ((True, 3), (True, 5), (False, 5), (True, 3)):
        eager.train(training), compiled.train(training)
        x = of_layout(torch.randn(n, 4, 6, 6), "channels last" if n == 5 else "contiguous").requires_grad_()
        y, z = eager(x), call(x)
        assert torch.equal(y, z)
        for actual, expected in zip(
            gradients(z, x.detach(), x, *compiled.parameters()), gradients(y, x.detach(), x, *eager.parameters()), strict=True
        ):
            close(actual, expected)
        for name, value in eager.state_dict().items():
            assert torch.equal(compiled.state_dict()[name], value)


def test_states_go_both_ways_and_copies_work():
    theirs, module = layers((4, 3, 5, 5), activation="relu")
    x = torch.randn(4, 3, 5, 5)
    module(x)
    theirs.load_state_dict(module.state_dict())
    same_state(module, theirs, 1e-30)
    old = {name: value for name, value in theirs.state_dict().items() if name != "num_batches_tracked"}
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})
    module.load_state_dict(old)  # as PyTorch before 0.4.1 wrote them
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False), copy.copy(module)):
        assert type(other) is cbn.torch.BatchNorm2d and other.activation == "relu"
        assert torch.equal(other.eval()(x), module.eval()(x))
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.running_mean.dtype is torch.bfloat16 and half(x.bfloat16()).dtype is torch.bfloat16
    assert repr(module) == "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, activation='relu')"


def test_other_devices_and_exports_are_left_to_pytorch():
    module = cbn.torch.BatchNorm2d(3, activation=("clip", 0.0, 1.0)).eval()
    x = torch.randn(2, 3, 4, 4)
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == x.shape
    with pytest.raises(RuntimeError, match="device"):
        copy.deepcopy(module).to("meta")(x)
    exported = torch.export.export(module, (x,))
    assert not any("cbn" in str(node.target) for node in exported.graph.nodes)
    close(exported.module()(x), module(x))


def test_checkpoints_and_traces():
    module = cbn.torch.BatchNorm2d(3, activation="relu", momentum=0.0)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    expected = gradients(module(x), x.detach(), x)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    for actual, wanted in zip(gradients(y, x.detach(), x), expected, strict=True):
        assert torch.equal(actual, wanted)
    module.eval()
    traced = torch.jit.trace(module, x.detach())
    other = torch.randn(5, 3, 2, 2)
    assert torch.equal(traced(other), module(other))
    with torch.inference_mode():
        assert torch.equal(module(other), module(other.clone()))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="^activation: expected None, 'relu'.*got 'gelu'"):
        cbn.torch.BatchNorm2d(3, activation="gelu")
    module, x = cbn.torch.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"^residual: expected shape \(2, 3, 4, 4\), that of x, got \(3, 4, 4\)"):
        module(x, residual=x[0])
    with pytest.raises(TypeError, match="^residual: expected dtype float32"):
        module(x, residual=x.double())
    with pytest.raises(TypeError, match="^x: expected an array of float16"):
        module(x.int())
    assert module.num_batches_tracked == 0


def drawn_network(rng):
    """A sequence of linear layers, normalizations and what may follow them, nested now and then; with its input's shape."""
    kinds = [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.3, 0.7), nn.LeakyReLU(0.2), nn.Hardswish(), nn.Sigmoid(), nn.SiLU(),
             nn.Tanh(), nn.Identity(), nn.Dropout(0.0)]
    spatial = int(rng.integers(3))
    conv, norm = [(nn.Linear, nn.BatchNorm1d), (nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d)][spatial]
    shape, layers, channels = (6, 4) + (5,) * spatial, [], 4
    for _ in range(int(rng.integers(1, 4))):
        outputs = int(rng.integers(3, 7))
        block = [conv(channels, outputs, *[1] * (spatial > 0)), norm(outputs, momentum=rng.choice([0.1, 0.5]), affine=bool(rng.integers(2)))]
        block += [kinds[rng.integers(len(kinds))] for _ in range(rng.integers(3))]
        layers += [nn.Sequential(*block)] if rng.integers(2) else block
        channels = outputs
    return nn.Sequential(*layers), shape


@pytest.mark.parametrize("seed", range(40))
def test_convert_keeps_what_a_network_does(seed):
    """Outputs, gradients and running statistics, with an optimizer that was made before, and state dicts in both directions."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network, shape = drawn_network(rng)
    converted = copy.deepcopy(network)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (network, converted)]
    modules = dict(converted.named_modules(remove_duplicate=False))
    assert cbn.torch.convert(converted) is converted
    for name, module in converted.named_modules(remove_duplicate=False):
        assert module is modules[name] or type(module) is nn.Identity
        assert type(module) not in cbn.torch._SWAPPED
    assert not any(isinstance(a, cbn.torch._Layer) and a.activation is None and type(b) in cbn.torch._JOINED
                   for net in converted.modules() if isinstance(net, nn.Sequential) for a, b in zip(net, list(net)[1:], strict=False))
    for step in range(5):
        x = torch.randn(shape)
        network.train(step != 3), converted.train(step != 3)
        results = []
        for net, optimizer in zip((network, converted), optimizers, strict=True):
            y = net(x)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
            results.append(y)
        close(results[1], results[0], 1e-4)
        same_state(converted, network, 1e-4)
    network.load_state_dict(converted.state_dict()), converted.load_state_dict(network.state_dict())
    close(converted.eval()(x), network.eval()(x))
    before = repr(converted)
    assert repr(cbn.torch.convert(converted)) == before


def test_convert_leaves_what_it_cannot_know():
    class Own(nn.BatchNorm1d):
        pass

    class Uses(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x) + 1)

    def activations(network, **options):
        cbn.torch.convert(network, **options)
        return [module.activation for module in network.modules() if isinstance(module, cbn.torch._Layer)]

    own = cbn.torch.convert(nn.Sequential(Own(3), nn.ReLU(), nn.LazyBatchNorm1d(), nn.InstanceNorm1d(3)))
    assert [type(module) for module in own] == [Own, nn.ReLU, nn.LazyBatchNorm1d, nn.InstanceNorm1d]
    assert activations(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())) == ["relu"]
    assert activations(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), join=False) == [None]
    assert activations(nn.Sequential(nn.BatchNorm1d(3), nn.GELU(), nn.BatchNorm1d(3), nn.Dropout(), nn.ReLU())) == [None, None]
    assert activations(Uses(nn.BatchNorm1d(3), nn.ReLU())) == [None]
    assert activations(nn.Sequential(cbn.torch.BatchNorm1d(3, activation="sigmoid"), nn.ReLU())) == ["sigmoid"]
    shared = nn.BatchNorm1d(3)
    assert activations(nn.ModuleList([nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared)])) == [None]
    relu = nn.ReLU()
    twice = nn.Sequential(nn.BatchNorm1d(3), relu, nn.Linear(3, 3), relu, nn.BatchNorm1d(3), relu)
    assert activations(twice) == ["relu", "relu"] and twice[3] is relu
    for hook in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        for i in range(2):
            network = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
            getattr(network[i], hook)(lambda *_: None)
            assert activations(network) == [None]
    patched = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    patched[1].forward = torch.tanh
    assert activations(patched) == [None]
    patched[0].forward = torch.tanh
    norm = cbn.torch.convert(nn.BatchNorm2d(3, momentum=None, bias=False))
    assert type(norm) is cbn.torch.BatchNorm2d and norm(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(TypeError, match="^join: expected True or False"):
        cbn.torch.convert(norm, join=0)
    with pytest.raises(TypeError, match="^module: expected a torch.nn.Module, got list"):
        cbn.torch.convert([norm])


@pytest.fixture
def one_thread():
    """As idle threads of two libraries would spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with cbn.num_threads(1):
        yield
    torch.set_num_threads(before)


def test_resnet18_trains_as_with_pytorchs_own(one_thread, monkeypatch):
    """100 steps in float64, whose roundings stay small: with a tenth of the losses' digits to spare. In float32 those of the first steps."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import torch_resnet18 as example

    monkeypatch.setattr(example, "BATCH", 8)
    rng = torch.Generator().manual_seed(1)
    x, labels = torch.randn(64, 1, example.PIXELS, example.PIXELS, generator=rng), torch.randint(10, (64,), generator=rng)
    theirs, converted, fused = example.KINDS
    for dtype, steps, tolerance in ((torch.float64, 100, 1e-9), (torch.float32, 3, 1e-4)):
        expected = example.train(theirs, x, labels, steps, dtype=dtype)[1]
        losses = example.train(fused, x, labels, steps, dtype=dtype)[1]
        assert expected[-1] < expected[0] / (100 if steps == 100 else 1)
        np.testing.assert_allclose(losses, expected, rtol=tolerance)
        assert example.train(converted, x, labels, 3, dtype=dtype)[1] == losses[:3]
