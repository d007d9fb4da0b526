# Arrays that the loops can't use where they are: boxes of them are copied, piece by piece. A part of body.pxi.

cdef extern from "elements.h" nogil:
    void load_float32(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t)
    void load_float16(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t)
    void load_bfloat16(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t)
    void load_int8(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t)
    void load_uint8(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t)
    void load_int16(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t)
    void load_uint16(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, float*, Py_ssize_t)
    void load_float64(bint, const char*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, double*, Py_ssize_t)
    void store_float32(bint, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, char*, Py_ssize_t, Py_ssize_t, bint)
    void store_float16(bint, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, char*, Py_ssize_t, Py_ssize_t, bint)
    void store_bfloat16(bint, const float*, Py_ssize_t, Py_ssize_t, Py_ssize_t, char*, Py_ssize_t, Py_ssize_t, bint)
    void store_float64(bint, const double*, Py_ssize_t, Py_ssize_t, Py_ssize_t, char*, Py_ssize_t, Py_ssize_t, bint)

cdef void move_block(const Place* place, char* at, Py_ssize_t row_stride, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t width, real* copy,
                     Py_ssize_t step, bint store, bint stream) noexcept nogil:
    """Copy `rows` rows of `width` elements from the array to `copy`, or, if store, the other way. Strides in bytes, `step` in elements."""
    if real is double:
        if store:
            store_float64(place.swapped, copy, step, rows, width, at, row_stride, stride, stream)
        else:
            load_float64(place.swapped, at, row_stride, stride, rows, width, copy, step)
    elif store:
        if place.dtype == FLOAT16:
            store_float16(place.swapped, copy, step, rows, width, at, row_stride, stride, stream)
        elif place.dtype == BFLOAT16:
            store_bfloat16(place.swapped, copy, step, rows, width, at, row_stride, stride, stream)
        else:
            store_float32(place.swapped, copy, step, rows, width, at, row_stride, stride, stream)
    elif place.dtype == FLOAT16:
        load_float16(place.swapped, at, row_stride, stride, rows, width, copy, step)
    elif place.dtype == BFLOAT16:
        load_bfloat16(place.swapped, at, row_stride, stride, rows, width, copy, step)
    elif place.dtype == INT8:
        load_int8(place.swapped, at, row_stride, stride, rows, width, copy, step)
    elif place.dtype == UINT8:
        load_uint8(place.swapped, at, row_stride, stride, rows, width, copy, step)
    elif place.dtype == INT16:
        load_int16(place.swapped, at, row_stride, stride, rows, width, copy, step)
    elif place.dtype == UINT16:
        load_uint16(place.swapped, at, row_stride, stride, rows, width, copy, step)
    else:
        load_float32(place.swapped, at, row_stride, stride, rows, width, copy, step)


cdef inline Py_ssize_t offset_of(const Places* places, const Place* place, int first, int end, Py_ssize_t index) noexcept nogil:
    """The bytes to an element whose axes from first to end, seen as one, have that index."""
    cdef Py_ssize_t offset = 0
    cdef int a
    for a in range(end - 1, first, -1):
        offset += index % places.lengths[a] * place.strides[a]
        index //= places.lengths[a]
    return offset + index * place.strides[first] if end > first else offset


cdef inline char* place_of(const Job* job, const Place* place, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i) noexcept nogil:
    """Where element (n, c, i) of a regular array is."""
    if job.inner == 1:
        return <char*>place.data + n * job.fold * place.strides[0] + c * place.channel_stride
    return <char*>place.data + (n * place.strides[0] if job.places.outer_axes else 0) + c * place.channel_stride + i * place.strides[job.places.axes - 1]


cdef inline bint contiguous(const Job* job, const Place* place) noexcept nogil:
    """Whether elements along the inner axis, or, in the column layout, the columns, follow one another in native byte order."""
    cdef Py_ssize_t step = place.channel_stride if job.inner == 1 else place.strides[job.places.axes - 1]
    return place.regular and not place.swapped and step == 2


cdef void move_box(const Job* job, int which, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t length,
                   real* copy, bint store) noexcept nogil:
    """Copy a box of an array, of `rows` rows x `width` columns x `length` inner indices from (n, c, i) on, to `copy` (or from it), where it is
    contiguous."""
    cdef const Places* places = job.places
    cdef const Place* place = &places.of[which]
    cdef char* at
    cdef Py_ssize_t pixel, channel, k, part, end, row
    cdef int last = places.axes - 1
    if place.regular and job.inner == 1:
        move_block(place, place_of(job, place, n, c, i), job.fold * place.strides[0], place.channel_stride, rows, width, copy, width, store, job.stream)
    elif place.regular:
        for row in range(n, n + rows):
            move_block(place, place_of(job, place, row, c, i), place.channel_stride, place.strides[last], width, length, copy, length, store, job.stream)
            copy += width * length
    elif job.inner == 1:
        for row in range(n, n + rows):
            k = row * job.columns + c
            end = k + width
            while k < end:
                pixel = k // job.channels
                part = min(end - k, (pixel + 1) * job.channels - k)
                at = <char*>place.data + offset_of(places, place, 0, places.axes, pixel) + k % job.channels * place.channel_stride
                move_block(place, at, 0, place.channel_stride, 1, part, copy, 0, store, job.stream)
                copy += part
                k += part
    else:
        for row in range(n, n + rows):
            for channel in range(c, c + width):
                k = i
                while k < i + length:
                    part = min(i + length - k, places.lengths[last] - k % places.lengths[last])
                    at = <char*>place.data + offset_of(places, place, 0, places.outer_axes, row) + channel * place.channel_stride \
                        + offset_of(places, place, places.outer_axes, places.axes, k)
                    move_block(place, at, 0, place.strides[last], 1, part, copy, 0, store, job.stream)
                    copy += part
                    k += part


cdef inline real* copy_of(const Job* job, int which, real* kind) noexcept nogil:
    return <real*>job.copies + which * COPIED


cdef inline const real* element(const View* view, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, const real* kind) noexcept nogil:
    """The address of view[n, c, i]; `kind` only tells the element type."""
    return <const real*>view.data + (n * view.outer_stride + c * view.channel_stride + i)


cdef inline bint copied(const Job* job, int which) noexcept nogil:
    return job.places != NULL and job.places.of[which].data != NULL


cdef inline const real* readable(const Job* job, int which, const View* view, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, Py_ssize_t rows,
                                 Py_ssize_t width, Py_ssize_t length, Py_ssize_t* stride, const real* kind) noexcept nogil:
    """Where a box of an array can be read: where it is, or in this thread's copy of it. Sets the stride from row to row."""
    if not copied(job, which):
        stride[0] = view.outer_stride
        return element(view, n, c, i, kind)
    stride[0] = width * length
    move_box(job, which, n, c, i, rows, width, length, copy_of(job, which, <real*>kind), False)
    if which == OF_X and job.with_residual and job.reduction == GRADIENTS:
        move_box(job, OF_RESIDUAL, n, c, i, rows, width, length, copy_of(job, OF_RESIDUAL, <real*>kind), False)
    return copy_of(job, which, <real*>kind)


cdef inline double value(const Job* job, int which, const View* view, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, const real* kind) noexcept nogil:
    cdef Py_ssize_t stride
    return readable(job, which, view, n, c, i, 1, 1, 1, &stride, kind)[0]
