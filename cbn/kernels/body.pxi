# The loops of batch normalization: the only place where elements meet arithmetic. Written once, compiled for each CPU level.
#
# A channel's elements are taken as a matrix of rows: in the column layout (inner == 1) a row holds neighbouring channels, in the row layout
# (inner > 1) it holds LANES neighbouring elements of one channel. Either way the loops below run down the rows with one independent
# accumulator a column, which is what makes them vectorize, and what makes the results the same bits at every vector width.
#
# The order of every sum is fixed by the shape: 8 rows are added as a tree, up to SEQUENCE of such trees (or single rows) one after another, and
# what comes of that in float64. More in a row, and nearly equal terms, which all round the same way, would cost digits.

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport prange
from libc.float cimport DBL_MAX
from libc.math cimport fabs, sqrt

from .plan cimport LANES, TILE, WIDEST, ceil_div
from .table cimport BACKWARD, COEFFICIENTS, FLOAT32, FORWARD, FROZEN, GRADIENTS, MOMENTS, Job, Table, View

cdef extern from "stream.h" nogil:
    void stream_store(void* destination, const void* source, size_t bytes)
    void stream_fence()
    void prefetch_rows(const void* p, size_t stride, size_t width)

ctypedef fused real:            # of the elements
    float
    double

ctypedef fused wide:            # of the accumulators: as the elements, or wider
    float
    double

cdef enum:
    SEQUENCE = 8                # additions to an accumulator before it is added to a float64 one
    FLUSH = 8 * SEQUENCE        # the rows of that many trees
    ALIGN_LENGTH = 96           # elements of a segment that are worth aligning
    STREAM_LENGTH = 512         # elements of a segment that are worth writing past the caches
    MANY = 1024                 # columns x chunks worth concluding on several threads
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
        prefetch_rows(x, x_stride * sizeof(real), width * sizeof(real))
        if paired:
            prefetch_rows(dy, dy_stride * sizeof(real), width * sizeof(real))
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
    """Sums of `width` <= TILE columns over `rows` <= FLUSH rows."""
    cdef wide c[TILE]
    cdef wide s[TILE]
    cdef wide q[TILE]
    cdef Py_ssize_t j
    for j in range(width):
        c[j] = shift[j]
        s[j] = 0
        q[j] = 0
    accumulate(x, x_stride, dy, dy_stride, rows, width, c, s, q, paired)
    flush(s, q, width, total_s, total_q)


cdef inline void column_sums(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, Py_ssize_t rows, Py_ssize_t width,
                             const wide* shift, double* total_s, double* total_q, bint paired) noexcept nogil:
    """Sums of `width` columns: tile by tile over FLUSH rows at a time, so that neighbouring tiles are read soon after one another."""
    cdef Py_ssize_t c, w, row = 0, n
    cdef const real* x_at
    cdef const real* dy_at = NULL
    while row < rows:
        n = min(FLUSH, rows - row)
        c = 0
        while c < width:
            w = width - c
            x_at = x + row * x_stride + c
            if paired:
                dy_at = dy + row * dy_stride + c
            # The usual widths are constants of the inlined loops.
            if w >= TILE:
                w = TILE
                tile_sums(x_at, x_stride, dy_at, dy_stride, n, TILE, shift + c, total_s + c, total_q + c, paired)
            elif w >= LANES:
                w = LANES
                tile_sums(x_at, x_stride, dy_at, dy_stride, n, LANES, shift + c, total_s + c, total_q + c, paired)
            else:
                tile_sums(x_at, x_stride, dy_at, dy_stride, n, w, shift + c, total_s + c, total_q + c, paired)
            c += w
        row += FLUSH


cdef inline void segment_sums(const real* x, const real* dy, Py_ssize_t length, wide shift, wide* s, wide* q, bint first, bint paired) noexcept nogil:
    """Add `length` contiguous elements of one channel to its LANES sums (or, if first, start these).

    Element i goes to lane i % LANES; the last length % LANES ones go to the last lanes.
    """
    cdef wide c[LANES]
    cdef wide lanes_s[LANES]
    cdef wide lanes_q[LANES]
    cdef wide a, b
    cdef Py_ssize_t j, rest = length % LANES
    if length < LANES:
        if first:
            for j in range(LANES):
                s[j] = 0
                q[j] = 0
        for j in range(length):
            b = <wide>x[j] - shift
            a = <wide>dy[j] if paired else b
            s[j] += a
            q[j] += a * b
        return
    for j in range(LANES):
        c[j] = shift
        lanes_s[j] = 0 if first else s[j]
        lanes_q[j] = 0 if first else q[j]
    accumulate(x, LANES, dy, LANES, length // LANES, LANES, c, lanes_s, lanes_q, paired)
    if rest:
        # The last LANES elements again, those done before left out: full width, no tail loop.
        x += length - LANES
        if paired:
            dy += length - LANES
        for j in range(LANES):
            b = <wide>x[j] - shift if j >= LANES - rest else 0
            a = b
            if paired:
                a = <wide>dy[j] if j >= LANES - rest else 0
            lanes_s[j] += a
            lanes_q[j] += a * b
    for j in range(LANES):
        s[j] = lanes_s[j]
        q[j] = lanes_q[j]


cdef inline void row_sums(const View* x_view, const real* x, const View* dy_view, const real* dy, Py_ssize_t rows, Py_ssize_t length, Py_ssize_t width,
                          const wide* shift, double* total_s, double* total_q, bint paired) noexcept nogil:
    """Sums of `width` channels over `rows` segments of `length` contiguous elements each."""
    cdef wide s[TILE * LANES]
    cdef wide q[TILE * LANES]
    cdef double lanes_s[TILE * LANES]
    cdef double lanes_q[TILE * LANES]
    cdef bint first = True, flushed = False
    cdef Py_ssize_t c, i, j, row, part, additions, filled = 0
    for row in range(rows):
        i = 0
        while i < length:
            part = min(length - i, FLUSH * LANES)
            additions = part // (8 * LANES) + part // LANES % 8 + (part % LANES > 0)
            if filled + additions > SEQUENCE and not first:
                if not flushed:
                    for j in range(width * LANES):
                        lanes_s[j] = 0
                        lanes_q[j] = 0
                flush(s, q, width * LANES, lanes_s, lanes_q)
                flushed = True
                filled = 0
            for c in range(width):
                segment_sums(x + c * x_view.channel_stride + i, dy + c * dy_view.channel_stride + i if paired else dy, part, shift[c],
                             s + c * LANES, q + c * LANES, first, paired)
            first = False
            i += part
            filled += additions
        x += x_view.outer_stride
        if paired:
            dy += dy_view.outer_stride
    if flushed:
        flush(s, q, width * LANES, lanes_s, lanes_q)
        for c in range(width):
            total_s[c] += folded(lanes_s + c * LANES)
            total_q[c] += folded(lanes_q + c * LANES)
    else:
        for c in range(width):
            total_s[c] += folded(s + c * LANES)
            total_q[c] += folded(q + c * LANES)


cdef inline double folded(const wide* lanes) noexcept nogil:
    """The sum of LANES values in float64, halves upon halves."""
    cdef double h[8]
    cdef Py_ssize_t j
    for j in range(8):
        h[j] = <double>lanes[j] + <double>lanes[j + 8]
    return ((h[0] + h[4]) + (h[2] + h[6])) + ((h[1] + h[5]) + (h[3] + h[7]))


ctypedef struct Chunk:
    # Outer indices [n0, n1) x inner indices [i0, i1) of a channel.
    Py_ssize_t n0, n1, i0, i1


cdef inline Chunk chunk_of(const Job* job, Py_ssize_t k) noexcept nogil:
    cdef Chunk chunk
    cdef Py_ssize_t n = k, i = 0
    if job.chunk_inner < job.inner:
        n = k // job.inner_chunks
        i = k % job.inner_chunks
    chunk.n0 = n * job.chunk_outer
    chunk.n1 = min(chunk.n0 + job.chunk_outer, job.rows)
    chunk.i0 = i * job.chunk_inner
    chunk.i1 = min(chunk.i0 + job.chunk_inner, job.inner)
    return chunk


cdef inline const real* element(const View* view, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, const real* kind) noexcept nogil:
    """The address of view[n, c, i]; `kind` only tells the element type."""
    return <const real*>view.data + (n * view.outer_stride + c * view.channel_stride + i)


cdef inline void chunk_sums(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const wide* shift,
                            double* total_s, double* total_q, bint paired, const real* kind) noexcept nogil:
    """Sums over a chunk for `width` <= WIDEST columns from c0 on (in the row layout, <= TILE)."""
    cdef Py_ssize_t j, rows = chunk.n1 - chunk.n0
    cdef const real* x = element(&job.x, chunk.n0, c0, chunk.i0, kind)
    cdef const real* dy = element(&job.dy, chunk.n0, c0, chunk.i0, kind) if paired else NULL
    for j in range(width):
        total_s[j] = 0
        total_q[j] = 0
    if job.inner == 1:
        column_sums(x, job.x.outer_stride, dy, job.dy.outer_stride, rows, width, shift, total_s, total_q, paired)
    else:
        row_sums(&job.x, x, &job.dy, dy, rows, chunk.i1 - chunk.i0, width, shift, total_s, total_q, paired)


cdef void exact_moments(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, double count, const real* x, const bint* wanted,
                        double* means, double* m2s) noexcept nogil:
    """Mean and M2 of the wanted ones of a chunk's channels c0 to c0 + width, whose first elements are at x, by two passes in float64."""
    cdef double shift[WIDEST]
    cdef double total_s[WIDEST]
    cdef double total_q[WIDEST]
    cdef double mean
    cdef const real* at
    cdef Py_ssize_t j
    cdef bint any_wanted = False
    for j in range(width):
        any_wanted |= wanted[j]
    if not any_wanted:
        return
    for j in range(width):
        at = x + j * job.x.channel_stride
        shift[j] = at[0] if finite(at[0]) else 0
    chunk_sums(job, chunk, c0, width, shift, total_s, total_q, False, x)
    for j in range(width):
        shift[j] += total_s[j] / count
    chunk_sums(job, chunk, c0, width, shift, total_s, total_q, False, x)
    for j in range(width):
        if wanted[j]:
            mean = total_s[j] / count
            means[j] = shift[j] + mean if finite(mean) else shift[j]
            m2s[j] = total_q[j] - total_s[j] * mean


cdef inline void chunk_moments(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    """Mean and M2 (sum of squared deviations) of chunk k, for channels c0 to c0 + width, into job.partials.

    One pass over shifted data: the shift is the mean of 8 elements spread over the chunk. Where that was a bad guess (the mean lies more than
    1.4 standard deviations off: 1 normal channel in 16,000), or squares left the range of the element type, the channel is done again by two
    passes in float64.
    """
    cdef Chunk chunk = chunk_of(job, k)
    cdef real shift[WIDEST]
    cdef double total_s[WIDEST]
    cdef double total_q[WIDEST]
    cdef bint bad[WIDEST]
    cdef bint any_bad = False
    cdef Py_ssize_t few = 1 if job.inner > 1 else LANES     # channels that are done again together
    cdef Py_ssize_t j, rows = chunk.n1 - chunk.n0, length = chunk.i1 - chunk.i0
    cdef Py_ssize_t step = rows // 8 * job.x.outer_stride + length // 8
    cdef double count = <double>(rows * length), mean, m2
    cdef double least = 1e-30 if real is float else 1e-290
    cdef double most = 1e37 if real is float else 1e300
    cdef double* means = job.partials + 2 * k * job.columns + c0
    cdef double* m2s = means + job.columns
    cdef const real* x = element(&job.x, chunk.n0, c0, chunk.i0, kind)
    cdef const real* at

    for j in range(width):
        at = x + j * job.x.channel_stride
        shift[j] = sum8(at[0], at[step], at[2 * step], at[3 * step], at[4 * step], at[5 * step], at[6 * step], at[7 * step]) * <real>0.125
    chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, False, kind)
    for j in range(width):
        mean = total_s[j] / count
        m2 = total_q[j] - total_s[j] * mean
        means[j] = shift[j] + mean
        m2s[j] = m2
        bad[j] = not (2 * m2 >= total_s[j] * mean and m2 >= least * count and total_q[j] <= most)
        any_bad |= bad[j]
    if any_bad:
        j = 0
        while j < width:
            exact_moments(job, &chunk, c0 + j, min(few, width - j), count, x + j * job.x.channel_stride, bad + j, means + j, m2s + j)
            j += few


cdef inline void merge_moments(Job* job, Py_ssize_t c0, Py_ssize_t c1, const real* kind) noexcept nogil:
    """mean and var of channels from the chunks' moments, in their order: Chan, Golub & LeVeque 1983, eq. 1.5."""
    cdef Py_ssize_t c, i, k
    cdef Chunk chunk
    cdef double count = 0, n, delta, share, weight, x
    cdef const double* means
    cdef const double* m2s
    for k in range(job.chunks):
        chunk = chunk_of(job, k)
        n = <double>((chunk.n1 - chunk.n0) * (chunk.i1 - chunk.i0))
        for i in range(job.fold):
            means = job.partials + 2 * k * job.columns + i * job.channels
            m2s = means + job.columns
            share = n / (count + n)
            weight = share * count
            count += n
            for c in range(c0, c1):
                if k == 0 and i == 0:
                    job.mean[c] = means[c]
                    job.var[c] = m2s[c]
                else:
                    delta = means[c] - job.mean[c]
                    # Of infinities, the sum says what the mean is; the variance is NaN, as infinity - infinity is.
                    job.mean[c] = job.mean[c] + delta * share if finite(delta) else job.mean[c] + means[c]
                    job.var[c] += m2s[c] + delta * delta * weight + (delta - delta)
    for i in range(job.tail // max(1, job.channels)):
        share = 1 / (count + 1)
        weight = share * count
        count += 1
        for c in range(c0, c1):
            x = element(&job.x, job.rows, i * job.channels + c, 0, kind)[0]
            delta = x - job.mean[c]
            job.mean[c] = job.mean[c] + delta * share if finite(delta) else job.mean[c] + x
            job.var[c] += delta * delta * weight + (delta - delta)
    for c in range(c0, c1):
        job.var[c] /= count


cdef inline void chunk_gradients(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    """Sums of dy and of dy * (x - mean) over chunk k, into job.partials."""
    cdef Chunk chunk = chunk_of(job, k)
    cdef real shift[WIDEST]
    cdef double total_s[WIDEST]
    cdef double total_q[WIDEST]
    cdef double rest[WIDEST]
    cdef Py_ssize_t j, c = c0 % job.channels
    cdef double* dy_sums = job.partials + 2 * k * job.columns + c0
    cdef double* products = dy_sums + job.columns
    for j in range(width):
        shift[j] = <real>job.mean[c]
        rest[j] = job.mean[c] - shift[j]
        c = c + 1 if c + 1 < job.channels else 0
    chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, True, kind)
    for j in range(width):
        dy_sums[j] = total_s[j]
        products[j] = total_q[j] - (rest[j] * total_s[j] if rest[j] != 0 else 0)


cdef inline void merge_gradients(Job* job, Py_ssize_t c0, Py_ssize_t c1, const real* kind) noexcept nogil:
    """weight_grad and bias_grad of channels from the chunks' sums, in their order."""
    cdef Py_ssize_t c, i, k
    cdef double dy
    cdef const double* dy_sums
    for c in range(c0, c1):
        job.bias_grad[c] = 0
        job.weight_grad[c] = 0
    for k in range(job.chunks):
        for i in range(job.fold):
            dy_sums = job.partials + 2 * k * job.columns + i * job.channels
            for c in range(c0, c1):
                job.bias_grad[c] += dy_sums[c]
                job.weight_grad[c] += dy_sums[job.columns + c]
    for i in range(job.tail // max(1, job.channels)):
        for c in range(c0, c1):
            dy = element(&job.dy, job.rows, i * job.channels + c, 0, kind)[0]
            job.bias_grad[c] += dy
            job.weight_grad[c] += dy * (element(&job.x, job.rows, i * job.channels + c, 0, kind)[0] - job.mean[c])
    for c in range(c0, c1):
        job.weight_grad[c] /= sqrt(job.var[c] + job.eps)


# ---- coefficients of the apply pass ----------------------------------------------------------------------------------------------------
#
# forward:  y  = ((x - hi) - lo) * scale + offset                  with hi + lo = mean, scale = weight * invstd, offset = bias
# backward: dx = ((dy - offset) - ((x - hi) - lo) * slope) * scale    with offset = bias_grad / m, slope = weight_grad * invstd / m
# frozen:   dx = dy * scale, as forward of dy with a mean and bias of 0

cdef inline Py_ssize_t coefficient_stride(const Job* job) noexcept nogil:
    return job.columns + LANES


cdef inline void coefficients_of(Job* job, Py_ssize_t c0, Py_ssize_t c1, real* at) noexcept nogil:
    """Coefficients of channels c0 to c1, in each of their columns."""
    cdef Py_ssize_t stride = coefficient_stride(job)
    cdef real* hi = at
    cdef real* lo = hi + stride
    cdef real* scale = lo + stride
    cdef real* offset = scale + stride
    cdef real* slope = offset + stride
    cdef const double* mean = job.mean
    cdef const double* var = job.var
    cdef const double* weight = job.weight
    cdef double eps = job.eps, each = 1 / (<double>job.outer * job.inner)
    cdef Py_ssize_t c, i, array
    for c in range(c0, c1):
        hi[c] = <real>mean[c]
        lo[c] = <real>(mean[c] - hi[c]) if finite(hi[c]) else 0
    if weight != NULL:
        for c in range(c0, c1):
            scale[c] = <real>(weight[c] / sqrt(var[c] + eps))
    else:
        for c in range(c0, c1):
            scale[c] = <real>(1 / sqrt(var[c] + eps))
    if job.apply == FORWARD:
        for c in range(c0, c1):
            offset[c] = <real>job.bias[c] if job.bias != NULL else 0
    elif job.apply == BACKWARD:
        for c in range(c0, c1):
            offset[c] = <real>(job.bias_grad[c] * each)
            slope[c] = <real>(job.weight_grad[c] / sqrt(var[c] + eps) * each)
    else:
        for c in range(c0, c1):
            hi[c] = lo[c] = offset[c] = 0
    for array in range(COEFFICIENTS):
        for i in range(1, job.fold):
            for c in range(c0, c1):
                at[array * stride + i * job.channels + c] = at[array * stride + c]
        # The first ones once more after the last, for rows that begin later.
        for c in range(c0, min(c1, LANES)):
            i = job.columns + c
            while i < stride:
                at[array * stride + i] = at[array * stride + c]
                i += job.channels


# ---- apply -----------------------------------------------------------------------------------------------------------------------------

cdef inline void transform_row(const real* x, const real* dy, real* y, Py_ssize_t width, const real* hi, const real* lo, const real* scale,
                               const real* offset, const real* slope, bint stream, bint paired) noexcept nogil:
    """One row of the apply pass; computed before it is stored, so y may be x or dy."""
    cdef real row[TILE]         # of this function, so that it never leaves the registers
    cdef Py_ssize_t j
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


cdef inline void transform(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                           Py_ssize_t rows, Py_ssize_t width, Py_ssize_t head, Py_ssize_t overlap, const real* coefficients, Py_ssize_t stride,
                           Py_ssize_t channel_step, bint stream, bint paired) noexcept nogil:
    """The apply pass down the rows of a tile, the first of which begins at `head`.

    head, overlap : unless 0, there is a further row at 0, or at `overlap`, which overlaps the others: what comes before the first boundary of a
    cache line, and the end of what isn't whole rows. As y may be x or dy, they are computed before anything is stored.
    channel_step : 1 where the columns are channels, 0 where they are elements of one channel.
    """
    cdef real hi[TILE]
    cdef real lo[TILE]
    cdef real scale[TILE]
    cdef real offset[TILE]
    cdef real slope[TILE]
    cdef real first[TILE]
    cdef real last[TILE]
    cdef real* begin = y
    cdef real* end = y + overlap
    cdef Py_ssize_t i, j
    for j in range(width):
        hi[j] = coefficients[j * channel_step]
        lo[j] = coefficients[j * channel_step + stride]
        scale[j] = coefficients[j * channel_step + 2 * stride]
        offset[j] = coefficients[j * channel_step + 3 * stride]
        if paired:
            slope[j] = coefficients[j * channel_step + 4 * stride]
    if head:
        transform_row(x, dy, first, width, hi, lo, scale, offset, slope, False, paired)
    if overlap:
        transform_row(x + overlap, dy + overlap if paired else dy, last, width, hi, lo, scale, offset, slope, False, paired)
    x += head
    y += head
    if paired:
        dy += head
    for i in range(rows):
        transform_row(x, dy, y, width, hi, lo, scale, offset, slope, stream, paired)
        x += x_stride
        y += y_stride
        if paired:
            dy += dy_stride
    if head:
        for j in range(width):
            begin[j] = first[j]
    if overlap:
        for j in range(width):
            end[j] = last[j]


cdef inline Py_ssize_t to_cache_line(const real* y) noexcept nogil:
    """The number of elements from y to the next boundary of a cache line."""
    return <Py_ssize_t>((64 - <size_t>y % 64) % 64 // sizeof(real))


cdef inline void row_transform(const real* x, const real* dy, real* y, Py_ssize_t length, const real* coefficients, Py_ssize_t stride,
                               bint stream, bint paired) noexcept nogil:
    """The apply pass over `length` contiguous elements of one channel."""
    cdef Py_ssize_t head = 0
    if length < LANES:
        transform(x, 0, dy, 0, y, 0, 1, length, 0, 0, coefficients, stride, 0, False, paired)
        return
    if length >= ALIGN_LENGTH:
        head = to_cache_line(y)
    transform(x, LANES, dy, LANES, y, LANES, (length - head) // LANES, LANES, head, length - LANES if (length - head) % LANES else 0,
              coefficients, stride, 0, stream, paired)


cdef inline void column_transform(const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                                  Py_ssize_t rows, Py_ssize_t width, const real* coefficients, Py_ssize_t stride,
                                  bint stream, bint paired) noexcept nogil:
    """The apply pass over `width` columns of `rows` rows."""
    cdef Py_ssize_t c = 0, w
    while c < width:
        w = width - c
        if w >= TILE:
            w = TILE
            transform(x, x_stride, dy, dy_stride, y, y_stride, rows, TILE, 0, 0, coefficients + c, stride, 1, stream, paired)
        elif w >= LANES:
            w = LANES
            transform(x, x_stride, dy, dy_stride, y, y_stride, rows, LANES, 0, 0, coefficients + c, stride, 1, stream, paired)
        else:
            transform(x, x_stride, dy, dy_stride, y, y_stride, rows, w, 0, 0, coefficients + c, stride, 1, stream, paired)
        c += w
        x += w
        y += w
        if paired:
            dy += w


# ---- phases: a range of the work's items, for one thread -------------------------------------------------------------------------------

cdef inline void reduce(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    if job.reduction == MOMENTS:
        chunk_moments(job, k, c0, width, kind)
    else:
        chunk_gradients(job, k, c0, width, kind)


cdef inline void conclude(Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """From the chunks' sums to what the apply pass needs."""
    if job.reduction == MOMENTS:
        merge_moments(job, c0, c1, kind)
    elif job.reduction == GRADIENTS:
        merge_gradients(job, c0, c1, kind)
    if job.apply:
        coefficients_of(job, c0, c1, <real*>job.coefficients)


cdef inline void apply(const Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                       real* kind) noexcept nogil:
    """The apply pass over the box of rows [n0, n1) x columns [c0, c1) x inner indices [i0, i1)."""
    if job.apply == BACKWARD:
        apply_box(job, &job.x, n0, n1, c0, c1, i0, i1, True, kind)
    else:
        # What scales dy alone is the forward formula with dy in the place of x.
        apply_box(job, &job.dy if job.apply == FROZEN else &job.x, n0, n1, c0, c1, i0, i1, False, kind)


cdef inline void block_transform(const Job* job, const View* x, const real* x_at, const real* dy_at, real* y_at, Py_ssize_t rows, Py_ssize_t width,
                                 const real* coefficients, Py_ssize_t stride, bint stream, bint paired) noexcept nogil:
    """The apply pass over `rows` rows of `width` columns, in blocks of rows so that neighbouring tiles follow one another closely."""
    cdef Py_ssize_t n = 0, step = max(1, BLOCK // width)
    while n < rows:
        column_transform(x_at + n * x.outer_stride, x.outer_stride, dy_at + n * job.dy.outer_stride if paired else dy_at, job.dy.outer_stride,
                         y_at + n * job.y.outer_stride, job.y.outer_stride, min(step, rows - n), width, coefficients, stride, stream, paired)
        n += step


cdef inline void apply_box(const Job* job, const View* x, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                           bint paired, real* kind) noexcept nogil:
    cdef Py_ssize_t n, c, rows, head = 0, width = c1 - c0, stride = coefficient_stride(job)
    cdef const real* coefficients = <const real*>job.coefficients
    cdef const real* x_at
    cdef const real* dy_at = NULL
    cdef real* y_at
    if job.inner == 1:
        x_at = element(x, n0, c0, 0, kind)
        y_at = <real*>element(&job.y, n0, c0, 0, kind)
        if paired:
            dy_at = element(&job.dy, n0, c0, 0, kind)
        coefficients += c0
        rows = n1 - n0
        if width == job.columns and width % LANES == 0 and x.outer_stride == width and job.y.outer_stride == width \
                and (not paired or job.dy.outer_stride == width):
            # One stretch of memory: rows may begin anywhere, so let them begin on cache lines, the coefficients going round.
            head = to_cache_line(y_at)
        if head:
            column_transform(x_at, 0, dy_at, 0, y_at, 0, 1, head, coefficients, stride, False, paired)
            x_at += head
            y_at += head
            coefficients += head
            if paired:
                dy_at += head
            rows -= 1
        # Rows that don't all begin on a 16-byte boundary can't be streamed.
        if job.stream and (<size_t>y_at | <size_t>(job.y.outer_stride * sizeof(real)) | <size_t>(width * sizeof(real))) % 16 == 0:
            block_transform(job, x, x_at, dy_at, y_at, rows, width, coefficients, stride, True, paired)
        else:
            block_transform(job, x, x_at, dy_at, y_at, rows, width, coefficients, stride, False, paired)
        if head:
            column_transform(x_at + rows * width, 0, dy_at + rows * width if paired else dy_at, 0, y_at + rows * width, 0, 1, width - head,
                             coefficients, stride, False, paired)
    else:
        for n in range(n0, n1):
            x_at = element(x, n, c0, i0, kind)
            y_at = <real*>element(&job.y, n, c0, i0, kind)
            if paired:
                dy_at = element(&job.dy, n, c0, i0, kind)
            for c in range(c0, c1):
                if job.stream and i1 - i0 >= STREAM_LENGTH:
                    row_transform(x_at, dy_at, y_at, i1 - i0, coefficients + c, stride, True, paired)
                else:
                    row_transform(x_at, dy_at, y_at, i1 - i0, coefficients + c, stride, False, paired)
                x_at += x.channel_stride
                y_at += job.y.channel_stride
                if paired:
                    dy_at += job.dy.channel_stride


cdef inline void channel_phase(Job* job, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are groups of channels of the row layout: all that is to be done for each, while it is in cache."""
    cdef Py_ssize_t item, k, n, c0, c1
    for item in range(begin, end):
        c0 = item * job.group
        c1 = min(c0 + job.group, job.columns)
        for k in range(job.chunks):
            reduce(job, k, c0, c1 - c0, kind)
        conclude(job, c0, c1, kind)
        # From the end: what was read last is most likely still in cache.
        for n in range(job.rows - 1 if job.apply else -1, -1, -1):
            apply(job, n, n + 1, c0, c1, 0, job.inner, kind)
    stream_fence()


cdef inline void reduce_phase(Job* job, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are chunks x groups of columns of the window."""
    cdef Py_ssize_t item, c0, groups = ceil_div(job.c1 - job.c0, job.group)
    for item in range(begin, end):
        c0 = job.c0 + item % groups * job.group
        reduce(job, item // groups, c0, min(job.group, job.c1 - c0), kind)


cdef inline void apply_phase(Job* job, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are rows (column layout), or planes or pieces of planes (row layout), of the window, in the order of memory.

    Planes are taken from the end: what a reduction has just read last is most likely still in cache.
    """
    cdef Py_ssize_t item = end, n, c, count, i0, width = job.c1 - job.c0
    if job.inner == 1:
        apply(job, begin, end, job.c0, job.c1, 0, 1, kind)
        if job.tail and end == job.rows:
            apply(job, end, end + 1, 0, job.tail, 0, 1, kind)
    while job.inner != 1 and item > begin:
        n = (item - 1) // (width * job.pieces)
        c = (item - 1) // job.pieces - n * width
        if job.pieces == 1:
            count = min(c + 1, item - begin)
            apply(job, n, n + 1, job.c0 + c + 1 - count, job.c0 + c + 1, 0, job.inner, kind)
            item -= count
        else:
            i0 = (item - 1) % job.pieces * job.piece
            apply(job, n, n + 1, job.c0 + c, job.c0 + c + 1, i0, min(i0 + job.piece, job.inner), kind)
            item -= 1
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
    """Run a phase over all its items, on job.threads threads, each thread the same share every time."""
    cdef Py_ssize_t shares = min(items, <Py_ssize_t>job.threads), i
    if shares <= 1:
        work(job, 0, items)
    else:
        for i in prange(shares, num_threads=job.threads, schedule="static", chunksize=1):
            work(job, items * i // shares, items * (i + 1) // shares)


cdef void run(Job* job) noexcept nogil:
    cdef Py_ssize_t width
    if job.reduction and job.by_channel:
        share(job, run_channels, ceil_div(job.columns, job.group))
        return
    job.c0 = 0
    while job.c0 < job.columns:
        job.c1 = min(job.c0 + job.window, job.columns)
        width = job.c1 - job.c0
        if job.reduction:
            share(job, run_reduce, job.chunks * ceil_div(width, job.group))
        if width * (job.chunks + 1) < MANY or job.window < job.columns:
            run_conclude(job, job.c0, min(job.c1, job.channels))
        else:
            share(job, run_conclude, job.channels)
        if job.apply:
            share(job, run_apply, job.rows if job.inner == 1 else job.rows * width * job.pieces)
        job.c0 = job.c1


cdef Table table = Table(run=run)
capsule = PyCapsule_New(&table, "cbn.kernels.Table", NULL)
