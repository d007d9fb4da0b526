"""A folded layer does what the layer and its batch normalization do, in any order of the weight's axes; what cannot be folded is an error."""

import copy
import itertools

import numpy as np
import pytest
import reference
from reference import check

import cbn
from cbn.folding import rounded

# Shapes of weights, the arguments that say what the axes are, and the channels in and out: numbers that tell the axes apart where they can.
CONVOLUTIONS = {
    "1d": ((6, 4, 3), {}, 4, 6),
    "2d": ((6, 4, 3, 2), {}, 4, 6),
    "3d": ((6, 4, 2, 3, 1), {}, 4, 6),
    "grouped": ((6, 4, 3, 2), {"groups": 2}, 8, 6),
    "depthwise": ((4, 1, 3, 2), {"groups": 4}, 4, 4),
    "depthwise, multiplier": ((12, 1, 3), {"groups": 4}, 4, 12),
    "tensorflow 1d": ((3, 4, 6), {"order": "tensorflow"}, 4, 6),
    "tensorflow 2d": ((3, 2, 4, 6), {"order": "tensorflow"}, 4, 6),
    "tensorflow 3d": ((2, 3, 1, 4, 6), {"order": "tensorflow"}, 4, 6),
    "tensorflow grouped": ((3, 2, 4, 6), {"order": "tensorflow", "groups": 2}, 8, 6),
    "tensorflow depthwise 1d": ((3, 4, 3), {"order": "tensorflow_depthwise"}, 4, 12),
    "tensorflow depthwise 2d": ((3, 2, 4, 3), {"order": "tensorflow_depthwise"}, 4, 12),
}
TRANSPOSED = {
    "transposed 1d": ((4, 6, 3), {"transposed": True}, 4, 6),
    "transposed 2d": ((4, 6, 3, 2), {"transposed": True}, 4, 6),
    "transposed 3d": ((4, 6, 2, 3, 1), {"transposed": True}, 4, 6),
    "transposed grouped": ((4, 3, 3, 2), {"transposed": True, "groups": 2}, 4, 6),
    "transposed depthwise": ((4, 1, 3, 2), {"transposed": True, "groups": 4}, 4, 4),
    "tensorflow transposed 1d": ((3, 6, 4), {"transposed": True, "order": "tensorflow"}, 4, 6),
    "tensorflow transposed 3d": ((2, 3, 1, 6, 4), {"transposed": True, "order": "tensorflow"}, 4, 6),
}
LINEAR = {"linear": ((6, 4), {}, 4, 6), "tensorflow linear": ((4, 6), {"order": "tensorflow"}, 4, 6)}
LAYERS = CONVOLUTIONS | TRANSPOSED | LINEAR
BEFORE = CONVOLUTIONS | LINEAR  # where a bn before the layer can be folded


def dense(weight, inputs, outputs, order="torch", groups=1, transposed=False):
    """The weight without groups, as each framework's documentation says what its elements do: an array of shape (*kernel, in, out)."""
    kernel = weight.shape[2:] if order == "torch" else weight.shape[:-2]
    if order == "tensorflow_depthwise":
        groups = inputs
    i_group, o_group = inputs // groups, outputs // groups
    taps = np.zeros((*kernel, inputs, outputs), weight.dtype)
    for i, o in itertools.product(range(inputs), range(outputs)):
        if i // i_group != o // o_group:
            continue
        taps[..., i, o] = {
            ("torch", False): lambda i, o: weight[o, i % i_group],
            ("torch", True): lambda i, o: weight[i, o % o_group],
            ("tensorflow", False): lambda i, o: weight[..., i % i_group, o],
            ("tensorflow", True): lambda i, o: weight[..., o, i],
            ("tensorflow_depthwise", False): lambda i, o: weight[..., i, o % o_group],
        }[order, transposed](i, o)
    return taps


def convolve(x, taps, stride=1):
    """x (N, *space, in) and taps (*kernel, in, out): the sum over the taps, each applied to its window of x. Without space: x @ taps."""
    kernel = taps.shape[:-2]
    space = [(n - k) // stride + 1 for n, k in zip(x.shape[1:-1], kernel, strict=True)]
    y = np.zeros((len(x), *space, taps.shape[-1]), x.dtype)
    for tap in np.ndindex(kernel):
        window = tuple(slice(t, t + (n - 1) * stride + 1, stride) for t, n in zip(tap, space, strict=True))
        y += x[(slice(None), *window)] @ taps[tap]
    return y


def convolve_transposed(x, taps, stride=2):
    """x (N, *space, in) and taps (*kernel, in, out): each tap adds to its window of the result."""
    kernel = taps.shape[:-2]
    y = np.zeros((len(x), *((n - 1) * stride + k for n, k in zip(x.shape[1:-1], kernel, strict=True)), taps.shape[-1]), x.dtype)
    for tap in np.ndindex(kernel):
        window = tuple(slice(t, t + (n - 1) * stride + 1, stride) for t, n in zip(tap, x.shape[1:-1], strict=True))
        y[(slice(None), *window)] += x @ taps[tap]
    return y


def pad(x, values, amount=1):
    """x (N, *space, C) with a border of values, one for each channel."""
    padded = np.empty((len(x), *(n + 2 * amount for n in x.shape[1:-1]), x.shape[-1]), x.dtype)
    padded[...] = values
    padded[(slice(None), *(slice(amount, -amount) for _ in x.shape[1:-1]))] = x
    return padded


def fold(weight, bias, bn, **arguments):
    return (cbn.fold_linear if weight.ndim == 2 else cbn.fold_conv)(weight, bias, bn, **arguments)


def rng():
    return np.random.default_rng(31)


def trained(channels, dtype=np.float64, affine=True, seed=32):
    """A layer in eval mode with statistics and parameters unlike the first ones, and unlike each other."""
    values = np.random.default_rng(seed)
    bn = cbn.BatchNorm(channels, 1e-3, affine=affine, dtype=dtype).eval()
    bn.running_mean[...], bn.running_var[...] = values.normal(1, 2, channels), values.uniform(0.1, 4, channels)
    bn.num_batches_tracked[...] = 1
    if affine:
        bn.weight[...], bn.bias[...] = values.standard_normal((2, channels))
    return bn


def values_of(bn):
    return bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps


def formula(x, bn, axis=-1):
    """bn at inference, in the widest type."""
    return reference.batch_norm(x, *values_of(bn), axis=axis)


def scaled(taps, bn, axis):
    """Taps times bn's scale of each channel on an axis, in the widest type."""
    return reference.batch_norm(taps, 0, bn.running_var, bn.weight, None, bn.eps, axis)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * abs(b).max())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_after(layer, with_bias, affine):
    shape, arguments, inputs, outputs = LAYERS[layer]
    weight = rng().standard_normal(shape)
    bias = rng().standard_normal(outputs) if with_bias else None
    bn = trained(outputs, affine=affine)
    x = rng().standard_normal((2, *[5, 4, 6][: max(0, len(shape) - 2)], inputs))
    apply = convolve_transposed if arguments.get("transposed") else convolve

    y = apply(x, dense(weight, inputs, outputs, **arguments)) + (bias if with_bias else 0)
    folded = fold(weight, bias, bn, **arguments)
    actual = apply(x, dense(folded.weight, inputs, outputs, **arguments)) + folded.bias
    close(actual, cbn.batch_norm(y, *values_of(bn)[:4], eps=bn.eps, axis=-1))
    close(actual, formula(y, bn))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layer", BEFORE)
def test_before(layer, with_bias, affine):
    shape, arguments, inputs, outputs = LAYERS[layer]
    weight = rng().standard_normal(shape)
    bias = rng().standard_normal(outputs) if with_bias else None
    bn = trained(inputs, affine=affine)
    x = rng().standard_normal((2, *[5, 4, 6][: max(0, len(shape) - 2)], inputs))

    expected = convolve(cbn.batch_norm(x, *values_of(bn)[:4], eps=bn.eps, axis=-1), dense(weight, inputs, outputs, **arguments), 1)
    expected += bias if with_bias else 0
    folded = fold(weight, bias, bn, before=True, **arguments, **({"padding": 0} if layer in CONVOLUTIONS else {}))
    close(convolve(x, dense(folded.weight, inputs, outputs, **arguments), 1) + folded.bias, expected)


@pytest.mark.parametrize("parameters", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("layer, before", [(layer, False) for layer in LAYERS] + [(layer, True) for layer in BEFORE])
def test_rounded_once(layer, before, dtype, parameters):
    """Weight and bias are those of the formula in a wider type, rounded: exactly so where that type is wider than float64."""
    shape, arguments, inputs, outputs = LAYERS[layer]
    weight, bias = rng().standard_normal(shape).astype(dtype), rng().standard_normal(outputs).astype(parameters)
    bn = trained(inputs if before else outputs, parameters)
    folded = fold(weight, bias, bn, before=before, **arguments, **({"padding": 0} if before and layer in CONVOLUTIONS else {}))
    taps = dense(weight, inputs, outputs, **arguments)
    if before:
        shift = formula(np.zeros((1, inputs)), bn)[0]
        expected = scaled(taps, bn, -2), bias + (taps * shift[:, None]).sum(tuple(range(taps.ndim - 1)))
    else:
        expected = scaled(taps, bn, -1), formula(bias[None], bn)[0]
    native = np.dtype(dtype).newbyteorder("=")
    assert folded.weight.dtype == folded.bias.dtype == native and folded.weight.dtype.isnative
    assert folded.weight.shape == shape and folded.bias.shape == (outputs,)
    actual = dense(folded.weight, inputs, outputs, **arguments)
    if native == np.float64:
        check(actual, expected[0], expected[0], 2)
        check(folded.bias, expected[1], abs(expected[1]).max(), 16)  # a sum: relative to what it sums
    else:
        np.testing.assert_array_equal(actual, expected[0].astype(native))
        np.testing.assert_array_equal(folded.bias, expected[1].astype(native))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_float64_formula_to_the_bit(dtype):
    weight, bias, bn = rng().standard_normal((6, 4, 3)).astype(dtype), rng().standard_normal(6).astype(dtype), trained(6, dtype)
    mean, var, bn_weight, bn_bias = (a.astype(np.float64) for a in values_of(bn)[:4])
    scale = bn_weight / np.sqrt(var + bn.eps)
    folded = cbn.fold_conv(weight, bias, bn)
    np.testing.assert_array_equal(folded.weight, (weight.astype(np.float64) * scale[:, None, None]).astype(dtype), strict=True)
    np.testing.assert_array_equal(folded.bias, ((bias - mean) * scale + bn_bias).astype(dtype), strict=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_any_memory_order(layer):
    """Reversed, transposed and read-only weights give the bits of contiguous ones; results are the caller's own, and arguments stay as they were."""
    shape, arguments, _, outputs = LAYERS[layer]
    weight, bias, bn = rng().standard_normal(shape), rng().standard_normal(outputs), trained(outputs)
    before = weight.copy(), bias.copy(), copy.deepcopy(bn).state_dict()
    expected = fold(weight, bias, bn, **arguments)
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(bias, before[1])
    for name, array in bn.state_dict().items():
        np.testing.assert_array_equal(array, before[2][name])
    reversed_ = np.flip(np.flip(weight).copy())
    read_only = weight.copy()
    read_only.flags.writeable = False
    for view in (reversed_, np.asfortranarray(weight), read_only, weight.view(np.recarray)):
        folded = fold(view, bias, bn, **arguments)
        np.testing.assert_array_equal(folded.weight, expected.weight)
        np.testing.assert_array_equal(folded.bias, expected.bias)
        assert type(folded.weight) is np.ndarray and folded.weight.flags.c_contiguous and folded.weight.flags.writeable
    for result in expected[:2]:
        assert not any(np.may_share_memory(result, a) for a in (weight, bias, *values_of(bn)[:4]))


@pytest.mark.parametrize("mode", [True, False])
def test_tuple_of_a_layers_values(mode):
    """A tuple is as the layer, in whatever mode that is; parameters that it lacks are ones and zeros."""
    weight = rng().standard_normal((6, 4, 3))
    bn = trained(6).train(mode)
    expected = cbn.fold_conv(weight, None, bn)
    for a, b in zip(cbn.fold_conv(weight, np.zeros(6, int), values_of(bn)), expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    ones = np.ones(6, np.float32), np.zeros(6, np.int8)
    for a, b in zip(
        cbn.fold_conv(weight, None, (bn.running_mean, bn.running_var, None, None, np.float32(0.5))),
        cbn.fold_conv(weight, None, (bn.running_mean, bn.running_var, *ones, 0.5)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, strict=True)


def test_change():
    """The largest |scale - 1|: exact numbers, of scales that are."""
    weight, zeros = np.ones((3, 2, 1), np.float32), np.zeros(3)
    for var, bn_weight, expected in [
        ([1, 1, 1], None, 0),
        ([1, 4, 1], None, 0.5),
        ([1, 0.0625, 4], None, 3),
        ([1, 1, 1], [1, -2, 2], 3),
        ([1, 1, 1], [1, 0, 1], 1),
    ]:
        folded = cbn.fold_conv(weight, None, (zeros, np.array(var), bn_weight and np.array(bn_weight), None, 0))
        assert type(folded.change) is float and folded.change == expected
    assert cbn.fold_conv(weight, None, (zeros, zeros, None, None, 1e-6)).change == pytest.approx(999)
    assert np.isnan(cbn.fold_conv(weight, None, (zeros, np.array([1, np.nan, 1]), None, None, 0)).change)
    assert cbn.fold_conv(weight[:0], None, cbn.BatchNorm(0)).change == 0


def test_a_poisoned_channel_is_alone():
    bn = trained(6)
    bn.running_var[2] = np.nan
    bn.running_mean[4] = np.inf
    folded = cbn.fold_conv(np.ones((6, 4, 3)), None, bn)
    assert np.isnan(folded.weight).all((1, 2)).tolist() == [c == 2 for c in range(6)]
    assert np.isfinite(folded.bias).tolist() == [c not in (2, 4) for c in range(6)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_overflow_is_infinity_and_a_warning(dtype):
    top = np.finfo(dtype).max
    with pytest.warns(RuntimeWarning, match="overflow"):
        folded = cbn.fold_linear(np.array([[top], [1]], dtype), None, (np.zeros(2), np.full(2, 0.25), None, None, 0))
    np.testing.assert_array_equal(folded.weight, np.array([[np.inf], [2]], dtype), strict=True)


SAMPLES = {"1d": (2, 8, 4), "2d": (2, 8, 7, 4), "3d": (2, 6, 5, 4, 4), "tensorflow 2d": (2, 8, 7, 4)}


@pytest.mark.parametrize("layer", SAMPLES)
def test_zeros_beside_an_input_that_is_shifted(layer):
    """A bn before padding by zeros is refused, unless it shifts by 0; padding with what it makes 0 of, as the error advises, is exact."""
    shape, arguments, inputs, outputs = LAYERS[layer]
    weight, bias, bn = rng().standard_normal(shape), rng().standard_normal(outputs), trained(inputs)
    x = rng().standard_normal(SAMPLES[layer])

    def expected():
        return convolve(pad(formula(x, bn).astype(np.float64), 0), dense(weight, inputs, outputs, **arguments)) + bias

    def actual(border, padding):
        folded = cbn.fold_conv(weight, bias, bn, before=True, padding=padding, **arguments)
        return convolve(pad(x, border), dense(folded.weight, inputs, outputs, **arguments)) + folded.bias

    for padding in (1, (1,), [[0, 1]], np.ones(2, int), "same", "causal"):
        with pytest.raises(ValueError, match=r"^before: expected a bn whose shift.* is 0 in all channels, or a convolution without padding, got padd"):
            actual(0, padding)
    scale = bn.weight / np.sqrt(bn.running_var + bn.eps)
    close(actual(bn.running_mean - bn.bias / scale, 0), expected())
    assert abs(actual(0, 0) - expected()).max() > 0.1  # what is refused is wrong

    bn.bias[...], bn.running_mean[...] = 0, 0
    close(actual(0, 1), expected())
    bn.running_mean[-1] = 1e-3
    with pytest.raises(ValueError, match="^before: expected a bn whose shift"):
        actual(0, 1)


@pytest.mark.parametrize(
    "shape, order, paddings",
    [
        ((6, 4, 1, 1), "torch", ["same", "valid", "causal", (0, 0), np.int64(0)]),
        ((1, 1, 4, 6), "tensorflow", ["same", "valid", "causal", ((0, 0), (0, 0))]),
        ((6, 4, 3, 2), "torch", ["valid", [0, 0]]),
    ],
)
def test_paddings_that_pad_nothing(shape, order, paddings):
    """Among them is what "same" is for a kernel of 1."""
    weight, bn = rng().standard_normal(shape), trained(4)
    expected = cbn.fold_conv(weight, None, bn, order=order, before=True, padding=0)
    for padding in paddings:
        np.testing.assert_array_equal(cbn.fold_conv(weight, None, bn, order=order, before=True, padding=padding).bias, expected.bias)


@pytest.mark.parametrize("layer", TRANSPOSED)
def test_before_a_transposed_convolution(layer):
    """Refused, unless bn shifts by 0."""
    shape, arguments, inputs, outputs = LAYERS[layer]
    weight, bias, bn = rng().standard_normal(shape), rng().standard_normal(outputs), trained(inputs)
    with pytest.raises(ValueError, match="^before: .* each output of a transposed convolution"):
        cbn.fold_conv(weight, bias, bn, before=True, **arguments)
    bn.running_mean[...], bn.bias[...] = 0, 0
    folded = cbn.fold_conv(weight, bias, bn, before=True, **arguments)
    x = rng().standard_normal((2, *[5, 4, 6][: len(shape) - 2], inputs))
    expected = convolve_transposed(formula(x, bn).astype(np.float64), dense(weight, inputs, outputs, **arguments))
    close(convolve_transposed(x, dense(folded.weight, inputs, outputs, **arguments)), expected)
    np.testing.assert_array_equal(folded.bias, bias)


def relu(x):
    return np.maximum(x, 0)


def network(kernel, before, seed, depth=20, width=16):
    """Input and layers (weight, bias, bn) of a float32 network, each bn in eval mode with the statistics of what reaches it.

    Biases of mean 1 leave most units on. With mean 0, each ReLU takes a channel's mean and half of its values, the next bn scales up what is
    left, and rounding errors grow, by layer, so much that float32 is 1e-5 off float64 after 20 layers, folded or not.
    """
    values = np.random.default_rng(seed)
    x = values.normal(0.5, 2, (2, 44, 44, width) if kernel else (64, width)).astype(np.float32)
    layers, y = [], x
    for i in range(depth):
        weight = values.normal(0, (width * np.prod(kernel)) ** -0.5, (width, width, *kernel)).astype(np.float32)
        bias = values.normal(before, 0.5, width).astype(np.float32) if before or i % 2 else None
        bn = cbn.BatchNorm(width, momentum=1.0, axis=-1)
        bn.weight[...], bn.bias[...] = values.uniform(0.5, 1.5, width), values.normal(not before, 0.5, width)
        layers.append((weight, bias, bn))
        run(layers[-1:], y, before)
        bn.eval()
        y = run(layers[-1:], y, before)
    return x, layers


def run(layers, x, before=False):
    """In the type of x. Layers without a bn are folded ones."""
    for weight, bias, bn in layers:
        x = bn(x) if bn and before else x
        x = convolve(x, dense(weight, weight.shape[1], weight.shape[0]).astype(x.dtype), 1) + (0 if bias is None else bias)
        x = relu(bn(x) if bn and not before else x)
    return x


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3), ()], ids=["convolution", "linear"])
def test_network(kernel, before, seed):
    """Twenty layers with a ReLU each do the same with every bn folded, and folding costs no accuracy, as the 2-norm of the output has it."""
    x, layers = network(kernel, before, seed)
    padding = {"padding": 0} if kernel and before else {}

    def folded(dtype):
        return [(*fold(w.astype(dtype), b, bn, before=before, **padding)[:2], None) for w, b, bn in layers]

    def distance(y, expected):
        return np.linalg.norm(y - expected.astype(np.float64)) / np.linalg.norm(expected.astype(np.float64))

    exact, plain = run(layers, x.astype(np.float64), before), run(layers, x, before)
    assert plain.dtype == np.float32 and plain.shape == (len(x), *(4 for _ in kernel), 16) and plain.std((0, -1)).min() > 0.1
    actual = run(folded(np.float32), x)
    assert actual.dtype == np.float32
    assert distance(run(folded(np.float64), x.astype(np.float64)), exact) < 1e-13
    assert distance(actual, plain) < 1e-5
    assert distance(actual, exact) < 3 * distance(plain, exact)


MODULES = {
    "1d": ("Conv1d", (4, 6, 3), {}),
    "2d": ("Conv2d", (4, 6, (3, 2)), {"padding": 1, "stride": 2}),
    "3d": ("Conv3d", (4, 6, (2, 3, 1)), {"dilation": 2}),
    "without bias": ("Conv2d", (4, 6, 3), {"bias": False, "padding": "same"}),
    "grouped": ("Conv2d", (8, 6, (3, 2)), {"groups": 2}),
    "depthwise": ("Conv2d", (4, 12, 3), {"groups": 4, "padding_mode": "reflect", "padding": 1}),
    "transposed 1d": ("ConvTranspose1d", (4, 6, 3), {"stride": 2}),
    "transposed 2d": ("ConvTranspose2d", (4, 6, (3, 2)), {"padding": 1, "bias": False}),
    "transposed 3d": ("ConvTranspose3d", (4, 6, (2, 3, 1)), {}),
    "transposed grouped": ("ConvTranspose2d", (4, 6, (3, 2)), {"groups": 2, "stride": 2, "output_padding": 1}),
    "linear": ("Linear", (4, 6), {}),
    "linear without bias": ("Linear", (4, 6), {"bias": False}),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MODULES)
def test_pytorch(name, dtype):
    """PyTorch's modules with folded weights do what they and its BatchNorm do; the weights are those of its fusion, where it has one."""
    torch = pytest.importorskip("torch")
    from torch.nn.utils import fusion

    torch.manual_seed(0)
    kind, sizes, keywords = MODULES[name]
    module = getattr(torch.nn, kind)(*sizes, **keywords, dtype=getattr(torch, dtype)).eval()
    rank = module.weight.ndim - 2
    x = torch.randn(3, sizes[0], *[7, 8, 9][:rank], dtype=module.weight.dtype)
    bn = trained(sizes[1], dtype)
    norm = getattr(torch.nn, f"BatchNorm{max(rank, 1)}d")(sizes[1], bn.eps, dtype=module.weight.dtype).eval()
    norm.load_state_dict({key: torch.tensor(array) for key, array in bn.state_dict().items()})

    bias = None if module.bias is None else module.bias.detach().numpy()
    arguments = {} if kind == "Linear" else {"groups": module.groups, "transposed": module.transposed}
    folded = fold(module.weight.detach().numpy(), bias, bn, **arguments)
    tolerance = {"float32": 2e-6, "float64": 1e-14}[dtype]

    def near(a, b):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=tolerance * abs(b).max().item())

    merged = copy.deepcopy(module)
    merged.weight, merged.bias = (torch.nn.Parameter(torch.tensor(a)) for a in folded[:2])
    near(merged(x).detach().numpy(), norm(module(x)))
    if name != "transposed grouped":  # which PyTorch cannot fuse
        peer = fusion.fuse_linear_bn_eval(module, norm) if kind == "Linear" else fusion.fuse_conv_bn_eval(module, norm, module.transposed)
        near(folded.weight, peer.weight)
        near(folded.bias, peer.bias)


W = rng().standard_normal((6, 4, 3, 2)).astype(np.float32)
BN = trained(6)
MEAN, VAR = BN.running_mean, BN.running_var
for array in (W, *values_of(BN)[:4]):
    array.flags.writeable = False  # writing to an argument is an error of another kind than those below


def altered(**attributes):
    return tuple(attributes.get(name, getattr(BN, name)) for name in ("running_mean", "running_var", "weight", "bias", "eps"))


# What is changed of the arguments (W, None, BN) of fold_conv, the error and its message.
WRONG = [
    ({"weight": [[1.0], [2.0, 3.0]]}, TypeError, "^weight: expected an array, got list, which NumPy cannot read"),
    ({"weight": None}, TypeError, "^weight: expected an array, got None"),
    ({"weight": W.astype(int)}, TypeError, "^weight: expected an array of float16, bfloat16, float32 or float64, got int64"),
    ({"weight": W.astype(np.complex64)}, TypeError, "^weight: expected .* got complex64"),
    ({"weight": W.astype(np.longdouble)}, TypeError, "^weight: expected .* got "),
    ({"weight": W.astype(object)}, TypeError, "^weight: expected .* got object"),
    ({"weight": np.ma.masked_array(W)}, TypeError, "^weight: expected a plain NumPy array, got MaskedArray"),
    ({"weight": W[0, 0]}, ValueError, r"^weight: expected 3 to 5 dimensions, of which the kernel has 1 to 3, got shape \(3, 2\)"),
    ({"weight": W[None, None]}, ValueError, r"^weight: expected 3 to 5 dimensions.* got shape \(1, 1, 6, 4, 3, 2\)"),
    ({"weight": W[:5]}, ValueError, r"^bn.running_mean: expected shape \(5,\), got \(6,\) \[weight has shape \(5, 4, 3, 2\), order='torch', groups=1"),
    ({"bias": [0.0] * 5}, ValueError, r"^bias: expected shape \(6,\), got \(5,\)"),
    ({"bias": [None] * 6}, TypeError, "^bias: expected an array of real numbers, got object"),
    ({"bias": np.zeros(4)}, ValueError, r"^bias: expected shape \(6,\), got \(4,\) \[weight has shape \(6, 4, 3, 2\), order='torch', groups=1, trans"),
    ({"bias": np.zeros((6, 1))}, ValueError, r"^bias: expected shape \(6,\), got \(6, 1\)"),
    ({"bias": np.zeros(6, complex)}, TypeError, "^bias: expected an array of real numbers, got complex128"),
    ({"bias": np.zeros(6, bool)}, TypeError, "^bias: expected an array of real numbers, got bool"),
    ({"bn": None}, TypeError, r"^bn: expected a cbn.BatchNorm layer or a tuple \(running_mean, .*, eps\), got NoneType"),
    ({"bn": BN.state_dict()}, TypeError, "^bn: expected .* got dict"),
    ({"bn": (MEAN, VAR)}, ValueError, "^bn: expected a tuple .* got one of length 2"),
    ({"bn": cbn.BatchNorm2d(6, track_running_stats=False)}, ValueError, "^bn: expected running statistics, got None"),
    ({"bn": (MEAN, None, None, None, 1e-5)}, ValueError, "^bn: expected running statistics, got None"),
    ({"bn": cbn.BatchNorm2d(4)}, ValueError, r"^bn.running_mean: expected shape \(6,\), got \(4,\)"),
    ({"bn": (MEAN, VAR[:5], None, None, 1e-5)}, ValueError, r"^bn.running_var: expected shape \(6,\), got \(5,\)"),
    ({"bn": (MEAN, VAR, VAR[:, None], None, 1e-5)}, ValueError, r"^bn.weight: expected shape \(6,\), got \(6, 1\)"),
    ({"bn": altered(bias=np.zeros(7))}, ValueError, r"^bn.bias: expected shape \(6,\), got \(7,\)"),
    ({"bn": (MEAN.tolist()[1:], VAR, None, None, 1e-5)}, ValueError, r"^bn.running_mean: expected shape \(6,\), got \(5,\)"),
    ({"bn": (MEAN, VAR, 1.0, None, 1e-5)}, ValueError, r"^bn.weight: expected shape \(6,\), got \(\)"),
    ({"bn": (MEAN, VAR, VAR.astype(str), None, 1e-5)}, TypeError, "^bn.weight: expected an array of real numbers, got <U"),
    ({"bn": (MEAN, np.ma.masked_array(VAR), None, None, 1e-5)}, TypeError, "^bn.running_var: .* MaskedArray"),
    ({"bn": (MEAN, VAR, None, None, None)}, TypeError, "^bn.eps: expected a real number, got None"),
    ({"bn": (MEAN, VAR, None, None, True)}, TypeError, "^bn.eps: expected a real number, got True"),
    ({"bn": altered(eps=-1e-5)}, ValueError, "^bn.eps: batch_norm eps must be non-negative and finite, but got -1e-05"),
    ({"bn": altered(eps=np.nan)}, ValueError, "^bn.eps: batch_norm eps must be non-negative and finite, but got nan"),
    ({"bn": altered(eps=np.inf)}, ValueError, "^bn.eps: batch_norm eps must be non-negative and finite, but got inf"),
    ({"bn": altered(running_var=np.array([1, 1, -2.0, 1, 1, 1]))}, ValueError, "^bn.running_var: expected non-negative values, got -2.0 for channel 2"),
    ({"bn": altered(running_var=np.zeros(6), eps=0)}, ValueError, r"^bn.running_var: expected running_var \+ eps > 0, got 0"),
    ({"order": "OIHW"}, ValueError, "^order: expected 'torch' or 'tensorflow' or 'tensorflow_depthwise', got 'OIHW'"),
    ({"order": None}, ValueError, "^order: expected .* got None"),
    ({"order": "tensorflow"}, ValueError, r"^bn.running_mean: expected shape \(2,\), got \(6,\) .*order='tensorflow'"),
    *[({flag: value}, TypeError, f"^{flag}: expected True or False, got") for flag in ("before", "transposed") for value in (1, None, "no")],
    ({"groups": 2.0}, TypeError, "^groups: expected an integer, got 2.0"),
    ({"groups": True}, TypeError, "^groups: expected an integer, got True"),
    ({"groups": 0}, ValueError, "^groups: expected a divisor of the number of output channels, 6, got 0"),
    ({"groups": -2}, ValueError, "^groups: expected a divisor of the number of output channels, 6, got -2"),
    ({"groups": 4}, ValueError, r"^groups: expected a divisor of the number of output channels, 6, got 4 \[weight has shape \(6, 4, 3, 2\)"),
    ({"groups": 4, "transposed": True}, ValueError, "^groups: expected a divisor of the number of input channels, 6, got 4"),
    ({"groups": 2, "order": "tensorflow_depthwise"}, ValueError, "^groups: expected 1, as such a layer has no such argument, got 2"),
    ({"groups": 2, "order": "tensorflow", "transposed": True}, ValueError, "^groups: expected 1, as such a layer has no such argument, got 2"),
    ({"order": "tensorflow_depthwise", "transposed": True}, ValueError, "^transposed: expected False, as no depthwise layer is, got True"),
    ({"transposed": True}, ValueError, r"^bn.running_mean: expected shape \(4,\), got \(6,\) .*transposed=True"),
    ({"before": True, "padding": 0}, ValueError, r"^bn.running_mean: expected shape \(4,\), got \(6,\)"),
    ({"before": True}, TypeError, "^padding: expected that of the convolution, .* got None"),
    ({"before": True, "padding": "full"}, ValueError, "^padding: expected 'valid', 'same', 'causal' or numbers of zeros, got 'full'"),
    ({"before": True, "padding": 0.0}, TypeError, "^padding: expected an integer or a sequence of them, got 0.0"),
    ({"before": True, "padding": False}, TypeError, "^padding: expected an integer or a sequence of them, got False"),
    ({"before": True, "padding": (1, -1)}, ValueError, r"^padding: expected numbers of zeros >= 0, got \(1, -1\)"),
    ({"before": True, "padding": ((1, 1), 0)}, ValueError, r"^padding: expected an integer or a sequence of them, got \(\(1, 1\), 0\)"),
]


@pytest.mark.parametrize("change, error, message", WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_arguments(change, error, message):
    arguments = {"weight": W, "bias": None, "bn": BN} | change
    with pytest.raises(error, match=message):
        cbn.fold_conv(**arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": W}, ValueError, r"^weight: expected 2 dimensions, got shape \(6, 4, 3, 2\)"),
        ({"weight": [W[:, :, 0, 0].tolist(), None]}, TypeError, "^weight: expected an array, got list"),
        ({"bias": np.zeros(4)}, ValueError, r"^bias: expected shape \(6,\), got \(4,\) \[weight has shape \(6, 4\), order='torch'\]"),
        ({"order": "tensorflow"}, ValueError, r"^bn.running_mean: expected shape \(4,\), got \(6,\) \[weight has shape \(6, 4\), order='tensorflow'\]"),
        ({"order": "tensorflow_depthwise"}, ValueError, "^order: expected 'torch' or 'tensorflow', got 'tensorflow_depthwise'"),
        ({"before": True}, ValueError, r"^bn.running_mean: expected shape \(4,\), got \(6,\)"),
    ],
)
def test_wrong_arguments_of_linear(change, error, message):
    arguments = {"weight": W[:, :, 0, 0], "bias": None, "bn": BN} | change
    with pytest.raises(error, match=message):
        cbn.fold_linear(**arguments)


def test_activation_in_between():
    """What follows bn in the same layer cannot move behind the next one's weights."""
    layer = cbn.BatchNorm1d(3, activation="relu").eval()
    weight = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="^bn: expected a layer without an activation"):
        cbn.fold_linear(weight, None, layer, before=True)
    assert cbn.fold_linear(np.ones((3, 2), np.float32), None, layer).weight.shape == (3, 2)


def test_bfloat16_is_rounded_once():
    """Not to float32 first, where what decides a tie would be lost; to even in a tie, and to infinity beyond the largest."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 is its type")
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tie, bit = 1 + 2.0**-8, 2.0**-7
    cases = [(tie + 2.0**-40, 1 + bit), (tie - 2.0**-40, 1), (tie, 1), (1 + 3 * bit / 2, 1 + 2 * bit), (0, 0), (2.0**-160, 0), (1e39, np.inf), (3.397e38, np.inf),
             (3.3895e38, 3.3895313892515355e38), (np.inf, np.inf)]
    for value, expected in cases:
        for sign in 1, -1:
            folded = cbn.fold_linear(np.ones((1, 1), bfloat16), None, ([0], [1], [sign * value], [0], 0))
            assert folded.weight.dtype == bfloat16 and float(folded.weight[0, 0]) == sign * expected
    assert np.isnan(rounded(np.array([np.nan]), bfloat16).astype(float)).all()
