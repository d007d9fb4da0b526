# The apply pass over contiguous arrays of 16 bits, converted in registers. A part of body.pxi.

cdef inline void narrow_row(const Job* job, bint brain, const char* x, const char* dy, char* y, Py_ssize_t width, const float* at, Py_ssize_t stride,
                            Py_ssize_t step, int finish, bint stream, int paired) noexcept nogil:
    """The apply pass over a row of `width` elements of 16 bits, LANES or a multiple of LINE, in registers.

    at : the coefficients of the first LANES elements; those of the next are `step` = 0 or 1 elements further for each.
    """
    cdef float x_row[TILE]
    cdef float dy_row[TILE]
    cdef float row[TILE]
    cdef Py_ssize_t j
    for j in range(width // LANES):
        load_16(brain, x + 2 * LANES * j, x_row + LANES * j)
        if paired:
            load_16(brain, dy + 2 * LANES * j, dy_row + LANES * j)
    for j in range(width // LANES):
        transform_row(job, x_row + LANES * j, dy_row + LANES * j, row + LANES * j, NULL, LANES, at + LANES * j * step, at + stride + LANES * j * step,
                      at + 2 * stride + LANES * j * step, at + 3 * stride + LANES * j * step, NULL, finish, False, paired)
    if width == LANES:
        store_16(brain, row, y, stream)
    for j in range(width // LINE):
        store_32(brain, row + LINE * j, y + 2 * LINE * j, stream)


cdef inline void narrow_part(const Job* job, bint brain, const char* x, const char* dy, char* y, Py_ssize_t n, const float* at, Py_ssize_t stride,
                             int finish, bint stream, int paired) noexcept nogil:
    """The same for n <= LANES elements."""
    cdef char x_part[2 * LANES]
    cdef char dy_part[2 * LANES]
    cdef char y_part[2 * LANES]
    memset(x_part, 0, sizeof(x_part))
    memcpy(x_part, x, 2 * n)
    if paired:
        memset(dy_part, 0, sizeof(dy_part))
        memcpy(dy_part, dy, 2 * n)
    narrow_row(job, brain, x_part, dy_part, y_part, LANES, at, stride, 0, finish, False, paired)
    if stream and (<size_t>y | 2 * n) % 4 == 0:
        stream_part(y, y_part, 2 * n)
    else:
        memcpy(y, y_part, 2 * n)


cdef inline Py_ssize_t to_line(const char* y) noexcept nogil:
    """The elements from y to where a cache line begins."""
    return <Py_ssize_t>((2 * LINE - <size_t>y % (2 * LINE)) % (2 * LINE) // 2)


cdef inline void narrow_run(const Job* job, bint brain, const char* x, const char* dy, char* y, Py_ssize_t length, const float* coefficients,
                            Py_ssize_t stride, Py_ssize_t step, int finish, bint stream, int paired) noexcept nogil:
    """The apply pass over `length` contiguous elements of 16 bits; the coefficients of each are `step` = 0 or 1 from those of the one before.

    With step 0 there are LANES of them side by side, and, past the caches, whole lines leave."""
    cdef Py_ssize_t j = 0, n, head = min(length, to_line(y)) if stream and step == 0 else 0
    while j < head:
        n = min(head - j, LANES)
        narrow_part(job, brain, x + 2 * j, dy + 2 * j if paired else dy, y + 2 * j, n, coefficients, stride, finish, stream, paired)
        j += n
    while j + LINE <= length:
        prefetch_row(x + 2 * j, 2 * LINE)
        if paired:
            prefetch_row(dy + 2 * j, 2 * LINE)
        narrow_row(job, brain, x + 2 * j, dy + 2 * j if paired else dy, y + 2 * j, LINE, coefficients + j * step, stride, step, finish, stream, paired)
        j += LINE
    while j < length:
        n = min(length - j, LANES)
        if n == LANES and (not stream or <size_t>(y + 2 * j) % (2 * LANES) == 0):
            narrow_row(job, brain, x + 2 * j, dy + 2 * j if paired else dy, y + 2 * j, LANES, coefficients + j * step, stride, step, finish, stream,
                       paired)
        else:
            narrow_part(job, brain, x + 2 * j, dy + 2 * j if paired else dy, y + 2 * j, n, coefficients + j * step, stride, finish, stream, paired)
        j += n


cdef inline void narrow_tile(const Job* job, bint brain, const char* x, Py_ssize_t x_step, const char* dy, Py_ssize_t dy_step, char* y,
                             Py_ssize_t y_step, Py_ssize_t rows, const float* coefficients, Py_ssize_t stride, int finish, bint stream,
                             int paired) noexcept nogil:
    """The apply pass over `rows` rows of TILE columns, their coefficients in registers."""
    cdef float at[COEFFICIENTS * TILE]
    cdef Py_ssize_t i, j, array
    for array in range(COEFFICIENTS if paired else GATES):
        for j in range(TILE):
            at[array * TILE + j] = coefficients[array * stride + j]
    for i in range(rows):
        prefetch_row(x, 2 * TILE)
        if paired:
            prefetch_row(dy, 2 * TILE)
        narrow_row(job, brain, x, dy, y, TILE, at, TILE, 1, finish, stream, paired)
        x += x_step
        y += y_step
        if paired:
            dy += dy_step


cdef inline void narrow_rows(const Job* job, bint brain, const char* x, Py_ssize_t x_step, const char* dy, Py_ssize_t dy_step, char* y,
                             Py_ssize_t y_step, Py_ssize_t rows, Py_ssize_t width, const float* coefficients, int finish, bint stream,
                             int paired) noexcept nogil:
    """The apply pass over rows of the column layout, in blocks of some rows, tile by tile; row by row where a line past the caches would leave in two."""
    cdef Py_ssize_t c, i, n = 0, some, stride = coefficient_stride(job.columns), most = max(REGISTERED, BLOCK // width)
    cdef bint by_tile = width == TILE or not stream
    while n < rows:
        some = min(rows - n, most)
        c = 0
        while c < width:
            if by_tile and c + TILE <= width:
                narrow_tile(job, brain, x + 2 * c, x_step, dy + 2 * c if paired else dy, dy_step, y + 2 * c, y_step, some, coefficients + c, stride,
                            finish, stream, paired)
            else:
                for i in range(some):
                    narrow_run(job, brain, x + 2 * c + i * x_step, dy + 2 * c + i * dy_step if paired else dy, y + 2 * c + i * y_step, width - c,
                               coefficients + c, stride, 1, finish, stream, paired)
                c = width
            c += TILE
        x += some * x_step
        y += some * y_step
        if paired:
            dy += some * dy_step
        n += some


cdef inline void narrow_columns(const Job* job, bint brain, const char* x, Py_ssize_t x_step, const char* dy, Py_ssize_t dy_step, char* y,
                                Py_ssize_t y_step, Py_ssize_t rows, Py_ssize_t width, const float* coefficients, int finish,
                                int paired) noexcept nogil:
    """The apply pass over rows of the column layout; where they are one stretch of memory, they begin on boundaries, as in apply_box."""
    cdef Py_ssize_t head = 0, stride = coefficient_stride(job.columns), last = (rows - 1) * y_step
    if job.stream and width == job.columns and width % LANES == 0 and x_step == 2 * width and y_step == x_step and (
            not paired or dy_step == x_step) and <size_t>y % 2 == 0:
        head = to_line(y) % width
    if head:
        narrow_run(job, brain, x, dy, y, head, coefficients, stride, 1, finish, True, paired)
        x += 2 * head
        y += 2 * head
        if paired:
            dy += 2 * head
        coefficients += head
        rows -= 1
    if job.stream and (<size_t>y | y_step) % 32 == 0:
        narrow_rows(job, brain, x, x_step, dy, dy_step, y, y_step, rows, width, coefficients, finish, True, paired)
    else:
        narrow_rows(job, brain, x, x_step, dy, dy_step, y, y_step, rows, width, coefficients, finish, False, paired)
    if head:
        narrow_run(job, brain, x + last, dy + last if paired else dy, y + last, width - head, coefficients, stride, 1, finish, True, paired)


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
        if paired:
            dy_at = place_of(job, dy, n0, c0, 0)
        narrow_columns(job, brain, place_of(job, x, n0, c0, 0), job.fold * x.strides[0], dy_at, job.fold * dy.strides[0] if paired else 0,
                       place_of(job, y, n0, c0, 0), job.fold * y.strides[0], n1 - n0, c1 - c0, coefficients + c0, finish, paired)
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
