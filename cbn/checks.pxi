# The rules that arguments must meet; each error names the argument, what was expected and what came. Nothing here writes to one.

cdef str where(cnp.ndarray x, int axis):
    return f"[x has shape {np.shape(x)}, axis={axis}]"


cdef bint flag(object value, str name) except -1:
    """True or False and nothing that is merely truthy: 1e-5 in the place of a flag was meant for another argument."""
    if value is True or value is False:
        return value is True
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name}: expected True or False, got {show(value)}")
    return bool(value)


cdef bint means_more(object a):
    """Whether an array says more than its elements: a mask, or that its product is that of matrices."""
    return isinstance(a, (np.ma.MaskedArray, np.matrix))


cdef cnp.ndarray as_array(object a, str name):
    """`a` as a plain NumPy array: the same memory where it has `__array__`, a buffer or DLPack that NumPy can read in place."""
    cdef cnp.ndarray array
    if type(a) is cnp.ndarray:
        return <cnp.ndarray>a
    if means_more(a):
        raise TypeError(f"{name}: expected a plain NumPy array, got {type(a).__name__}, whose meaning would be lost")
    try:
        # DLPack only where there is nothing else: what it hands over is often read-only and says nothing of gradients.
        if is_torch_bfloat16(a):
            array = of_torch_bfloat16(a)
        else:
            array = np.from_dlpack(a) if hasattr(a, "__dlpack__") and not hasattr(a, "__array__") else np.asarray(a)
    except MemoryError:
        raise
    except Exception as error:      # the object's own, which says what to do: of a tensor that requires gradients, or is on another device
        raise TypeError(f"{name}: expected an array, got {type(a).__name__}, which NumPy cannot read: {error_text(error)}") from error
    if means_more(array):
        raise TypeError(f"{name}: expected a plain NumPy array, got {type(array).__name__}, whose meaning would be lost")
    if cnp.PyArray_NDIM(array) == 0 and cnp.PyArray_TYPE(array) == cnp.NPY_OBJECT:     # no array to NumPy: None, a sparse matrix, a set
        raise TypeError(f"{name}: expected an array, got {'None' if a is None else type(a).__name__}")
    return array


cdef str error_text(object error):
    try:
        return str(error)
    except Exception:
        return type(error).__name__


cdef bint is_torch_bfloat16(object a):
    """Whether it is a PyTorch tensor of bfloat16, which PyTorch hands over to NumPy in no way of its own."""
    return not isinstance(a, (list, tuple)) and str(getattr(a, "dtype", "")) == "torch.bfloat16"


cdef object of_torch_bfloat16(object a):
    """The same memory, as ml_dtypes' bfloat16; without that package, a copy in float32, which holds the same values."""
    if a.requires_grad:
        return np.asarray(a)        # PyTorch's own refusal, which says what to do
    bits = np.asarray(a.view(sys.modules["torch"].int16)).view(np.uint16)
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(bfloat16)


cdef cnp.ndarray as_elements(object a, str name):
    """`a` as an array of a type that there are loops for; big-endian stays as it is."""
    cdef cnp.ndarray array = as_array(a, name)
    if dtype_of(array) < 0:
        raise TypeError(f"{name}: expected an array of float16, bfloat16, float32, float64, int8, uint8, int16 or uint16, got {array.dtype}")
    return array


cdef object result_dtype(cnp.ndarray x):
    """The type of y and dx, of dy and the residual: x's own, or float32 where x holds integers."""
    return np.dtype(np.float32) if x.dtype.kind in "iu" else x.dtype


cdef int check_type(cnp.ndarray a, str name, cnp.ndarray x) except -1:
    """What is of the type of y."""
    if dtype_of(a) == dtype_of(x) if dtype_of(x) <= BFLOAT16 else dtype_of(a) == FLOAT32:
        return 0
    of_x = ", that of x" if dtype_of(x) <= BFLOAT16 else f", that of the output where x is {x.dtype}"
    raise TypeError(f"{name}: expected dtype {result_dtype(x)}{of_x}, got {a.dtype}")


cdef int check_like_x(cnp.ndarray dy, cnp.ndarray x) except -1:
    if not same_shape(dy, x):
        raise ValueError(f"dy: expected shape {np.shape(x)}, that of x, got {np.shape(dy)}")
    return check_type(dy, "dy", x)


cdef int channel_axis(cnp.ndarray x, object axis) except -1:
    cdef Py_ssize_t a
    cdef int rank = cnp.PyArray_NDIM(x)
    if rank < 2:
        raise ValueError(f"x: expected at least 2 dimensions, one of them the channels, got shape {np.shape(x)}")
    index = integer(axis, "axis")
    if not -rank <= index < rank:
        raise ValueError(f"axis: expected {-rank} to {rank - 1} for x of shape {np.shape(x)}, got {show(axis)}")
    a = index
    return <int>(a + rank if a < 0 else a)


cdef object integer(object value, str name):
    try:
        return operator.index(None if isinstance(value, (bool, np.bool_)) else value)
    except Exception:
        raise TypeError(f"{name}: expected an integer, got {show(value)}") from None


cdef double real_number(object value, str name) except? -1:
    """A number, or an array of shape () of one."""
    if type(value) is float:
        return value
    number = value
    try:
        if not isinstance(value, numbers.Real) and hasattr(value, "__array__"):
            array = as_array(value, name)
            if array.ndim == 0 and (array.dtype.kind in "fiu" or is_bfloat16(array)):
                number = array.astype(np.float64)[()]
        if isinstance(number, numbers.Real) and not isinstance(number, (bool, np.bool_)):
            return float(number)
    except OverflowError:       # an integer beyond all floats
        return INFINITY if number > 0 else -INFINITY
    except Exception:
        pass
    raise TypeError(f"{name}: expected a real number, got {show(value)}")


cdef double checked_eps(object eps, bint training, cnp.ndarray x=None) except? -1:
    """> 0 in training, >= 0 otherwise; and, of elements that are computed with in float32, so that 1 / sqrt(eps) is one."""
    cdef double number = real_number(eps, "eps")
    if training and not 0 < number <= DBL_MAX:
        raise ValueError(f"batch_norm eps must be positive during training, but got {show(eps)}")
    if not 0 <= number <= DBL_MAX:
        raise ValueError(f"batch_norm eps must be non-negative and finite, but got {show(eps)}")
    if x is not None and cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64 and 0 < number < 1e-76:
        raise ValueError(f"batch_norm eps must be at least 1e-76 where x is not float64, so that 1 / sqrt(eps) is within float32, but got {show(eps)}")
    return number


cdef double checked_momentum(object momentum) except? -1:
    cdef double number
    if momentum is None:
        raise TypeError("momentum: expected a number in [0, 1], got None; the cumulative average that layers take it for needs a count of "
                        "batches: pass 1 / count")
    number = real_number(momentum, "momentum")
    if not 0 <= number <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {show(momentum)}")
    return number


cdef bint usable(cnp.ndarray a) noexcept:
    """Whether the kernels can use an array of shape (channels,) where it is."""
    return (cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT64) and PyArray_ISNOTSWAPPED(a) \
        and PyArray_ISALIGNED(a) and cnp.PyArray_STRIDE(a, 0) % cnp.PyArray_ITEMSIZE(a) == 0


cdef cnp.ndarray parameter(Vector* vector, object a, str name, Py_ssize_t channels, cnp.ndarray x, int axis):
    """Let the kernels read a parameter of shape (channels,), where it is or from a copy; whichever it is is returned, to be kept alive."""
    cdef cnp.ndarray array
    if a is None:
        return None
    array = per_channel(as_array(a, name), name, channels, x, axis)
    if not usable(array):
        if array.dtype.kind not in "fiu" and not is_bfloat16(array):
            raise TypeError(f"{name}: expected an array of real numbers, got {array.dtype}")
        # A conversion of float32 would follow the caller's floating-point mode; a copy doesn't.
        with np.errstate(all="ignore"):
            array = array.astype(np.float32 if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 else np.float64)
    see(vector, array)
    return array


cdef cnp.ndarray needed(Vector* vector, object a, str name, Py_ssize_t channels, cnp.ndarray x, int axis):
    """As parameter, of what must not be None."""
    if a is None:
        raise TypeError(f"{name}: expected an array of shape ({channels},), got None")
    return parameter(vector, a, name, channels, x, axis)


cdef cnp.ndarray per_channel(cnp.ndarray a, str name, Py_ssize_t channels, cnp.ndarray x, int axis):
    """`a` in the shape (channels,): itself, or the row of an array of shape (1, channels)."""
    cdef int rank = cnp.PyArray_NDIM(a)
    if rank == 1 and cnp.PyArray_DIM(a, 0) == channels:
        return a
    if rank == 2 and cnp.PyArray_DIM(a, 0) == 1 and cnp.PyArray_DIM(a, 1) == channels:
        return a[0]
    if cnp.PyArray_SIZE(a) == channels:
        raise ValueError(f"{name}: expected shape ({channels},), got {np.shape(a)} {where(x, axis)}")
    raise ValueError(f"{name} should contain {channels} elements not {cnp.PyArray_SIZE(a)}: expected shape ({channels},), "
                     f"got {np.shape(a)} {where(x, axis)}")


cdef int check_variance(const Vector* vector, Py_ssize_t channels, str name, double eps) except -1:
    """Rounding makes variances slightly negative, also in checkpoints; where var + eps is positive, that is as good as 0."""
    cdef Py_ssize_t c
    cdef double value
    found = None
    if not any_negative(vector, channels):
        return 0
    for c in range(channels):
        value = (<const float*>vector.data)[c * vector.stride] if vector.dtype == FLOAT32 else (<const double*>vector.data)[c * vector.stride]
        if value < 0 and not value + eps > 0:
            raise ValueError(f"{name}: expected non-negative values, got {value} for channel {c} [eps={eps}]")
        if value < 0 and found is None:
            found = f"{name}: expected non-negative values, got {value} for channel {c}; computing with var + eps, which is positive"
    warn(found)
    return 0


cdef cnp.ndarray check_running(object a, str name, Py_ssize_t channels, cnp.ndarray x, int axis):
    """A running statistic that is to be updated in place, as an array of shape (channels,) of the same memory."""
    cdef cnp.ndarray array
    if type(a) is not cnp.ndarray and (not isinstance(a, cnp.ndarray) or means_more(a)):
        raise TypeError(f"{name}: expected a NumPy array, which training updates in place, got {type(a).__name__}")
    array = per_channel(a if type(a) is cnp.ndarray else np.asarray(a), name, channels, x, axis)
    if cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT32 and cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT64:
        raise TypeError(f"{name}: expected an array of float32 or float64, got {array.dtype}")
    if not PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name}: expected a writeable array, which training updates in place, got a read-only one")
    check_own_places(array, name)
    return array


cdef int check_own_places(cnp.ndarray a, str name) except -1:
    """An array that is written must not overlap itself, as one with zero strides does.

    By rising strides, each axis must step past all that the ones before it span. Whatever NumPy's slices, transposes, reshapes and diagonals make
    of an array without overlaps does; strides that interlock without meeting, which only as_strided makes, are refused too.
    """
    cdef Py_ssize_t steps[MAX_AXES]
    cdef Py_ssize_t lengths[MAX_AXES]
    cdef Py_ssize_t step, span = cnp.PyArray_ITEMSIZE(a)
    cdef int i, k, count = 0
    if cnp.PyArray_IS_C_CONTIGUOUS(a) or cnp.PyArray_SIZE(a) == 0:
        return 0
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) == 1:
            continue
        step = abs(cnp.PyArray_STRIDE(a, i))
        k = count
        while k > 0 and steps[k - 1] > step:
            steps[k], lengths[k] = steps[k - 1], lengths[k - 1]
            k -= 1
        steps[k], lengths[k] = step, cnp.PyArray_DIM(a, i)
        count += 1
    for k in range(count):
        if steps[k] < span:
            raise ValueError(f"{name}: expected memory of its own for each element, got shape {np.shape(a)} with strides {(<object>a).strides}, "
                             "in which elements overlap")
        span += (lengths[k] - 1) * steps[k]
    return 0


cdef bint same_shape(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


cdef bint same_memory(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two arrays of one shape are the same elements in the same places."""
    cdef int i
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b) or cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i) and cnp.PyArray_DIM(a, i) > 1:
            return False
    return True


cdef bint bounds_overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether the address ranges of two arrays overlap."""
    cdef char* low_a
    cdef char* high_a
    cdef char* low_b
    cdef char* high_b
    bounds(a, &low_a, &high_a)
    bounds(b, &low_b, &high_b)
    return low_a < high_b and low_b < high_a


cdef void bounds(cnp.ndarray a, char** low, char** high) noexcept:
    cdef int i
    cdef Py_ssize_t span
    low[0] = high[0] = <char*>cnp.PyArray_DATA(a)
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) == 0:
            high[0] = low[0] = <char*>cnp.PyArray_DATA(a)
            return
        span = (cnp.PyArray_DIM(a, i) - 1) * cnp.PyArray_STRIDE(a, i)
        if span > 0:
            high[0] += span
        else:
            low[0] += span
    high[0] += cnp.PyArray_ITEMSIZE(a)


cdef bint share_elements(cnp.ndarray a, cnp.ndarray b):
    """Whether two arrays share memory: of elements, not only of the ranges that they lie in."""
    if not bounds_overlap(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=10000)
    except Exception:               # too hard to decide: NumPy raises TooHardError, whose place differs between its versions
        return True


cdef int check_overlap(cnp.ndarray out, str out_name, object a, str name, bint in_place) except -1:
    """`out`, which will be written, must not overlap `a`, which is read; where in_place, it may be exactly `a`."""
    cdef cnp.ndarray array
    if a is None:
        return 0
    array = a if isinstance(a, cnp.ndarray) else as_array(a, name)     # a tensor may be the memory of `out`
    if not (in_place and same_memory(out, array)) and share_elements(out, array):
        raise ValueError(f"{out_name}: expected memory of its own{' or exactly that of ' + name if in_place else ''}, "
                         f"got an array that overlaps {name}")
    return 0


cdef cnp.ndarray addend(object residual, cnp.ndarray x):
    cdef cnp.ndarray array
    if residual is None:
        return None
    array = as_elements(residual, "residual")
    if not same_shape(array, x):
        raise ValueError(f"residual: expected shape {np.shape(x)}, that of x, got {np.shape(array)}")
    check_type(array, "residual", x)
    return array


cdef int set_fusion(Job* job, object activation, object residual, cnp.ndarray x, bint backward) except -1:
    """What is to be done in the pass that normalizes: of `activation`, the Job's numbers."""
    cdef double alpha = 0, beta = 0
    cdef int which = CBN_NONE
    job.dtype = FLOAT64 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else FLOAT32
    if activation is None:
        set_activation(job, CBN_NONE, 0, 0, backward)
        return 0
    kind, *numbers = (activation,) if isinstance(activation, str) else activation if isinstance(activation, tuple) and activation else (None,)
    if not isinstance(kind, str):
        kind = None             # which is none, and may not even compare
    if kind == "hard_swish" and len(numbers) == 0:
        which = CBN_HARD_SWISH
    elif kind == "sigmoid" and len(numbers) == 0:
        which = CBN_SIGMOID
    elif kind == "silu" and len(numbers) == 0:
        which = CBN_SILU
    elif kind == "relu" and len(numbers) == 0:
        which = CBN_RELU
    elif kind == "relu6" and len(numbers) == 0:
        which = CBN_RELU6
    elif kind == "clip" and len(numbers) == 2:
        which, alpha, beta = CBN_CLIP, real_number(numbers[0], "activation: low"), real_number(numbers[1], "activation: high")
    elif kind == "leaky_relu" and len(numbers) == 1:
        which, alpha = CBN_LEAKY_RELU, real_number(numbers[0], "activation: slope")
    else:
        raise ValueError("activation: expected None, 'relu', 'relu6', ('clip', low, high), ('leaky_relu', slope), 'hard_swish', 'sigmoid' or "
                         f"'silu', got {show(activation)}")
    if not set_activation(job, which, alpha, beta, backward):
        expected = "('clip', low, high) with low <= high" if which == CBN_CLIP else "a finite slope"
        raise ValueError(f"activation: expected {expected}, got {show(activation)}")
    return 0


cdef cnp.ndarray output(object out, cnp.ndarray x):
    """The array to write: `out`, checked, or a new one in x's memory order."""
    cdef cnp.ndarray array
    if out is None:
        return new_like(x, None if dtype_of(x) <= BFLOAT16 else np.dtype(np.float32))
    check_written(out, "out", x)
    array = out
    check_type(array, "out", x)
    return array


cdef int check_written(object a, str name, cnp.ndarray like) except -1:
    """An array that is to be written, of the shape of `like`."""
    cdef cnp.ndarray array
    if type(a) is not cnp.ndarray and (not isinstance(a, cnp.ndarray) or means_more(a)):
        raise TypeError(f"{name}: expected a NumPy array, got {type(a).__name__}")
    array = a
    if not same_shape(array, like):
        raise ValueError(f"{name}: expected shape {np.shape(like)}, got {np.shape(array)}")
    if not PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    check_own_places(array, name)
    return 0


cdef int check_outputs(cnp.ndarray y, object x, object dy, object residual, object weight, object bias, object mean, object var,
                       str statistics) except -1:
    """`out` may be x, dy or the residual, and must not overlap anything else that is read."""
    check_overlap(y, "out", x, "x", True)
    check_overlap(y, "out", dy, "dy", True)
    check_overlap(y, "out", residual, "residual", True)
    check_overlap(y, "out", weight, "weight", False)
    check_overlap(y, "out", bias, "bias", False)
    check_overlap(y, "out", mean, statistics + "mean", False)
    check_overlap(y, "out", var, statistics + "var", False)
    return 0


cdef int check_running_pair(object running_mean, object running_var) except -1:
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    return 0
