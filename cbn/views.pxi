# Arrays as the kernels see them: (outer, channels, inner) with strides.

cdef int dtype_of(cnp.ndarray a) noexcept:
    """The kernels' name of a type of elements, or -1."""
    cdef int typenum = cnp.PyArray_TYPE(a)
    if typenum == cnp.NPY_FLOAT32:
        return FLOAT32
    if typenum == cnp.NPY_FLOAT64:
        return FLOAT64
    if typenum == cnp.NPY_FLOAT16:
        return FLOAT16
    if typenum == cnp.NPY_UINT8:
        return UINT8
    if typenum == cnp.NPY_INT8:
        return INT8
    if typenum == cnp.NPY_UINT16:
        return UINT16
    if typenum == cnp.NPY_INT16:
        return INT16
    if is_bfloat16(a):
        return BFLOAT16
    return -1


cdef bint is_bfloat16(cnp.ndarray a) noexcept:
    """Whether elements are those of ml_dtypes, whose type NumPy knows once that package has been imported by someone."""
    return cnp.PyArray_TYPE(a) >= NPY_USERDEF and a.dtype.name == "bfloat16"


cdef bint plain(cnp.ndarray a, int dtype) noexcept:
    """Whether elements can be read where they are: of this type, in native byte order, aligned."""
    return dtype_of(a) == dtype and PyArray_ISNOTSWAPPED(a) and PyArray_ISALIGNED(a)


cdef int stored_as(cnp.ndarray x) noexcept:
    """The type of elements that kernels take where they are: x's, if there are kernels for it."""
    cdef int dtype = dtype_of(x)
    return dtype if dtype <= BFLOAT16 else FLOAT32


cdef bint alike(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether `a`, which may be None, can be used with the strides of b, an array of the same shape and type."""
    cdef int i
    if a is None:
        return True
    for i in range(cnp.PyArray_NDIM(b)):
        if cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i) and cnp.PyArray_DIM(b, i) > 1:
            return False
    return PyArray_ISNOTSWAPPED(a) and PyArray_ISALIGNED(a)


# The axes that make up the outer axis of a view, and after them those of the inner one; without those of length 1.
ctypedef struct Axes:
    int outer
    int count
    int of[MAX_AXES]


cdef bint view_together(Job* job, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray y, Axes* chosen) noexcept:
    """Fill the job's shape and views from arrays of one shape (dy and y may be None); False where they have no view in common.

    The row layout needs the axes other than the channels' to join into two, the inner one contiguous; the column layout needs the channels
    contiguous and the other axes to join into one. As the cut decides the bits of sums, it must be that of a dense array, whose channels these are: where
    the channels lie in x's memory may tell one array from another, gaps and the order of the other axes may not.
    chosen : if not NULL, is set to the axes of this view.
    """
    cdef cnp.npy_intp* strides[3]
    cdef View* views[3]
    cdef int axes[MAX_AXES]
    cdef int i, k, a, count = 0, groups = 0, arrays = 1
    cdef int before = 0             # axes before the channels'
    cdef Py_ssize_t length, step, next_step
    cdef Py_ssize_t itemsizes[3]
    cdef Py_ssize_t sizes[3]
    cdef int first[3]               # of each group of joined axes
    cdef int last[3]                # the innermost axis of each
    cdef bint joined, inner_contiguous, channels_contiguous

    views[0] = &job.x
    itemsizes[0] = cnp.PyArray_ITEMSIZE(x)
    strides[0] = cnp.PyArray_STRIDES(x)
    job.x.data = cnp.PyArray_DATA(x)
    job.dy.data = job.y.data = NULL
    if dy is not None:
        views[arrays] = &job.dy
        itemsizes[arrays] = cnp.PyArray_ITEMSIZE(dy)
        strides[arrays] = cnp.PyArray_STRIDES(dy)
        job.dy.data = cnp.PyArray_DATA(dy)
        arrays += 1
    if y is not None:
        views[arrays] = &job.y
        itemsizes[arrays] = cnp.PyArray_ITEMSIZE(y)
        strides[arrays] = cnp.PyArray_STRIDES(y)
        job.y.data = cnp.PyArray_DATA(y)
        arrays += 1

    for a in range(cnp.PyArray_NDIM(x)):
        if a != axis and cnp.PyArray_DIM(x, a) != 1:
            axes[count] = a
            count += 1
            before += a < axis

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
            first[groups] = i
            groups += 1
        last[groups - 1] = a

    inner_contiguous = groups > 0
    channels_contiguous = True
    for k in range(arrays):
        if groups > 0:
            inner_contiguous = inner_contiguous and strides[k][last[groups - 1]] == itemsizes[k]
        channels_contiguous = channels_contiguous and (strides[k][axis] == itemsizes[k] or cnp.PyArray_DIM(x, axis) == 1)
        for i in range(cnp.PyArray_NDIM(x)):
            if strides[k][i] % itemsizes[k] != 0 and cnp.PyArray_DIM(x, i) > 1:
                return False

    job.channels = cnp.PyArray_DIM(x, axis)
    if groups > 0 and job.channels == 1:        # of a dense array, all other axes join
        inner_contiguous, channels_contiguous = inner_contiguous and groups == 1, False
    elif groups > 0:
        step, next_step = abs(strides[0][axis]), strides[0][last[0]]
        inner_contiguous = inner_contiguous and ((first[1] if groups == 2 else 0) == before
                                                 or step >= sizes[groups - 1] * itemsizes[0] and (groups == 1 or next_step >= step * job.channels))
        channels_contiguous = channels_contiguous and (before == count or next_step >= step * job.channels)
    if inner_contiguous:
        job.outer = sizes[0] if groups == 2 else 1
        job.inner = sizes[groups - 1]
    elif channels_contiguous and groups < 2:
        job.outer = sizes[0] if groups == 1 else 1
        job.inner = 1
    else:
        return False
    for k in range(arrays):
        views[k].channel_stride = strides[k][axis] // itemsizes[k]
        views[k].outer_stride = strides[k][last[0]] // itemsizes[k] if groups == 2 or (groups == 1 and not inner_contiguous) else 0
    if chosen != NULL:
        chosen.count = count
        chosen.outer = first[groups - 1] if inner_contiguous else count
        for i in range(count):
            chosen.of[i] = axes[i]
    return True


cdef int place_arrays(Job* job, Places* places, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray residual, cnp.ndarray y,
                      cnp.ndarray residual_grad) except -1:
    """Set the job's views of the arrays that can be used where they are, and the places of those of which pieces must be copied.

    Where the arrays have no view in common, that of C-contiguous ones is taken, so that results are those of such copies.
    """
    cdef Axes axes
    cdef bint where_they_are[ARRAYS]
    cdef int which
    arrays = (x, residual, dy, y, residual_grad)        # as OF_X and so on count
    if not view_together(job, axis, x, dy, y, &axes):
        in_order = np.lib.stride_tricks.as_strided(np.empty(1, np.uint8), np.shape(x), contiguous_strides(np.shape(x), 1))
        view_together(job, axis, in_order, None, None, &axes)
    cut_channels(job)
    where_they_are[OF_X] = view_alone(job, &job.x, &axes, axis, x) and alike(residual, x)
    where_they_are[OF_RESIDUAL] = where_they_are[OF_X]
    where_they_are[OF_DY] = view_alone(job, &job.dy, &axes, axis, dy)
    where_they_are[OF_Y] = view_alone(job, &job.y, &axes, axis, y) and alike(residual_grad, y)
    where_they_are[OF_RESIDUAL_GRAD] = where_they_are[OF_Y]
    copied = [a for which, a in enumerate(arrays) if a is not None and not where_they_are[which]]
    if copied:
        job.places = places
        join_axes(places, &axes, copied)
    for which, a in enumerate(arrays):
        places.of[which].data = NULL
        if a is not None and not where_they_are[which]:
            place(job, places, &axes, &places.of[which], axis, a)
    return 0


cdef tuple contiguous_strides(tuple shape, Py_ssize_t itemsize):
    strides, step = [], itemsize
    for length in reversed(shape):
        strides.insert(0, step)
        step *= length
    return tuple(strides)


cdef bint view_alone(Job* job, View* view, const Axes* axes, int axis, cnp.ndarray a):
    """Set the view of an array where these axes, and pixels that are folded, allow one."""
    cdef int i
    cdef Py_ssize_t item, pixels = 0
    if a is None:
        return True
    item = cnp.PyArray_ITEMSIZE(a)
    if not plain(a, job.dtype):
        return False
    for i in range(1, axes.count):
        if i != axes.outer and cnp.PyArray_STRIDE(a, axes.of[i - 1]) != cnp.PyArray_STRIDE(a, axes.of[i]) * cnp.PyArray_DIM(a, axes.of[i]):
            return False
    if axes.outer:
        pixels = cnp.PyArray_STRIDE(a, axes.of[axes.outer - 1])
    view.data = cnp.PyArray_DATA(a)
    view.outer_stride = pixels // item * job.fold
    view.channel_stride = cnp.PyArray_STRIDE(a, axis) // item if cnp.PyArray_DIM(a, axis) > 1 else 1
    if pixels % item or job.channels > 1 and cnp.PyArray_STRIDE(a, axis) % item:
        return False
    if job.inner > 1 and cnp.PyArray_STRIDE(a, axes.of[axes.count - 1]) != item:
        return False
    if not job.by_columns:
        return True
    if job.inner > 1 and (job.channels == 1 or view.channel_stride == job.inner):
        view.channel_stride = 1
    return view.channel_stride == 1 and (job.fold == 1 or pixels == job.channels * item)


cdef int join_axes(Places* places, Axes* axes, list arrays) except -1:
    """Set the lengths of the axes, having joined neighbours that are one to all the arrays; of joined axes, the last one's strides hold."""
    cdef cnp.ndarray a
    cdef int i, count = 0, outer = 0
    cdef bint joined
    for i in range(axes.count):
        length = np.shape(arrays[0])[axes.of[i]]
        joined = i > 0 and i != axes.outer
        for a in arrays:
            joined = joined and cnp.PyArray_STRIDE(a, axes.of[i - 1]) == cnp.PyArray_STRIDE(a, axes.of[i]) * length
        if joined:
            count -= 1
            length *= places.lengths[count]
        places.lengths[count] = length
        axes.of[count] = axes.of[i]
        count += 1
        if i < axes.outer:
            outer = count
    places.axes = count
    places.outer_axes = outer
    return 0


cdef int place(Job* job, Places* places, const Axes* axes, Place* a_place, int axis, cnp.ndarray a) except -1:
    cdef int i
    a_place.data = cnp.PyArray_DATA(a)
    a_place.dtype = dtype_of(a)
    a_place.swapped = not PyArray_ISNOTSWAPPED(a)
    a_place.channel_stride = cnp.PyArray_STRIDE(a, axis)
    a_place.strides[0] = 0
    for i in range(places.axes):
        a_place.strides[i] = cnp.PyArray_STRIDE(a, axes.of[i])
    return 0
