# The apply pass over contiguous arrays of 16 bits, converted in registers. A part of body.pxi.

cdef extern from "elements.h" nogil:
    void load_16(bint brain, const void* p, float* to)
    void store_16(bint brain, const float* from_, void* p, bint stream)


cdef inline void narrow_step(const Job* job, bint brain, const char* x, const char* dy, char* y, Py_ssize_t n, const float* hi, const float* lo,
                             const float* scale, const float* offset, const float* slope, int finish, bint stream, int paired) noexcept nogil:
    """The apply pass over n <= LANES elements of 16 bits, in registers."""
    cdef float x_row[LANES]
    cdef float dy_row[LANES]
    cdef float row[LANES]
    cdef char part[2 * LANES]
    if n < LANES:
        memset(part, 0, sizeof(part))
        memcpy(part, x, 2 * n)
        load_16(brain, part, x_row)
        if paired:
            memcpy(part, dy, 2 * n)
            load_16(brain, part, dy_row)
    else:
        load_16(brain, x, x_row)
        if paired:
            load_16(brain, dy, dy_row)
    transform_row(job, x_row, dy_row, row, NULL, LANES, hi, lo, scale, offset, slope, NULL, finish, False, paired)
    if n < LANES:
        store_16(brain, row, part, False)
        if stream and (<size_t>y | 2 * n) % 4 == 0:
            stream_part(y, part, 2 * n)
        else:
            memcpy(y, part, 2 * n)
    else:
        store_16(brain, row, y, stream)


cdef inline void narrow_run(const Job* job, bint brain, const char* x, const char* dy, char* y, Py_ssize_t length, const float* coefficients,
                            Py_ssize_t stride, Py_ssize_t step, int finish, bint stream, int paired) noexcept nogil:
    """The apply pass over `length` contiguous elements of 16 bits; the coefficients of each are `step` = 0 or 1 from those of the one before.

    With step 0 there are LANES of them side by side."""
    cdef Py_ssize_t j = 0
    cdef const float* at = coefficients
    if stream and step == 0:
        j = min(length, <Py_ssize_t>((32 - <size_t>y % 32) % 32 // 2))
        if j:
            narrow_step(job, brain, x, dy, y, j, at, at + stride, at + 2 * stride, at + 3 * stride, at + 4 * stride, finish, stream, paired)
    while j + LANES <= length:
        at = coefficients + j * step
        prefetch_row(x + 2 * j, 2 * LANES)
        if paired:
            prefetch_row(dy + 2 * j, 2 * LANES)
        narrow_step(job, brain, x + 2 * j, dy + 2 * j if paired else dy, y + 2 * j, LANES, at, at + stride, at + 2 * stride, at + 3 * stride,
                    at + 4 * stride, finish, stream, paired)
        j += LANES
    if j < length:
        at = coefficients + j * step
        narrow_step(job, brain, x + 2 * j, dy + 2 * j if paired else dy, y + 2 * j, length - j, at, at + stride, at + 2 * stride, at + 3 * stride,
                    at + 4 * stride, finish, stream, paired)


cdef inline void narrow_rows(const Job* job, bint brain, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, int finish, bint stream,
                             int paired) noexcept nogil:
    """The apply pass over rows of the column layout."""
    cdef const Place* x = &job.places.of[OF_DY if job.apply == FROZEN else OF_X]
    cdef const Place* dy = &job.places.of[OF_DY]
    cdef const Place* y = &job.places.of[OF_Y]
    cdef const char* x_at = place_of(job, x, n0, c0, 0)
    cdef const char* dy_at = place_of(job, dy, n0, c0, 0) if paired else NULL
    cdef char* y_at = place_of(job, y, n0, c0, 0)
    cdef Py_ssize_t n, x_step = job.fold * x.strides[0], dy_step = job.fold * dy.strides[0] if paired else 0, y_step = job.fold * y.strides[0]
    cdef const float* coefficients = <const float*>job.coefficients + c0
    cdef Py_ssize_t stride = coefficient_stride(job.columns), width = c1 - c0
    for n in range(n0, n1):
        narrow_run(job, brain, x_at, dy_at, y_at, width, coefficients, stride, 1, finish, stream, paired)
        x_at += x_step
        y_at += y_step
        if paired:
            dy_at += dy_step


cdef inline void narrow_box(const Job* job, bint brain, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                            int finish, int paired) noexcept nogil:
    """The apply pass over arrays of 16 bits whose elements are contiguous along the inner axis, or, in the column layout, the channels."""
    cdef const Place* x = &job.places.of[OF_DY if job.apply == FROZEN else OF_X]
    cdef const Place* dy = &job.places.of[OF_DY]
    cdef const Place* y = &job.places.of[OF_Y]
    cdef float splat[COEFFICIENTS * LANES]
    cdef const float* coefficients = <const float*>job.coefficients
    cdef const char* dy_at = NULL
    cdef char* y_at
    cdef Py_ssize_t n, c, j, array, stride = coefficient_stride(job.columns)
    if job.inner == 1:
        if job.stream and (<size_t>place_of(job, y, n0, c0, 0) | <size_t>(job.fold * y.strides[0])) % 32 == 0:
            narrow_rows(job, brain, n0, n1, c0, c1, finish, True, paired)
        else:
            narrow_rows(job, brain, n0, n1, c0, c1, finish, False, paired)
        return
    for n in range(n0, n1):
        for c in range(c0, c1):
            for array in range(COEFFICIENTS if paired else GATES):
                for j in range(LANES):
                    splat[array * LANES + j] = coefficients[array * stride + c]
            y_at = place_of(job, y, n, c, i0)
            if paired:
                dy_at = place_of(job, dy, n, c, i0)
            if job.stream and i1 - i0 >= STREAM_LENGTH and <size_t>y_at % 2 == 0:      # elsewhere no element is on a boundary
                narrow_run(job, brain, place_of(job, x, n, c, i0), dy_at, y_at, i1 - i0, splat, LANES, 0, finish, True, paired)
            else:
                narrow_run(job, brain, place_of(job, x, n, c, i0), dy_at, y_at, i1 - i0, splat, LANES, 0, finish, False, paired)


cdef inline void narrow(const Job* job, bint brain, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0,
                        Py_ssize_t i1) noexcept nogil:
    if job.apply == BACKWARD:
        narrow_box(job, brain, n0, n1, c0, c1, i0, i1, NOTHING, PAIRED)
    elif job.fusion:
        narrow_box(job, brain, n0, n1, c0, c1, i0, i1, ANYTHING, X_ALONE)
    else:
        narrow_box(job, brain, n0, n1, c0, c1, i0, i1, NOTHING, X_ALONE)


cdef bint apply_narrow(const Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1) noexcept nogil:
    """The apply pass over arrays of 16 bits without copies; False where something else is needed."""
    cdef const Place* y = &job.places.of[OF_Y]
    cdef int which
    if job.with_residual or (job.fusion and job.apply != FORWARD) or not y.data or (y.dtype != FLOAT16 and y.dtype != BFLOAT16):
        return False
    for which in range(ARRAYS):
        if job.places.of[which].data and not (job.places.of[which].dtype == y.dtype and contiguous(job, &job.places.of[which])):
            return False
    if not copied(job, OF_X) or job.apply != FORWARD and not copied(job, OF_DY):
        return False
    if y.dtype == FLOAT16:
        narrow(job, False, n0, n1, c0, c1, i0, i1)
    else:
        narrow(job, True, n0, n1, c0, c1, i0, i1)
    return True
