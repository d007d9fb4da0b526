# The loops of batch normalization: the only place where elements meet arithmetic. Written once, compiled for each CPU level.
#
# A channel's elements are taken as a matrix of rows: in the column layout (inner == 1) a row holds neighbouring channels, in the row layout
# (inner > 1) it holds LANES neighbouring elements of one channel. Either way the loops below run down the rows with one independent
# accumulator a column, which is what makes them vectorize, and what makes the results the same bits at every vector width.
#
# The order of every sum is fixed by the shape: 8 rows are added as a tree, the trees of up to FLUSH rows in sequence, these in float64.

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport prange
from libc.float cimport DBL_MAX
from libc.math cimport INFINITY, NAN, fabs, sqrt

from .plan cimport LANES, ceil_div
from .table cimport BACKWARD, FLOAT32, FORWARD, FROZEN, GRADIENTS, MOMENTS, Job, Table, View

cdef extern from "stream.h" nogil:
    void stream_store(void* destination, const void* source, size_t bytes)
    void stream_fence()

ctypedef fused real:            # of the elements
    float
    double

ctypedef fused wide:            # of the accumulators: as the elements, or wider
    float
    double

cdef enum:
    TILE = 64                   # channels of the column layout handled side by side
    FLUSH = 256                 # rows summed in the accumulators' own precision
    BLOCK = 8192                # elements of a block of pixels that the apply pass walks tile by tile


cdef inline bint finite(double a) noexcept nogil:
    return fabs(a) <= DBL_MAX


# ---- reductions ------------------------------------------------------------------------------------------------------------------------

cdef inline wide sum8(wide a0, wide a1, wide a2, wide a3, wide a4, wide a5, wide a6, wide a7) noexcept nogil:
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))


cdef inline void accumulate(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, Py_ssize_t rows, Py_ssize_t width,
                            const wide* shift, wide* s, wide* q, bint paired) noexcept nogil:
    """With b = x - shift, and a = dy if paired else b: s += sum of a, q += sum of a * b, down the rows of each column."""
    cdef Py_ssize_t j, row = 0
    cdef wide c, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7
    while row + 8 <= rows:
        for j in range(width):
            c = shift[j]
            b0 = <wide>x[j] - c
            b1 = <wide>x[j + x_stride] - c
            b2 = <wide>x[j + 2 * x_stride] - c
            b3 = <wide>x[j + 3 * x_stride] - c
            b4 = <wide>x[j + 4 * x_stride] - c
            b5 = <wide>x[j + 5 * x_stride] - c
            b6 = <wide>x[j + 6 * x_stride] - c
            b7 = <wide>x[j + 7 * x_stride] - c
            if paired:
                a0 = <wide>dy[j]
                a1 = <wide>dy[j + dy_stride]
                a2 = <wide>dy[j + 2 * dy_stride]
                a3 = <wide>dy[j + 3 * dy_stride]
                a4 = <wide>dy[j + 4 * dy_stride]
                a5 = <wide>dy[j + 5 * dy_stride]
                a6 = <wide>dy[j + 6 * dy_stride]
                a7 = <wide>dy[j + 7 * dy_stride]
            else:
                a0, a1, a2, a3, a4, a5, a6, a7 = b0, b1, b2, b3, b4, b5, b6, b7
            s[j] += sum8(a0, a1, a2, a3, a4, a5, a6, a7)
            q[j] += sum8(a0 * b0, a1 * b1, a2 * b2, a3 * b3, a4 * b4, a5 * b5, a6 * b6, a7 * b7)
        row += 8
        x += 8 * x_stride
        if paired:
            dy += 8 * dy_stride
    while row < rows:
        for j in range(width):
            b0 = <wide>x[j] - shift[j]
            a0 = <wide>dy[j] if paired else b0
            s[j] += a0
            q[j] += a0 * b0
        row += 1
        x += x_stride
        if paired:
            dy += dy_stride


cdef inline void flush(wide* s, wide* q, Py_ssize_t width, double* total_s, double* total_q) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        total_s[j] += s[j]
        total_q[j] += q[j]
        s[j] = 0
        q[j] = 0


cdef inline void tile_sums(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, Py_ssize_t rows, Py_ssize_t width,
                           const wide* shift, double* total_s, double* total_q, bint paired) noexcept nogil:
    cdef wide c[TILE]
    cdef wide s[TILE]
    cdef wide q[TILE]
    cdef Py_ssize_t j, row = 0
    for j in range(width):
        c[j] = shift[j]
        s[j] = 0
        q[j] = 0
    while row < rows:
        accumulate(x + row * x_stride, x_stride, dy + row * dy_stride if paired else dy, dy_stride, min(FLUSH, rows - row), width, c, s, q, paired)
        flush(s, q, width, total_s, total_q)
        row += FLUSH


cdef void column_sums(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, Py_ssize_t rows, Py_ssize_t width,
                      const wide* shift, double* total_s, double* total_q, bint paired) noexcept nogil:
    """Sums of `width` <= TILE channels over `rows` pixels; the usual widths are constants of the inlined loops."""
    if width == TILE:
        tile_sums(x, x_stride, dy, dy_stride, rows, TILE, shift, total_s, total_q, paired)
    elif width == TILE // 2:
        tile_sums(x, x_stride, dy, dy_stride, rows, TILE // 2, shift, total_s, total_q, paired)
    else:
        tile_sums(x, x_stride, dy, dy_stride, rows, width, shift, total_s, total_q, paired)


cdef void row_sums(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, Py_ssize_t rows, Py_ssize_t length,
                   wide shift, double* total_s, double* total_q, bint paired) noexcept nogil:
    """Sums of one channel over `rows` segments of `length` contiguous elements."""
    cdef wide c[LANES]
    cdef wide s[LANES]
    cdef wide q[LANES]
    cdef double lanes_s[LANES]
    cdef double lanes_q[LANES]
    cdef Py_ssize_t i, j, row, part, rest, filled = 0
    for j in range(LANES):
        c[j] = shift
        s[j] = 0
        q[j] = 0
        lanes_s[j] = 0
        lanes_q[j] = 0
    for row in range(rows):
        i = 0
        while i < length:
            part = min(length - i, FLUSH * LANES)
            if filled + part > FLUSH * LANES:
                flush(s, q, LANES, lanes_s, lanes_q)
                filled = 0
            rest = part % LANES
            accumulate(x + i, LANES, dy + i if paired else dy, LANES, part // LANES, LANES, c, s, q, paired)
            i += part
            filled += part
            if rest:
                accumulate(x + i - rest, LANES, dy + i - rest if paired else dy, LANES, 1, rest, c, s, q, paired)
        x += x_stride
        if paired:
            dy += dy_stride
    flush(s, q, LANES, lanes_s, lanes_q)
    j = LANES // 2
    while j > 0:
        for i in range(j):
            lanes_s[i] += lanes_s[i + j]
            lanes_q[i] += lanes_q[i + j]
        j //= 2
    total_s[0] += lanes_s[0]
    total_q[0] += lanes_q[0]


ctypedef struct Chunk:
    # Outer indices [n0, n1) x inner indices [i0, i1) of a channel.
    Py_ssize_t n0, n1, i0, i1


cdef inline Chunk chunk_of(const Job* job, Py_ssize_t k) noexcept nogil:
    cdef Chunk chunk
    cdef Py_ssize_t pieces = ceil_div(job.inner, job.chunk_inner)
    chunk.n0 = k // pieces * job.chunk_outer
    chunk.n1 = min(chunk.n0 + job.chunk_outer, job.outer)
    chunk.i0 = k % pieces * job.chunk_inner
    chunk.i1 = min(chunk.i0 + job.chunk_inner, job.inner)
    return chunk


cdef inline const real* element(const View* view, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, const real* kind) noexcept nogil:
    """The address of view[n, c, i]; `kind` only tells the element type."""
    return <const real*>view.data + (n * view.outer_stride + c * view.channel_stride + i)


cdef inline void chunk_sums(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const wide* shift,
                            double* total_s, double* total_q, bint paired, const real* kind) noexcept nogil:
    """Sums over a chunk for `width` channels from c0 on: up to TILE in the column layout, one in the row layout."""
    cdef Py_ssize_t j, rows = chunk.n1 - chunk.n0
    cdef const real* x = element(&job.x, chunk.n0, c0, chunk.i0, kind)
    cdef const real* dy = element(&job.dy, chunk.n0, c0, chunk.i0, kind) if paired else NULL
    for j in range(width):
        total_s[j] = 0
        total_q[j] = 0
    if job.inner == 1:
        column_sums(x, job.x.outer_stride, dy, job.dy.outer_stride, rows, width, shift, total_s, total_q, paired)
    else:
        row_sums(x, job.x.outer_stride, dy, job.dy.outer_stride, rows, chunk.i1 - chunk.i0, shift[0], total_s, total_q, paired)


cdef inline void chunk_moments(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    """Mean and M2 (sum of squared deviations) of chunk k, for channels c0 to c0 + width, into job.partials.

    One pass over shifted data: the shift is the mean of 8 elements spread over the chunk. Where that was a bad guess (the mean lies more than
    4 standard deviations off), or squares left the range of the element type, the channel is done again by two passes in float64.
    """
    cdef Chunk chunk = chunk_of(job, k)
    cdef real shift[TILE]
    cdef double exact_shift[TILE]
    cdef double total_s[TILE]
    cdef double total_q[TILE]
    cdef bint bad[TILE]
    cdef bint any_bad = False
    cdef Py_ssize_t j, rows = chunk.n1 - chunk.n0, length = chunk.i1 - chunk.i0
    cdef Py_ssize_t step = rows // 8 * job.x.outer_stride + length // 8
    cdef double count = <double>(rows * length), mean, m2
    cdef double least = 1e-30 if real is float else 1e-290
    cdef double most = 1e37 if real is float else 1e300
    cdef double* means = job.partials + 2 * k * job.channels + c0
    cdef double* m2s = means + job.channels
    cdef const real* x = element(&job.x, chunk.n0, c0, chunk.i0, kind)

    for j in range(width):
        shift[j] = sum8(x[j], x[j + step], x[j + 2 * step], x[j + 3 * step],
                        x[j + 4 * step], x[j + 5 * step], x[j + 6 * step], x[j + 7 * step]) * <real>0.125
    chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, False, kind)
    for j in range(width):
        mean = total_s[j] / count
        m2 = total_q[j] - total_s[j] * mean
        means[j] = shift[j] + mean
        m2s[j] = m2
        bad[j] = not (16 * m2 >= total_s[j] * mean and m2 >= least * count and total_q[j] <= most)
        any_bad |= bad[j]
    if not any_bad:
        return

    for j in range(width):
        exact_shift[j] = x[j] if finite(x[j]) else 0
    chunk_sums(job, &chunk, c0, width, exact_shift, total_s, total_q, False, kind)
    for j in range(width):
        exact_shift[j] += total_s[j] / count
    chunk_sums(job, &chunk, c0, width, exact_shift, total_s, total_q, False, kind)
    for j in range(width):
        if bad[j]:
            mean = total_s[j] / count
            means[j] = exact_shift[j] + mean if finite(mean) else exact_shift[j]
            m2s[j] = total_q[j] - total_s[j] * mean


cdef inline void merge_moments(Job* job, Py_ssize_t c) noexcept nogil:
    """mean[c] and var[c] from the chunks' moments, in their order: Chan, Golub & LeVeque 1983, eq. 1.5."""
    cdef Py_ssize_t k
    cdef Chunk chunk
    cdef double count = 0, mean = 0, m2 = 0, n, delta
    cdef const double* means = job.partials + c
    for k in range(job.chunks):
        chunk = chunk_of(job, k)
        n = <double>((chunk.n1 - chunk.n0) * (chunk.i1 - chunk.i0))
        delta = means[2 * k * job.channels] - mean
        count += n
        if k == 0:
            mean = means[0]
            m2 = means[job.channels]
        elif finite(delta):
            mean += delta * (n / count)
            m2 += means[(2 * k + 1) * job.channels] + delta * delta * (n * (count - n) / count)
        else:
            mean += means[2 * k * job.channels]
            m2 = NAN
    job.mean[c] = mean
    job.var[c] = m2 / count


cdef inline void chunk_gradients(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    """Sums of dy and of dy * (x - mean) over chunk k, into job.partials."""
    cdef Chunk chunk = chunk_of(job, k)
    cdef real shift[TILE]
    cdef double total_s[TILE]
    cdef double total_q[TILE]
    cdef double rest
    cdef Py_ssize_t j
    cdef double* dy_sums = job.partials + 2 * k * job.channels + c0
    cdef double* products = dy_sums + job.channels
    for j in range(width):
        shift[j] = <real>job.mean[c0 + j]
    chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, True, kind)
    for j in range(width):
        rest = job.mean[c0 + j] - shift[j]
        dy_sums[j] = total_s[j]
        products[j] = total_q[j] - (rest * total_s[j] if rest != 0 else 0)


cdef inline void merge_gradients(Job* job, Py_ssize_t c) noexcept nogil:
    cdef Py_ssize_t k
    cdef double dy_sum = 0, product = 0
    for k in range(job.chunks):
        dy_sum += job.partials[2 * k * job.channels + c]
        product += job.partials[(2 * k + 1) * job.channels + c]
    job.bias_grad[c] = dy_sum
    job.weight_grad[c] = product / sqrt(job.var[c] + job.eps)


# ---- coefficients of the apply pass ----------------------------------------------------------------------------------------------------
#
# forward:  y  = ((x - hi) - lo) * scale + bias                    with hi + lo = mean, scale = weight * invstd
# backward: dx = ((dy - dy_mean) - ((x - hi) - lo) * slope) * scale    with slope = invstd * weight_grad / m

cdef inline double split_mean(Job* job, Py_ssize_t c, real* hi, real* lo) noexcept nogil:
    """Split mean[c] into hi + lo of the element type; return weight * invstd."""
    cdef double mean = job.mean[c]
    hi[c] = <real>mean
    lo[c] = <real>(mean - hi[c]) if finite(hi[c]) else 0
    return (job.weight[c] if job.weight != NULL else 1.0) / sqrt(job.var[c] + job.eps)


cdef inline void forward_coefficients(Job* job, Py_ssize_t c, real* kind) noexcept nogil:
    cdef real* at = <real*>job.coefficients
    at[2 * job.channels + c] = <real>split_mean(job, c, at, at + job.channels)
    at[3 * job.channels + c] = <real>(job.bias[c] if job.bias != NULL else 0.0)


cdef inline void backward_coefficients(Job* job, Py_ssize_t c, real* kind) noexcept nogil:
    cdef real* at = <real*>job.coefficients
    cdef double count = <double>(job.outer * job.inner)
    at[2 * job.channels + c] = <real>split_mean(job, c, at, at + job.channels)
    at[3 * job.channels + c] = <real>(job.bias_grad[c] / count)
    at[4 * job.channels + c] = <real>(job.weight_grad[c] / sqrt(job.var[c] + job.eps) / count)


cdef inline void frozen_coefficients(Job* job, Py_ssize_t c, real* kind) noexcept nogil:
    cdef real* at = <real*>job.coefficients
    at[2 * job.channels + c] = <real>split_mean(job, c, at, at + job.channels)
    at[c] = 0
    at[job.channels + c] = 0
    at[3 * job.channels + c] = 0


# ---- apply -----------------------------------------------------------------------------------------------------------------------------

cdef inline void transform(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                           Py_ssize_t rows, Py_ssize_t width, const real* hi, const real* lo, const real* scale, const real* offset,
                           const real* slope, bint stream, bint paired) noexcept nogil:
    """The apply pass, down the rows; a row is computed before it is stored, so y may be x or dy."""
    cdef real row[TILE]
    cdef Py_ssize_t i, j
    for i in range(rows):
        for j in range(width):
            if paired:
                row[j] = ((dy[j] - offset[j]) - ((x[j] - hi[j]) - lo[j]) * slope[j]) * scale[j]
            else:
                row[j] = ((x[j] - hi[j]) - lo[j]) * scale[j] + offset[j]
        if stream:
            stream_store(y, row, width * sizeof(real))
        else:
            for j in range(width):
                y[j] = row[j]
        x += x_stride
        y += y_stride
        if paired:
            dy += dy_stride


cdef inline void transform_tile(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                                Py_ssize_t rows, Py_ssize_t width, const real* coefficients, Py_ssize_t coefficient_stride,
                                Py_ssize_t channel_step, bint stream, bint paired) noexcept nogil:
    """The apply pass for `width` columns; channel_step is 1 where columns are channels, 0 where they are one channel's elements."""
    cdef real hi[TILE]
    cdef real lo[TILE]
    cdef real scale[TILE]
    cdef real offset[TILE]
    cdef real slope[TILE]
    cdef Py_ssize_t j
    for j in range(width):
        hi[j] = coefficients[j * channel_step]
        lo[j] = coefficients[j * channel_step + coefficient_stride]
        scale[j] = coefficients[j * channel_step + 2 * coefficient_stride]
        offset[j] = coefficients[j * channel_step + 3 * coefficient_stride]
        if paired:
            slope[j] = coefficients[j * channel_step + 4 * coefficient_stride]
    transform(x, x_stride, dy, dy_stride, y, y_stride, rows, width, hi, lo, scale, offset, slope, stream, paired)


cdef inline void row_transform(const real* x, const real* dy, real* y, Py_ssize_t length, const real* coefficients,
                               Py_ssize_t coefficient_stride, bint stream, bint paired) noexcept nogil:
    """The apply pass over `length` contiguous elements of one channel."""
    cdef Py_ssize_t head = 0, rows, rest
    if stream:
        head = min(length, <Py_ssize_t>((64 - <size_t>y % 64) % 64 // sizeof(real)))
        transform_tile(x, 0, dy, 0, y, 0, 1, head, coefficients, coefficient_stride, 0, False, paired)
    rows = (length - head) // LANES
    rest = (length - head) % LANES
    transform_tile(x + head, LANES, dy + head if paired else dy, LANES, y + head, LANES, rows, LANES,
                   coefficients, coefficient_stride, 0, stream, paired)
    head += rows * LANES
    transform_tile(x + head, 0, dy + head if paired else dy, 0, y + head, 0, 1, rest, coefficients, coefficient_stride, 0, False, paired)


cdef inline void column_transform(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                                  Py_ssize_t rows, Py_ssize_t width, const real* coefficients, Py_ssize_t coefficient_stride,
                                  bint stream, bint paired) noexcept nogil:
    """The apply pass over `width` channels of `rows` pixels."""
    cdef Py_ssize_t c = 0, w
    while c < width:
        w = min(TILE, width - c)
        if w == TILE:
            transform_tile(x + c, x_stride, dy + c if paired else dy, dy_stride, y + c, y_stride, rows, TILE,
                           coefficients + c, coefficient_stride, 1, stream, paired)
        else:
            transform_tile(x + c, x_stride, dy + c if paired else dy, dy_stride, y + c, y_stride, rows, w,
                           coefficients + c, coefficient_stride, 1, False, paired)
        c += w


# ---- phases: a range of the work's items, for one thread -------------------------------------------------------------------------------

cdef inline void reduce(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    if job.reduction == MOMENTS:
        chunk_moments(job, k, c0, width, kind)
    else:
        chunk_gradients(job, k, c0, width, kind)


cdef inline void conclude(Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """From the chunks' sums to what the apply pass needs."""
    cdef Py_ssize_t c
    for c in range(c0, c1):
        if job.reduction == MOMENTS:
            merge_moments(job, c)
        elif job.reduction == GRADIENTS:
            merge_gradients(job, c)
        if job.apply == FORWARD:
            forward_coefficients(job, c, kind)
        elif job.apply == BACKWARD:
            backward_coefficients(job, c, kind)
        elif job.apply == FROZEN:
            frozen_coefficients(job, c, kind)


cdef inline void apply(const Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                       real* kind) noexcept nogil:
    """The apply pass over the box [n0, n1) x [c0, c1) x [i0, i1)."""
    cdef Py_ssize_t n = n0, c, rows
    cdef const real* coefficients = <const real*>job.coefficients
    # What scales dy alone is the forward formula with dy in the place of x.
    cdef const View* x = &job.dy if job.apply == FROZEN else &job.x
    cdef bint paired = job.apply == BACKWARD
    if job.inner == 1:
        rows = max(1, BLOCK // (c1 - c0))
        while n < n1:
            column_transform(element(x, n, c0, 0, kind), x.outer_stride, element(&job.dy, n, c0, 0, kind) if paired else NULL,
                             job.dy.outer_stride, <real*>element(&job.y, n, c0, 0, kind), job.y.outer_stride, min(rows, n1 - n), c1 - c0,
                             coefficients + c0, job.channels, job.stream, paired)
            n += rows
    else:
        for n in range(n0, n1):
            for c in range(c0, c1):
                row_transform(element(x, n, c, i0, kind), element(&job.dy, n, c, i0, kind) if paired else NULL,
                              <real*>element(&job.y, n, c, i0, kind), i1 - i0, coefficients + c, job.channels, job.stream, paired)


cdef inline void channel_phase(Job* job, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are channels (row layout) or groups of LANES channels (column layout): all that is to be done for each, while it is in cache."""
    cdef Py_ssize_t c0, c1, k, width = 1 if job.inner > 1 else TILE
    cdef Py_ssize_t stop = end if job.inner > 1 else min(end * LANES, job.channels)
    c0 = begin if job.inner > 1 else begin * LANES
    while c0 < stop:
        c1 = min(c0 + width, stop)
        for k in range(job.chunks):
            reduce(job, k, c0, c1 - c0, kind)
        conclude(job, c0, c1, kind)
        if job.apply:
            apply(job, 0, job.outer, c0, c1, 0, job.inner, kind)
        c0 = c1
    stream_fence()


cdef inline void reduce_phase(Job* job, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are chunks x channels (row layout) or chunks x tiles of channels (column layout)."""
    cdef Py_ssize_t item, width = 1 if job.inner > 1 else TILE, groups = ceil_div(job.channels, width)
    for item in range(begin, end):
        reduce(job, item // groups, item % groups * width, min(width, job.channels - item % groups * width), kind)


cdef inline void apply_phase(Job* job, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are pixels (column layout) or pieces of planes (row layout), in the order of memory."""
    cdef Py_ssize_t item, plane, i0
    if job.inner == 1:
        apply(job, begin, end, 0, job.channels, 0, 1, kind)
    else:
        for item in range(begin, end):
            plane = item // job.pieces
            i0 = item % job.pieces * job.piece
            apply(job, plane // job.channels, plane // job.channels + 1, plane % job.channels, plane % job.channels + 1,
                  i0, min(i0 + job.piece, job.inner), kind)
    stream_fence()


cdef void run_channels(Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    if job.dtype == FLOAT32:
        channel_phase(job, begin, end, <float*>NULL)
    else:
        channel_phase(job, begin, end, <double*>NULL)


cdef void run_reduce(Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    if job.dtype == FLOAT32:
        reduce_phase(job, begin, end, <float*>NULL)
    else:
        reduce_phase(job, begin, end, <double*>NULL)


cdef void run_conclude(Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    if job.dtype == FLOAT32:
        conclude(job, begin, end, <float*>NULL)
    else:
        conclude(job, begin, end, <double*>NULL)


cdef void run_apply(Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    if job.dtype == FLOAT32:
        apply_phase(job, begin, end, <float*>NULL)
    else:
        apply_phase(job, begin, end, <double*>NULL)


ctypedef void (*phase)(Job*, Py_ssize_t, Py_ssize_t) noexcept nogil


cdef void share(Job* job, phase work, Py_ssize_t items) noexcept nogil:
    """Run a phase over all its items, on job.threads threads."""
    cdef Py_ssize_t shares = min(items, <Py_ssize_t>job.shares), i
    if job.threads == 1 or shares <= 1:
        work(job, 0, items)
    else:
        for i in prange(shares, num_threads=job.threads, schedule="dynamic", chunksize=1):
            work(job, items * i // shares, items * (i + 1) // shares)


cdef void run(Job* job) noexcept nogil:
    cdef bint rows = job.inner > 1
    if job.reduction and job.by_channel:
        share(job, run_channels, job.channels if rows else ceil_div(job.channels, LANES))
        return
    if job.reduction:
        share(job, run_reduce, job.chunks * (job.channels if rows else ceil_div(job.channels, TILE)))
    run_conclude(job, 0, job.channels)
    if job.apply:
        share(job, run_apply, job.outer * job.channels * job.pieces if rows else job.outer)


cdef Table table = Table(run=run)
capsule = PyCapsule_New(&table, "cbn.kernels.Table", NULL)
