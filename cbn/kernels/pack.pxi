# Where elements can be read and written: where they are or, of arrays that lanes can't take there, in a copy of a box of them.

ctypedef struct Box:
    # Rows [n, n + rows) x columns [c, c + width) x inner indices [i, i + length).
    Py_ssize_t n, c, i, rows, width, length


cdef inline Box box(Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t length) noexcept nogil:
    cdef Box b
    b.n, b.c, b.i, b.rows, b.width, b.length = n, c, i, rows, width, length
    return b


cdef inline bint copied(const Job* job, int which) noexcept nogil:
    """Whether boxes of an array are copied, as its elements are of another type or byte order, misaligned, or in no order that a View can tell."""
    return job.places != NULL and job.places.of[which].data != NULL


cdef inline const View* view_of(const Job* job, int which) noexcept nogil:
    return &job.dy if which == OF_DY else &job.y if which >= OF_Y else &job.x


cdef inline elem* element(const Job* job, int which, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i) noexcept nogil:
    """The address of an element of an array that isn't copied."""
    cdef const View* view = view_of(job, which)
    cdef Py_ssize_t offset = job.residual if which == OF_RESIDUAL else job.residual_grad if which == OF_RESIDUAL_GRAD else 0
    return <elem*>(<char*>(<elem*>view.data + (n * view.outer_stride + c * view.channel_stride + i)) + offset)


cdef inline Py_ssize_t copy_step(const Box* b) noexcept nogil:
    """From row to row of a copy: enough for lanes that end where a row does."""
    return max(b.width * b.length, LANES)


cdef inline elem* copy_of(const Job* job, int which, const Box* b) noexcept nogil:
    """Where this thread's copy of a box begins."""
    return <elem*>job.copies_at + which * COPIED + (copy_step(b) - b.width * b.length)


cdef inline elem* where(const Job* job, int which, const Box* b, Py_ssize_t* step) noexcept nogil:
    """Where a box of an array is for lanes to be read or written: where it is, or in a copy. Sets the step from row to row."""
    if not copied(job, which) and b.width * b.length >= LANES:
        step[0] = view_of(job, which).outer_stride
        return element(job, which, b.n, b.c, b.i)
    step[0] = copy_step(b)
    return copy_of(job, which, b)


cdef inline const elem* readable(const Job* job, int which, const Box* b, Py_ssize_t* step) noexcept nogil:
    """The same, with the elements there."""
    cdef elem* at = where(job, which, b, step)
    if copied(job, which) or b.width * b.length < LANES:
        move_box(job, which, b, at, False)
    return at


cdef inline void put_back(const Job* job, int which, const Box* b) noexcept nogil:
    """Write a copy that has been computed to its array."""
    if copied(job, which) or b.width * b.length < LANES:
        move_box(job, which, b, copy_of(job, which, b), True)


cdef void move_box(const Job* job, int which, const Box* b, elem* copy, bint to_array) noexcept nogil:
    """Copy a box of an array to `copy`, or the other way."""
    cdef Py_ssize_t row, c
    cdef elem* at
    for row in range(b.rows):
        if copied(job, which):
            move_row(job, which, b, b.n + row, copy, to_array)
        else:
            for c in range(b.width):
                at = element(job, which, b.n + row, b.c + c, b.i)
                memcpy(at if to_array else copy + c * b.length, copy + c * b.length if to_array else at, b.length * sizeof(elem))
        copy += copy_step(b)


cdef inline Py_ssize_t offset_of(const Places* places, const Place* place, int first, int end, Py_ssize_t index) noexcept nogil:
    """The bytes to an element whose axes from first to end, seen as one, have that index."""
    cdef Py_ssize_t offset = 0
    cdef int a
    for a in range(end - 1, first, -1):
        offset += index % places.lengths[a] * place.strides[a]
        index //= places.lengths[a]
    return offset + index * place.strides[first] if end > first else offset


cdef void move_row(const Job* job, int which, const Box* b, Py_ssize_t n, elem* copy, bint to_array) noexcept nogil:
    """A row of a box, in stretches of one stride: of neighbouring channels, or along the innermost axis."""
    cdef const Places* places = job.places
    cdef const Place* place = &places.of[which]
    cdef bint pixels = job.by_columns and job.inner == 1        # whose channels are neighbours
    cdef int outer = places.axes if pixels else places.outer_axes
    cdef Py_ssize_t longest = 1 if pixels or places.axes == outer else places.lengths[places.axes - 1]
    cdef Py_ssize_t stride = place.channel_stride if pixels else place.strides[places.axes - 1]
    cdef Py_ssize_t channel, pixel, inner, part, k = 0, end = b.width * b.length, column
    while k < end:
        if pixels:
            column = n * job.columns + b.c + k
            pixel, channel, inner = column // job.channels, column % job.channels, 0
            part = job.channels - channel
        elif job.by_columns:
            pixel, channel, inner = n, (b.c + k) // job.inner, (b.c + k) % job.inner
            part = min(job.inner - inner, longest - inner % longest)
        else:
            pixel, channel, inner = n, b.c + k // b.length, b.i + k % b.length
            part = min(b.length - k % b.length, longest - inner % longest)
        part = min(part, end - k)
        move(place, <char*>place.data + offset_of(places, place, 0, outer, pixel) + channel * place.channel_stride
             + offset_of(places, place, outer, places.axes, inner), stride, part, copy + k, to_array, job.stream)
        k += part


cdef void move(const Place* place, char* at, Py_ssize_t stride, Py_ssize_t n, elem* copy, bint to_array, bint stream) noexcept nogil:
    """n elements of any type, `stride` bytes apart, to or from those that are computed with."""
    if to_array:
        store_elements(place.dtype, place.swapped, <const real*>copy, n, at, stride, stream)
    else:
        load_elements(place.dtype, place.swapped, at, stride, n, <real*>copy)
