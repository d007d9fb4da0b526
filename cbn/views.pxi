# Arrays as the kernels see them: (outer, channels, inner) with strides.

cdef enum:
    MAX_RANK = 64               # of a NumPy array


cdef bint plain(cnp.ndarray a) noexcept:
    """Whether elements can be read where they are: native byte order, aligned."""
    return PyArray_ISNOTSWAPPED(a) and PyArray_ISALIGNED(a)


cdef bint view_together(Job* job, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray y) noexcept:
    """Fill the job's shape and views from arrays of one shape (dy and y may be None); False where they have no view in common.

    The row layout needs the axes other than the channels' to join into two, the inner one contiguous; the column layout needs the channels
    contiguous and the other axes to join into one. Axes are taken in the order of x's strides, so that a transposed view is recognized too.
    """
    cdef cnp.npy_intp* strides[3]
    cdef View* views[3]
    cdef int axes[MAX_RANK]
    cdef int i, k, a, count = 0, groups = 0, arrays = 1
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x), length
    cdef Py_ssize_t sizes[3]
    cdef int last[3]                # the innermost axis of each group of joined axes
    cdef bint joined, inner_contiguous, channels_contiguous

    views[0] = &job.x
    strides[0] = cnp.PyArray_STRIDES(x)
    job.x.data = cnp.PyArray_DATA(x)
    job.dy.data = job.y.data = NULL
    if dy is not None:
        views[arrays] = &job.dy
        strides[arrays] = cnp.PyArray_STRIDES(dy)
        job.dy.data = cnp.PyArray_DATA(dy)
        arrays += 1
    if y is not None:
        views[arrays] = &job.y
        strides[arrays] = cnp.PyArray_STRIDES(y)
        job.y.data = cnp.PyArray_DATA(y)
        arrays += 1

    # The axes longer than 1, the channels' aside, by falling stride of x.
    for a in range(cnp.PyArray_NDIM(x)):
        if a != axis and cnp.PyArray_DIM(x, a) != 1:
            i = count
            while i > 0 and strides[0][axes[i - 1]] < strides[0][a]:
                axes[i] = axes[i - 1]
                i -= 1
            axes[i] = a
            count += 1

    for i in range(count):
        a = axes[i]
        length = cnp.PyArray_DIM(x, a)
        joined = i > 0
        if joined:
            for k in range(arrays):
                joined = joined and strides[k][axes[i - 1]] == strides[k][a] * length
        if joined:
            sizes[groups - 1] *= length
        elif groups == 2:
            return False
        else:
            sizes[groups] = length
            groups += 1
        last[groups - 1] = a

    inner_contiguous = groups > 0
    channels_contiguous = True
    for k in range(arrays):
        if groups > 0:
            inner_contiguous = inner_contiguous and strides[k][last[groups - 1]] == itemsize
        channels_contiguous = channels_contiguous and (strides[k][axis] == itemsize or cnp.PyArray_DIM(x, axis) == 1)
        for i in range(cnp.PyArray_NDIM(x)):
            if strides[k][i] % itemsize != 0 and cnp.PyArray_DIM(x, i) > 1:
                return False

    job.channels = cnp.PyArray_DIM(x, axis)
    if inner_contiguous:
        job.outer = sizes[0] if groups == 2 else 1
        job.inner = sizes[groups - 1]
    elif channels_contiguous and groups < 2:
        job.outer = sizes[0] if groups == 1 else 1
        job.inner = 1
    else:
        return False
    for k in range(arrays):
        views[k].channel_stride = strides[k][axis] // itemsize
        views[k].outer_stride = strides[k][last[0]] // itemsize if groups == 2 or (groups == 1 and not inner_contiguous) else 0
    return True
