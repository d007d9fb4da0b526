"""PyTorch's own cases of its BatchNorm modules and function: cbn's layers and functions of the same arguments do the same."""

import re

import numpy as np
import pytest

import cbn

torch = pytest.importorskip("torch", reason="the cases are in PyTorch")
pytest.importorskip("expecttest", reason="PyTorch's module of cases imports it")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

MODULES = {info.name: info for info in module_db if info.name in ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d")}
DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def inputs(info, dtype, training, errors=False):
    torch.manual_seed(0)
    function = info.module_error_inputs_func if errors else info.module_inputs_func
    return function(info, device="cpu", dtype=dtype, requires_grad=not errors, training=training)


def pair(info, module_input, dtype):
    """PyTorch's module and cbn's layer of the same arguments, with the same parameters."""
    constructor = module_input.constructor_input
    module = info.module_cls(*constructor.args, **constructor.kwargs, dtype=dtype)
    layer = getattr(cbn, info.module_cls.__name__)(*constructor.args, **constructor.kwargs, dtype=DTYPES[dtype])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-2, 2)
    layer.load_state_dict({name: tensor.numpy() for name, tensor in module.state_dict().items()})
    return module, layer


def close(actual, expected):
    """To a few roundings of PyTorch's, which sums in float32."""
    expected = expected.detach().numpy()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = 1e-5 if actual.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * (1 + abs(expected).max(initial=0)))


def compare_step(module, layer, x):
    y = module(x)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    module.zero_grad()
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    y.backward(dy)
    given = x.detach().numpy()
    close(layer(given), y)
    close(layer.backward(dy.numpy()), dx)
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            close(getattr(layer, name + "_grad"), getattr(module, name).grad)
    state = layer.state_dict()
    assert list(state) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        close(state[name], tensor)


CASES = [
    pytest.param(name, i, id=f"{name} {module_input.desc or module_input.constructor_input.args}")
    for name, info in MODULES.items()
    for i, module_input in enumerate(inputs(info, torch.float32, True))
]


@pytest.mark.filterwarnings("ignore:.*never updated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, i", CASES)
def test_module_inputs(name, i, training, dtype):
    info = MODULES[name]
    module_input = inputs(info, dtype, training)[i]
    module, layer = pair(info, module_input, dtype)
    x = module_input.forward_input.args[0]
    for step in range(3):
        module.train(training or step == 1), layer.train(training or step == 1)
        compare_step(module, layer, x)


@pytest.mark.parametrize("name", MODULES)
def test_module_error_inputs(name):
    cases = inputs(MODULES[name], torch.float32, True, errors=True)
    assert cases
    for case in cases:
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            layer = getattr(cbn, MODULES[name].module_cls.__name__)(*constructor.args, **constructor.kwargs)
            layer(forward.args[0].numpy())


@pytest.mark.parametrize(
    "shape", [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (2, 5, 4), (2, 5, 4, 4), (2, 5, 1, 1, 1), (1, 3, 1), (1, 3, 1, 1)]
)
@pytest.mark.parametrize("name", MODULES)
def test_errors_have_the_same_words(name, shape):
    """Whatever a module of 3 channels refuses, the layer does, with the same first words; the layer refuses nothing else."""
    x = np.ones(shape, np.float32)
    module, layer = MODULES[name].module_cls(3), getattr(cbn, MODULES[name].module_cls.__name__)(3)
    try:
        module(torch.tensor(x))
    except (ValueError, RuntimeError) as error:
        words = str(error).replace("torch.Size([", "(").replace("])", ")")
        with pytest.raises(ValueError, match="^" + re.escape(words)):
            layer(x)
    else:
        layer(x)


FUNCTION_CASES = list(next(info for info in op_db if info.name == "nn.functional.batch_norm").sample_inputs("cpu", torch.float64))


@pytest.mark.parametrize("sample", FUNCTION_CASES, ids=range(len(FUNCTION_CASES)))
def test_function_inputs(sample):
    tensors = [sample.input, *sample.args]
    arrays = [None if t is None else t.detach().numpy().copy() for t in tensors]
    kwargs = dict(sample.kwargs)
    training = kwargs.get("training", False)
    if arrays[0].ndim < 2 or training and not 0 <= kwargs.get("momentum", 0.1) <= 1:  # cbn is stricter
        with pytest.raises(ValueError, match="^(x|momentum): expected"):
            cbn.batch_norm(*arrays, **kwargs)
        return
    close(cbn.batch_norm(*arrays, **kwargs), torch.nn.functional.batch_norm(*tensors, **kwargs))
    for a, t in zip(arrays[1:3], tensors[1:3], strict=True):
        if t is not None:
            close(a, t)


def test_both_openmp_runtimes_in_one_process():
    """Each library's threads work beside the other's, and change nothing of its results."""
    x = np.random.default_rng(22).standard_normal((8, 64, 56, 56)).astype(np.float32)
    with cbn.num_threads(1):
        expected = cbn.batch_norm_train(x)[0]
    module = torch.nn.BatchNorm2d(64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            close(expected, module(torch.tensor(x)))
            with cbn.num_threads(2):
                np.testing.assert_array_equal(cbn.batch_norm_train(x)[0], expected)
    finally:
        torch.set_num_threads(before)
