"""The space of calls that test_properties.py and fuzz.py draw from: drawing one, running it, and judging what came of it.

Randomness is a function `pick(options)`, so that Hypothesis and a plain generator draw from one space. A call that is wrong somewhere knows the
errors that may come of it; every other call must succeed.
"""

from types import SimpleNamespace

import numpy as np
import reference
from numpy.lib.stride_tricks import as_strided
from reference import check, other_axes, per_channel

import cbn

try:
    from ml_dtypes import bfloat16, finfo
except ImportError:
    bfloat16, finfo = np.float16, np.finfo

OPERATIONS = "inference", "training", "train", "stats", "backward", "frozen", "halves"
TRAINING = "training", "train", "backward", "halves"  # want eps > 0
BACKWARD = "backward", "frozen", "halves"  # the last by the sums of one part, which is the whole
WIDE = np.float32, np.float32, np.float32, np.float64, np.float64  # computed with as they are
NARROW = np.float16, bfloat16, np.int8, np.uint8, np.int16, np.uint16
ACTIVATIONS = "relu", "relu6", ("clip", -0.5, 0.75), ("leaky_relu", 0.125), "hard_swish", "sigmoid", "silu"
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 257, 1, 2, 3, 4, 5, 7, 8, 16, 17, 1, 2, 3, 0)
SIZES = (60, 60, 500, 500, 500, 3000, 20_000)  # of x, at most
NORMAL = np.random.default_rng(51).standard_normal(1 << 16)
UNIFORM = np.random.default_rng(52).random(1 << 12) + 0.1
STARTS = range(1 << 11)
FILL = 0x55  # of the bytes of buffers, so that what is written outside of a view is seen


def often(*options, times=6):
    """Options of which the first is drawn more often."""
    return (options[0],) * times + options


class Placed:
    """An array somewhere in a buffer; `copy` makes the same one in a copy of that buffer."""

    def __init__(self, values, order=None, steps=None, offset=0, swapped=False, repeated=None):
        self.shape, self.order, self.steps, self.offset, self.repeated = values.shape, order, steps, offset, repeated
        self.dtype = values.dtype.newbyteorder() if swapped else values.dtype
        order, steps = order or range(values.ndim), steps or (1,) * values.ndim
        self.dims = [self.shape[i] * abs(steps[i]) for i in order]
        self.bytes = int(np.prod(self.dims, dtype=int)) * self.dtype.itemsize
        self.buffer = np.full(self.bytes + offset + 24, FILL, np.uint8)
        self.array = self.view(self.buffer)
        if repeated is not None:
            first = tuple(slice(0, 1) if i == repeated else slice(None) for i in range(values.ndim))
            self.view(self.buffer, None)[first] = values[first]
        elif values.size:
            self.array[...] = values

    def view(self, buffer, repeated=...):
        a = buffer[self.offset : self.offset + self.bytes].view(self.dtype).reshape(self.dims)
        if self.steps is not None:
            order = self.order or range(len(self.steps))
            a = a[tuple(slice(None, None, self.steps[i]) for i in order)]
        if self.order is not None:
            a = a.transpose(sorted(range(len(self.order)), key=self.order.__getitem__))
        repeated = self.repeated if repeated is ... else repeated
        return a if repeated is None else as_strided(a, a.shape, [0 if i == repeated else s for i, s in enumerate(a.strides)])

    def astype(self, dtype):
        """The same elements in another type and native byte order, in the same order of memory."""
        return Placed(self.array.astype(dtype), self.order, self.steps, self.offset, False, self.repeated)

    def copy(self):
        other = object.__new__(Placed)
        other.__dict__.update(self.__dict__)
        other.buffer = self.buffer.copy()
        other.array = other.view(other.buffer)
        return other


def draw_placed(pick, values, axis=None, repeat=False):
    """An array of these values in a drawn memory order, with drawn gaps, offset and byte order."""
    layout = pick(often("plain", "last", "order", "steps", "both", "swapped", "misaligned", "repeated", "offset"))
    rank, order, steps = values.ndim, None, None
    if layout == "last" and rank > 1 and axis is not None:
        order = [i for i in range(rank) if i != axis] + [axis]
    if layout in ("order", "both"):
        rest = list(range(rank))
        order = [rest.pop(pick(range(len(rest)))) for _ in range(rank)]
    if layout in ("steps", "both"):
        steps = tuple(pick((1, 1, 2, -1, -2, 3)) for _ in range(rank))
    offset = {"misaligned": pick((1, 2, 3, 5)), "offset": pick((4, 8, 12, 16)) * values.itemsize // 4}.get(layout, 0)
    repeated = pick(range(rank)) if layout == "repeated" and repeat and rank and values.size else None
    swapped = layout == "swapped" or layout == "both" and pick((False, False, True))
    return Placed(values, order, steps, offset, swapped and values.dtype.kind != "V", repeated)


def numbers_of(pick, pool, shape, dtype):
    start, n = pick(STARTS), int(np.prod(shape, dtype=int))
    values = pool[start : start + n].reshape(shape)
    if np.dtype(dtype).kind in "iu":
        values = (values * 30).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return values.astype(dtype)


def type_of_results(dtype):
    return np.dtype(np.float32) if dtype.kind in "iu" else dtype.newbyteorder("=")


def another_type(dtype):
    """Than results are of."""
    return np.float64 if type_of_results(dtype) == np.float32 else np.float32


def epsilon(dtype):
    return float(finfo(dtype).eps)


def draw(pick):
    """A call: its operation, arrays (Placed, by name), other arguments, and the types of error that it may raise; none: it must succeed."""
    call = SimpleNamespace(operation=pick(OPERATIONS), placed={}, others={}, errors=set(), fault=None, poison=False)
    op, placed, others = call.operation, call.placed, call.others
    dtype = np.dtype(pick(WIDE + NARROW))
    shape, room = [], pick(SIZES)
    for _ in range(pick((2, 2, 3, 3, 4, 4, 5, 6))):
        shape.append(min(pick(LENGTHS), room))
        room //= max(1, shape[-1])
    rank = len(shape)
    others["axis"] = pick((1, 1, 1, -1, -1, *range(-rank, rank)))
    axis = call.axis = others["axis"] % rank
    channels, count = shape[axis], int(np.prod([n for i, n in enumerate(shape) if i != axis], dtype=int))
    call.count = count

    result = type_of_results(dtype)
    x = numbers_of(pick, NORMAL, shape, dtype)
    if dtype == result:
        x = x * dtype.type(pick((1, 1, 3))) + dtype.type(pick((0, 0, 3, 100)))
    if x.size and dtype == result and pick(often(False, True, times=25)):
        x.reshape(-1)[pick(STARTS) % x.size] = pick((np.nan, np.inf, -np.inf))
        call.poison = True
    placed["x"] = draw_placed(pick, x, axis, repeat=True)
    vector = lambda pool, dtypes: draw_placed(pick, numbers_of(pick, pool, (channels,), pick(dtypes)))
    any_dtype = often(np.float32, np.float64, np.float16, np.int32, times=4)
    if op != "stats":
        for name in ("weight", "bias"):
            if pick((True, True, False)):
                placed[name] = vector(NORMAL, any_dtype)
        others["eps"] = pick((1e-5, 1e-5, 1e-3, 1.0, 0.0, 1))
        if others["eps"] == 0 and op in TRAINING:
            call.errors.add(ValueError)
    if op != "stats":
        others["activation"] = pick(often(None, *ACTIVATIONS))
        if pick((False, False, True)):
            placed["residual"] = draw_placed(pick, numbers_of(pick, NORMAL, shape, result), axis, repeat=True)
    if op in BACKWARD:
        placed["dy"] = draw_placed(pick, numbers_of(pick, NORMAL, shape, result), axis, repeat=True)
        others["affine_grad"] = pick((True, True, False))
    if op in ("inference", *BACKWARD):
        placed["mean"], placed["var"] = vector(NORMAL, any_dtype), vector(UNIFORM, (np.float32, np.float64))
    if op == "training":
        others["momentum"] = pick((0.1, 0.1, 0.0, 1.0, 1, 0.5))
        others["unbiased"] = pick((True, True, False))
        if pick((True, True, True, False)):
            placed["mean"], placed["var"] = (vector(pool, (np.float32, np.float64)) for pool in (NORMAL, UNIFORM))
    if op in ("training", "train") and count == 1:
        call.errors.add(ValueError)
    if op != "stats":
        # "out" is an array of its own, or the name of the argument whose memory it is.
        call.out = pick((None, None, "out", "out", "x", "dy", "residual"))
        if call.out in ("dy", "residual") and call.out not in placed:
            call.out = None
        if call.out == "out":
            placed["out"] = draw_placed(pick, np.full(shape, 7, result), axis)
        elif call.out and placed[call.out].repeated is not None and shape[placed[call.out].repeated] > 1:
            call.errors.add(ValueError)  # it overlaps itself
        if call.out == "x" and dtype != result:
            call.errors.add(TypeError)
    else:
        call.out = None
    if pick((False, False, False, True)):
        draw_fault(pick, call)
    return call


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def faults(call):
    """What can be made wrong of a call: (the argument, what makes its wrong value of the right one, the error)."""
    shape, dtype = call.placed["x"].shape, type_of_results(call.placed["x"].dtype)
    rank = len(shape)
    yield from (("x", lambda a, t=t: np.zeros(a.shape, t), TypeError) for t in (np.int32, np.longdouble, bool, np.complex64, object, "M8[s]", "S4"))
    yield "x", lambda a: None, TypeError
    yield "x", np.ma.masked_array, TypeError
    yield "x", lambda a: a.reshape(-1), ValueError
    yield "x", lambda a: a.astype([("f", dtype)]), TypeError
    yield from (("axis", lambda a, v=v: v, ValueError) for v in (rank, -rank - 1, 1 << 70))
    yield from (("axis", lambda a, v=v: v, TypeError) for v in (1.0, None, True, "1", (1,)))
    if call.operation != "stats":
        yield from (("eps", lambda a, v=v: v, ValueError) for v in (-1.0, float("nan"), float("inf"), 10**400))
        yield from (("eps", lambda a, v=v: v, TypeError) for v in ("1e-5", None, True, 1e-5j))
        wrong = "tanh", 1, ["relu"], ("clip", 1, 0), ("clip", 1), ("leaky_relu", float("inf")), ("clip", float("nan"), 1), ("relu", 1), ()
        yield from (("activation", lambda a, v=v: v, ValueError) for v in wrong)
        yield from (("activation", lambda a, v=v: v, TypeError) for v in (("clip", None, 1), ("leaky_relu", "a")))
        yield "residual", lambda a: np.ones((*shape, 1), dtype), ValueError
        yield "residual", lambda a: np.ones(shape, another_type(dtype)), TypeError
        yield "residual", lambda a: [1.0], ValueError
        yield "out", lambda a: np.ones((*shape, 1), dtype), ValueError
        yield "out", lambda a: np.ones(shape, another_type(dtype)), TypeError
        yield "out", lambda a: [1.0], TypeError
        yield "out", lambda a: np.broadcast_to(dtype.type(1), shape), ValueError
        for i in (i for i, n in enumerate(shape) if n > 1 and 0 not in shape):
            yield "out", lambda a, i=i: Placed(np.ones(shape, dtype), repeated=i).array, ValueError
    if call.operation == "training":
        yield from (("momentum", lambda a, v=v: v, ValueError) for v in (-0.1, 1.5, float("nan")))
        yield from (("momentum", lambda a, v=v: v, TypeError) for v in (None, "0.1", True))
        yield from (("unbiased", lambda a, v=v: v, TypeError) for v in (None, 1, "no"))
    for name in {"weight", "bias", "mean", "var"} & call.placed.keys():
        yield name, lambda a: np.append(a, a[:1] if a.size else 1.0), ValueError
        yield name, lambda a: np.array(a).reshape(-1, 1, 1), ValueError
        yield name, np.ma.masked_array, TypeError
        yield from ((name, lambda a, t=t: np.asarray(a).astype(t), TypeError) for t in (complex, bool, object, "S3", "M8[s]"))
    if "mean" in call.placed:
        if call.operation in ("inference", "training"):
            yield "mean", lambda a: None, ValueError
            yield "var", lambda a: None, ValueError
        if call.operation != "training" and shape[call.axis]:
            yield "var", lambda a: np.append(a[:-1], -2.5), ValueError
        if call.operation == "training":
            yield "mean", lambda a: a.tolist(), TypeError
            yield "var", lambda a: a.astype(int), TypeError
            yield "var", read_only, ValueError
    if "dy" in call.placed:
        yield "dy", lambda a: np.append(a, a), ValueError
        yield "dy", lambda a: a.astype(another_type(dtype)), TypeError
        yield "dy", lambda a: None, TypeError


def draw_fault(pick, call):
    name, wrong, error = pick(sorted(faults(call), key=lambda fault: fault[0]))
    call.fault = name, wrong
    call.errors.add(error)
    if name == "out":
        call.placed.pop("out", None)
    if name in ("out", call.out):
        call.out = None


def run(call, placed):
    """Make the call on these arrays (call.placed, or a copy); returns its results by name, or the error that it raised."""
    a = {name: placed[name].array if name in placed else None for name in ("x", "dy", "mean", "var", "weight", "bias", "residual")}
    others = dict(call.others)
    if call.out:
        others["out"] = placed[call.out].array
    if call.fault is not None:
        name, wrong = call.fault
        target = a if name in a else others
        target[name] = wrong(target.get(name))
    op = call.operation
    if op != "stats":
        others["residual"] = a["residual"]
    try:
        if op == "stats":
            st = cbn.batch_stats(a["x"], **others)
            return {"st_mean": st.mean, "st_var": st.var}
        if op in ("inference", "training"):
            results = {"y": cbn.batch_norm(a["x"], a["mean"], a["var"], a["weight"], a["bias"], op == "training", **others)}
            return results | ({"mean": a["mean"], "var": a["var"]} if op == "training" and a["mean"] is not None else {})
        if op == "train":
            y, st = cbn.batch_norm_train(a["x"], a["weight"], a["bias"], **others)
            return {"y": y, "st_mean": st.mean, "st_var": st.var}
        stats = (a["mean"], a["var"])
        if op == "halves":
            stats = cbn.BatchStats(call.count, *stats)
            half = {name: value for name, value in others.items() if name not in ("out", "affine_grad")}
            others["sums"] = cbn.gradient_sums(a["dy"], a["x"], stats, a["weight"], a["bias"], **half)
        g = cbn.batch_norm_backward(a["dy"], a["x"], stats, a["weight"], a["bias"], training=op != "frozen", **others)
        return {"y": g.x} | ({} if g.residual is None else {"residual_grad": g.residual}) | ({"weight_grad": g.weight, "bias_grad": g.bias} if others["affine_grad"] else {})
    except Exception as error:
        return error


def written(call):
    """The names of the arrays that a call writes to."""
    return ({call.out} if call.out else set()) | ({"mean", "var"} & call.placed.keys() if call.operation == "training" else set())


def judge(call, placed, before, results):
    """Whether the error is one of those expected, or none; nothing was written but the elements of the outputs; results have the right form."""
    if isinstance(results, Exception):
        assert type(results) in call.errors, f"{type(results).__name__}: {results}; expected {call.errors or 'no error'}"
        for name in placed:
            assert np.array_equal(placed[name].buffer, before[name].buffer), f"{name} was changed by a call that fails"
        return
    assert not call.errors, f"expected {call.errors}"
    for name in placed:
        buffer = before[name].buffer
        if name in written(call):
            buffer = buffer.copy()
            before[name].view(buffer)[...] = placed[name].array
        assert placed[name].buffer.tobytes() == buffer.tobytes(), f"{name} was changed" + " between its elements" * (name in written(call))
    x = placed["x"].array
    if "y" in results:
        y = results["y"]
        assert (
            y is placed[call.out].array if call.out else type(y) is np.ndarray and y.dtype == type_of_results(x.dtype) and y.shape == x.shape
        )


def same(a, b):
    return a.tobytes() == b.tobytes() or a.shape == b.shape and bool(((a == b) | np.isnan(a) & np.isnan(b)).all())


def plain(placed):
    """The same values, contiguous and native."""
    return {name: Placed(np.array(p.array, p.dtype.newbyteorder("="), order="C")) for name, p in placed.items()}


def largest_finite(a, axis):
    return reference.largest(np.where(np.isfinite(a), a, 0), axis)


def compare_with_reference(call, before, results):
    """Results of a call that succeeded agree with the oracle's; `before` are the arguments as they were.

    Narrow types are computed in float32: their results are float32's, rounded once.
    """
    if before["x"].dtype.newbyteorder("=") not in WIDE:
        wide = {name: p.astype(np.float32) if name in ("x", "dy", "out", "residual") else p.copy() for name, p in before.items()}
        again = {name: p.copy() for name, p in wide.items()}
        wide_results = run(call, wide)
        for name, a in wide_results.items():
            assert same(results[name], a.astype(results[name].dtype)), f"{name}: not float32's result, rounded"
        compare_with_reference(call, again, wide_results)
        return
    get = lambda name: np.array(before[name].array, before[name].dtype.newbyteorder("=")) if name in before else None
    x, dy, mean, var, weight, bias, residual = map(get, ("x", "dy", "mean", "var", "weight", "bias", "residual"))
    if x.size == 0:
        for name, a in results.items():
            expected = get(name) if name in before else np.nan if name.startswith("st_") else 0
            assert name in ("y", "residual_grad") or np.array_equal(a, np.broadcast_to(expected, a.shape), equal_nan=True), name
        return
    axis, op, others = call.axis, call.operation, call.others
    eps = others.get("eps", 1.0)
    channelwise = lambda a: per_channel(a, x, axis)
    results = {name: np.array(a, a.dtype.newbyteorder("=")) for name, a in results.items()}
    w = 1 if weight is None else weight.astype(reference.wide)
    m = x.size // x.shape[axis]
    with np.errstate(all="ignore"):
        activation = others.get("activation")
        if op in BACKWARD:
            if activation is not None:
                v = reference.batch_norm(x, mean, var, weight, bias, eps, axis) + (0 if residual is None else residual)
                terms = abs(channelwise(w / np.sqrt(var.astype(reference.wide) + eps))) * (abs(x) + abs(channelwise(mean)))
                terms = terms + (0 if bias is None else abs(channelwise(bias))) + (0 if residual is None else abs(residual))
                near = [abs(v - corner) <= 64 * epsilon(x.dtype) * terms for corner in reference.corners(activation)]
                if np.any(near) or activation in reference.SMOOTH and largest_finite(terms, axis).max() > 80:
                    return  # which side of a corner it is on, rounding decides; a slope of e**-88 is subnormal
                dy = dy * reference.slope(v, activation)
            if "residual_grad" in results and not call.poison:
                check(results["residual_grad"], dy, largest_finite(dy, axis) + (0 if activation is None else largest_finite(terms, axis)), 8)
            expected = reference.batch_norm_backward(dy, x, mean, var, weight, eps, axis, op != "frozen")
            xhat = reference.batch_norm(x, mean, var, eps=eps, axis=axis)
            sums = abs(dy * xhat).sum(other_axes(x, axis)), abs(dy.astype(reference.wide)).sum(other_axes(x, axis))
            dx_scale = largest_finite(dy, axis) + (channelwise(sums[0]) * largest_finite(xhat, axis) / m if op != "frozen" else 0)
            dx_scale = dx_scale * abs(channelwise(w / np.sqrt(var.astype(reference.wide) + eps)))
            pairs = [("y", expected[0], dx_scale, 8), ("weight_grad", expected[1], sums[0], 4), ("bias_grad", expected[2], sums[1], 4)]
            if activation in reference.SMOOTH:
                pairs = [(name, a, scale * 128, ulps) for name, a, scale, ulps in pairs]
            grad = weight.dtype if weight is not None and weight.dtype.kind == "f" else x.dtype
            assert not others["affine_grad"] or results["weight_grad"].dtype == results["bias_grad"].dtype == grad
        else:
            st = (mean, var) if op == "inference" else reference.batch_stats(x, axis)
            rounding = 1 if x.dtype == np.float64 else 2.0**-29
            invstd = 1 / np.sqrt(np.asarray(st[1], reference.wide) + eps)
            y = reference.batch_norm(x, *st, weight, bias, eps, axis)
            # Statistics are float64: their rounding shows in float64 results, and in the others where a result is far smaller.
            of_mean = abs(channelwise(np.asarray(st[0], reference.wide) * w * invstd)) * rounding
            scale = largest_finite(y, axis) + of_mean + (0 if bias is None else abs(channelwise(bias)))
            if residual is not None:
                y, scale = y + residual, scale + largest_finite(residual, axis)
            y = reference.activate(y, activation)
            if activation == "sigmoid":  # of small numbers it is 0.5
                scale = scale + 0.5
            size = np.maximum(abs(st[0]), np.sqrt(st[1])) if op != "inference" else None
            pairs = [("y", y, scale, (4 if op == "inference" else 8) * (1 if activation is None and residual is None else 2))]
            if "st_mean" in results:
                # Changes of x by a rounding change its variance by as much as the second term.
                of_x = abs(st[0]) * np.sqrt(st[1]) * rounding + (abs(st[0]) * np.finfo(np.float64).eps) ** 2
                pairs += [("st_mean", st[0], size, 8), ("st_var", st[1], st[1] + of_x, 8)]
            if "mean" in results:
                momentum, tracked = others["momentum"], st[1] * m / (m - 1) if others["unbiased"] else st[1]
                pairs += [("mean", reference.updated(mean, st[0], momentum), abs(mean) + size, 8)]
                pairs += [("var", reference.updated(var, tracked, momentum), var + tracked, 8)]
        for name, expected, scale, ulps in pairs:
            if name not in results or results[name].dtype == np.float16:
                continue
            actual = results[name]
            narrow = expected.astype(actual.dtype)
            finite = np.isfinite(narrow)
            assert np.array_equal(actual[~finite], narrow[~finite], equal_nan=True) and np.isfinite(actual[finite]).all(), (
                f"{name}: NaN or infinity"
            )
            scale = np.broadcast_to(scale, actual.shape)
            ulps = ulps * max(1, np.finfo(x.dtype).eps / np.finfo(actual.dtype).eps)  # x is what is computed in
            try:
                check(actual[finite], expected[finite], np.where(np.isfinite(scale), scale, 0)[finite], ulps)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
