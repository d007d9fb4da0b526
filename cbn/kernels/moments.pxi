# Mean and variance of channels from sums of data that is shifted by a guess of the mean, and what is done where the guess was bad.

cdef double value(const Job* job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i) noexcept nogil:
    """An element of x."""
    cdef Py_ssize_t step
    cdef Box b
    if not copied(job, OF_X):
        return real_of(element(job, OF_X, n, c, i)[0])
    b = box(n, c, i, 1, 1, 1)
    return real_of(readable(job, OF_X, &b, &step)[0])


cdef inline real as_real(const elem* x, Py_ssize_t i) noexcept nogil:
    return <real>real_of(x[i])


cdef inline real mean_of_8(real a, real b, real c, real d, real e, real f, real g, real h) noexcept nogil:
    """As a tree, which is exact where all are equal."""
    return (((a + b) + (c + d)) + ((e + f) + (g + h))) * <real>0.125


# Which 8 elements of a channel tell what its mean may be: spread over its rows, its columns, and along its runs.
ctypedef struct Sampled:
    Py_ssize_t row[8]
    Py_ssize_t column[8]        # from the channel's first
    Py_ssize_t inner[8]


cdef inline Sampled sampled(const Job* job) noexcept nogil:
    cdef Sampled at
    cdef Py_ssize_t k, mixed
    for k in range(8):
        mixed = (k * 5 + 3) % 8
        at.row[k], at.column[k], at.inner[k] = k * job.rows // 8, mixed * job.copies // 8 * job.copy_step, mixed * job.length // 8
    return at


cdef void guess_columns(const Job* job, Py_ssize_t c0, Py_ssize_t width, const Sampled* at, real* centre) noexcept nogil:
    """Of columns that are channels, of an array that isn't copied: LANES at a time."""
    cdef const elem* x[8]
    cdef Py_ssize_t c = 0, k
    for k in range(8):
        x[k] = element(job, OF_X, at.row[k], c0, 0)
    while c + LANES <= width:
        store_reals(centre + c, mul(add(add(add(load(x[0] + c), load(x[1] + c)), add(load(x[2] + c), load(x[3] + c))),
                                        add(add(load(x[4] + c), load(x[5] + c)), add(load(x[6] + c), load(x[7] + c)))), spread(<real>0.125)))
        c += LANES
    while c < width:
        centre[c] = mean_of_8(as_real(x[0], c), as_real(x[1], c), as_real(x[2], c), as_real(x[3], c), as_real(x[4], c), as_real(x[5], c),
                              as_real(x[6], c), as_real(x[7], c))
        c += 1


cdef void guess_runs(const Job* job, Py_ssize_t c0, Py_ssize_t width, const Sampled* at, real* centre) noexcept nogil:
    """Of channels of the row layout, of an array that isn't copied."""
    cdef Py_ssize_t o[8]
    cdef const elem* x = element(job, OF_X, 0, c0, 0)
    cdef Py_ssize_t c, k
    for k in range(8):
        o[k] = at.row[k] * job.x.outer_stride + at.inner[k]
    for c in range(width):
        centre[c] = mean_of_8(as_real(x, o[0]), as_real(x, o[1]), as_real(x, o[2]), as_real(x, o[3]), as_real(x, o[4]), as_real(x, o[5]),
                              as_real(x, o[6]), as_real(x, o[7]))
        x += job.x.channel_stride


cdef void guess_others(const Job* job, Py_ssize_t c0, Py_ssize_t width, const Sampled* at, real* centre) noexcept nogil:
    cdef real a[8]
    cdef Py_ssize_t j, k, first
    for j in range(width):
        if job.copies > 1 and j >= job.copy_step and channel_of(job, c0 + j) == channel_of(job, c0 + j - job.copy_step):
            centre[j] = centre[j - job.copy_step]
            continue
        first = channel_of(job, c0 + j) * job.column_step
        for k in range(8):
            a[k] = <real>value(job, at.row[k], first + at.column[k], at.inner[k])
        centre[j] = mean_of_8(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7])


cdef void guess_centres(const Job* job, Py_ssize_t c0, Py_ssize_t width, real* centre) noexcept nogil:
    cdef Sampled at = sampled(job)
    if copied(job, OF_X) or job.copies > 1:
        guess_others(job, c0, width, &at, centre)
    elif job.by_columns:
        guess_columns(job, c0, width, &at, centre)
    else:
        guess_runs(job, c0, width, &at, centre)


cdef inline bint is_bad(const Job* job, Py_ssize_t c0, Py_ssize_t width, const int* bad, Py_ssize_t column) noexcept nogil:
    cdef Py_ssize_t c = channel_of(job, column) - c0
    return 0 <= c < width and bad[c]


cdef void sum_again(const Job* job, Py_ssize_t c0, Py_ssize_t width, const int* bad) noexcept nogil:
    """The sums of the bad ones of channels c0 to c0 + width, about the mean that came of the first ones: of LANES columns or one run at a time."""
    cdef Centres of
    cdef double sums[4 * 16]
    cdef Chunk chunk
    cdef Py_ssize_t j, k, i, part, unit = LANES if job.by_columns else 1
    cdef Py_ssize_t u = c0 // unit * unit if job.copies == 1 else 0, end = c0 + width if job.copies == 1 else job.columns
    cdef bint any_bad
    while u < end:
        part = min(unit, job.columns - u)
        any_bad = False
        for j in range(part):
            any_bad |= is_bad(job, c0, width, bad, u + j)
        memcpy(of.centre, coefficients_of(job, CENTRE) + u, part * sizeof(real))
        for k in range(job.chunks if any_bad else 0):
            chunk = chunk_of(job, k)
            sum_group(job, &chunk, u, part, &of, sums, 16)
            for j in range(part):
                for i in range(sums_of(job) if is_bad(job, c0, width, bad, u + j) else 0):
                    job.partials[(k * sums_of(job) + i) * job.columns + u + j] = sums[i * 16 + j]
        u += unit


cdef bint all_are(const Job* job, Py_ssize_t c, double centre) noexcept nogil:
    """Whether all elements of a channel whose sums about `centre` are exactly 0 are the centre: the square of any difference is a number of the type,
    unless the centre is next to 0."""
    cdef const elem* x
    cdef Py_ssize_t n, copy, i, column
    if fabs(centre) >= (2.0 ** -49 if sizeof(real) == 4 else 2.0 ** -484):
        return True
    for copy in range(job.copies):
        column = c * job.column_step + copy * job.copy_step
        for n in range(job.rows + (job.tail > copy * job.channels)):
            if copied(job, OF_X):
                for i in range(job.length):
                    if value(job, n, column, i) != centre:
                        return False
                continue
            x = element(job, OF_X, n, column, 0)
            for i in range(job.length):
                if real_of(x[i]) != centre:
                    return False
    return True


cdef void exact_moments(const Job* job, Py_ssize_t c, double count, double* mean, double* var) noexcept nogil:
    """A channel by two passes in float64, for what leaves the range of the type."""
    cdef double m = value(job, 0, c * job.column_step, 0), rest = 0, s, q, lost_s, lost_q, a
    cdef Py_ssize_t n, copy, i
    cdef int each
    if not finite(m):
        m = 0
    for each in range(2):
        s = q = lost_s = lost_q = 0
        for copy in range(job.copies):
            for n in range(job.rows + (job.tail > copy * job.channels)):
                for i in range(job.length):
                    a = (value(job, n, c * job.column_step + copy * job.copy_step, i) - m) - rest
                    s = two_sum(s, a, &lost_s)
                    q = two_sum(q, a * a, &lost_q)
        if not finite(s):           # of infinities, the sum says what the mean is; the variance is NaN, as infinity - infinity is
            mean[0], var[0] = s, s - s
            return
        a = (s + lost_s if finite(lost_s) else s) / count
        m = two_sum(m, a, &rest)
    mean[0] = m
    var[0] = ((q - s * a) + lost_q if finite(lost_q) else q - s * a) / count


cdef void update(const Vector* running, Py_ssize_t c0, Py_ssize_t n, const double* batch, double momentum, double factor) noexcept nogil:
    """running = (1 - momentum) * running + momentum * (batch * factor), in float64, rounded once."""
    cdef double values[CONCLUDED]
    cdef Py_ssize_t j
    read(running, c0, n, 0, values)
    for j in range(n):
        values[j] = (1 - momentum) * values[j] + momentum * (batch[j] * factor)
    write(running, c0, n, values)


cdef inline int judge_moments(const double* sums, double count, const double* centre, Block* of, int* bad) noexcept nogil:
    """Means and variances, and how many of them are no good: where the mean lies more than 1.4 standard deviations from the guess (1 normal channel in
    16,000), or squares have left the range of the type."""
    cdef const double* s = sums
    cdef const double* q = sums + CONCLUDED
    cdef double least = (1e-30 if sizeof(real) == 4 else 1e-290) * count, most = 1e37 if sizeof(real) == 4 else 1e300
    cdef double d, m2, lost_s, lost_q
    cdef Py_ssize_t j
    cdef int any_bad = 0
    for j in range(CONCLUDED):
        if sizeof(real) == 4:
            d = s[j] / count
            m2 = q[j] - s[j] * d
        else:
            lost_s, lost_q = sums[2 * CONCLUDED + j], sums[3 * CONCLUDED + j]
            d = (s[j] + lost_s) / count
            m2 = (q[j] - s[j] * d) + (lost_q - lost_s * d)
        of.mean[j], of.var[j] = centre[j] + d, m2 / count
        bad[j] = not ((2 * m2 >= s[j] * d) & (m2 >= least) & (q[j] <= most))
    for j in range(CONCLUDED):
        any_bad |= bad[j]
    return any_bad


cdef void conclude_moments(const Job* job, Py_ssize_t c0, Py_ssize_t n, Block* of) noexcept nogil:
    """Means and variances of the batch, and the running ones."""
    cdef double sums[4 * CONCLUDED]
    cdef double centre[CONCLUDED]
    cdef int bad[CONCLUDED]
    cdef const real* centres = coefficients_of(job, CENTRE) + c0 * job.column_step
    cdef double count = <double>job.outer * job.inner
    cdef Py_ssize_t j
    cdef int any_bad = 0
    if n == CONCLUDED and job.column_step == 1:
        for j in range(CONCLUDED):
            centre[j] = centres[j]
    else:
        for j in range(CONCLUDED):
            centre[j] = centres[j * job.column_step] if j < n else 0
    merge(job, c0, n, sums)
    if judge_moments(sums, count, centre, of, bad):
        for j in range(n):
            bad[j] &= not (sums[j] == 0 and sums[CONCLUDED + j] == 0 and all_are(job, c0 + j, centre[j]))
            any_bad |= bad[j]
        if any_bad:
            improve_moments(job, c0, n, of, bad)
    write(&job.mean, c0, n, of.mean)
    write(&job.var, c0, n, of.var)
    if job.running_mean.data != NULL:
        update(&job.running_mean, c0, n, of.mean, job.momentum, 1)
        update(&job.running_var, c0, n, of.var, job.momentum, count / (count - 1))


cdef void improve_moments(const Job* job, Py_ssize_t c0, Py_ssize_t n, Block* of, const int* bad) noexcept nogil:
    """Of the bad ones of n channels: their sums again, about the means that came of the first ones; by two passes in float64 where these are bad, too."""
    cdef double sums[4 * CONCLUDED]
    cdef double centre[CONCLUDED]
    cdef real* centres = coefficients_of(job, CENTRE) + c0 * job.column_step
    cdef double count = <double>job.outer * job.inner
    cdef int still[CONCLUDED]
    cdef Py_ssize_t j, copy
    memset(centre, 0, sizeof(centre))
    for j in range(n):
        for copy in range(job.copies if bad[j] and fabs(of.mean[j]) <= (FLT_MAX if sizeof(real) == 4 else DBL_MAX) else 0):
            centres[j * job.column_step + copy * job.copy_step] = <real>of.mean[j]
        centre[j] = centres[j * job.column_step]
    sum_again(job, c0, n, bad)
    merge(job, c0, n, sums)
    judge_moments(sums, count, centre, of, still)
    for j in range(n):
        if bad[j] and still[j]:
            exact_moments(job, c0 + j, count, &of.mean[j], &of.var[j])
