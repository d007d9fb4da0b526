# Mean and variance of channels from sums of data that is shifted by a guess of the mean, and what is done where the guess was bad.

cdef double value(const Job* job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i) noexcept nogil:
    """An element of x."""
    cdef Py_ssize_t step
    cdef Box b
    if not copied(job, OF_X):
        return real_of(element(job, OF_X, n, c, i)[0])
    b = box(n, c, i, 1, 1, 1)
    return real_of(readable(job, OF_X, &b, &step)[0])


# Where a channel is looked at to tell what its mean may be: spread over its rows, its columns, and along its runs, so that periods of these don't meet
# those of the data. What rounding costs grows with the guess's distance from the mean.
ctypedef struct Sampled:
    Py_ssize_t row[SAMPLES]
    Py_ssize_t column[SAMPLES]          # from the channel's first
    Py_ssize_t inner[SAMPLES]


cdef inline Sampled sampled(const Job* job) noexcept nogil:
    cdef Sampled at
    cdef Py_ssize_t k
    cdef size_t mixed, rows = job.rows, copies = job.copies, length = job.length     # unsigned, so that divisions are shifts
    if job.by_columns:
        for k in range(SAMPLES):
            mixed = (k * 5 + 3) % SAMPLES
            at.row[k] = (k * SAMPLES + mixed) * rows // (SAMPLES * SAMPLES)
            at.column[k], at.inner[k] = mixed * copies // SAMPLES * job.copy_step, 0
    else:
        for k in range(RUN_SAMPLES):
            mixed = (k * 5 + 3) % RUN_SAMPLES
            at.row[k] = (k * RUN_SAMPLES + mixed) * rows // (RUN_SAMPLES * RUN_SAMPLES)
            at.column[k], at.inner[k] = 0, (mixed * RUN_SAMPLES + k) * length // (RUN_SAMPLES * RUN_SAMPLES)
    return at


cdef inline lanes apart(lanes a, lanes b) noexcept nogil:
    cdef lanes d = sub(a, b)
    return most(d, sub(spread(0), d))


cdef inline lanes coarse(lanes mean, lanes distance) noexcept nogil:
    """The mean to three digits of the distance between elements, so that differences of elements of few digits have few, too, and their sums are
    exact."""
    cdef lanes large = least(mul(distance, spread(<real>(1.5 * 2.0 ** 20 if sizeof(real) == 4 else 1.5 * 2.0 ** 49))), spread(<real>1e37))
    return sub(add(mean, large), large)


cdef inline lanes sample(const elem* const* x, const real* some, Py_ssize_t k, Py_ssize_t c) noexcept nogil:
    """The kth one of LANES channels: of columns from c on or, where `some` isn't NULL, of those that have been taken."""
    return load(x[k] + c) if some == NULL else load_reals(some + k * LANES)


cdef inline lanes mean_of_samples(const elem* const* x, const real* some, Py_ssize_t c, int samples) noexcept nogil:
    """About. As a tree, which is exact where all samples are equal."""
    cdef lanes a[4]
    cdef lanes b[4]
    cdef lanes sums[4]
    cdef lanes distance
    cdef int k
    for k in range(4):
        a[k], b[k] = sample(x, some, k, c), sample(x, some, k + samples // 2, c)
        sums[k] = add(a[k], b[k])
    distance = most(most(apart(a[0], b[0]), apart(a[1], b[1])), most(apart(a[2], b[2]), apart(a[3], b[3])))
    for k in range(4 if samples == 16 else 0):
        sums[k] = add(sums[k], add(sample(x, some, k + 4, c), sample(x, some, k + 12, c)))
    return coarse(mul(add(add(sums[0], sums[1]), add(sums[2], sums[3])), spread(<real>1 / samples)), distance)


cdef inline void guess_columns(const Job* job, Py_ssize_t c0, Py_ssize_t width, const Sampled* at, real* centre) noexcept nogil:
    """Of columns that are channels, of an array that isn't copied, LANES at a time: as many as are whole."""
    cdef const elem* x[SAMPLES]
    cdef Py_ssize_t c = 0, k
    for k in range(SAMPLES):
        x[k] = element(job, OF_X, at.row[k], c0, 0)
    while c + LANES <= width:
        store_reals(centre + c, mean_of_samples(x, NULL, c, SAMPLES))
        c += LANES


cdef inline void take_samples(const Job* job, Py_ssize_t channel, Py_ssize_t n, const Sampled* at, real* to) noexcept nogil:
    """Of up to LANES channels, those of a channel LANES apart."""
    cdef Py_ssize_t o[SAMPLES]
    cdef Py_ssize_t j, k, samples = SAMPLES if job.by_columns else RUN_SAMPLES
    cdef const elem* x
    if copied(job, OF_X):
        for j in range(n):
            for k in range(samples):
                to[k * LANES + j] = <real>value(job, at.row[k], (channel + j) * job.column_step + at.column[k], at.inner[k])
        return
    for k in range(samples):
        o[k] = at.row[k] * job.x.outer_stride + at.column[k] * job.x.channel_stride + at.inner[k]
    x = element(job, OF_X, 0, channel * job.column_step, 0)
    for j in range(n):
        for k in range(samples // 4):          # four loads that stand side by side
            to[4 * k * LANES + j], to[(4 * k + 1) * LANES + j] = <real>real_of(x[o[4 * k]]), <real>real_of(x[o[4 * k + 1]])
            to[(4 * k + 2) * LANES + j], to[(4 * k + 3) * LANES + j] = <real>real_of(x[o[4 * k + 2]]), <real>real_of(x[o[4 * k + 3]])
        x += job.x.channel_stride * job.column_step


cdef void guess_centres(const Job* job, Py_ssize_t c0, Py_ssize_t width, real* centre) noexcept nogil:
    cdef Sampled at = sampled(job)
    cdef real some[16 * SAMPLES]
    cdef Py_ssize_t c, j, n, channel = 0 if job.fold > 1 else channel_of(job, c0)
    cdef Py_ssize_t end = job.channels if job.fold > 1 else channel_of(job, c0 + width - 1) + 1
    if job.by_columns and job.copies == 1 and not copied(job, OF_X):
        guess_columns(job, c0, width, &at, centre)
        channel += width // LANES * LANES
    while channel < end:
        n = min(LANES, end - channel)
        if n < LANES:
            memset(some, 0, sizeof(some))
        take_samples(job, channel, n, &at, some)
        store_reals(some, mean_of_samples(NULL, some, 0, SAMPLES) if job.by_columns else mean_of_samples(NULL, some, 0, RUN_SAMPLES))
        if job.copies == 1:
            memcpy(centre + (channel - c0), some, n * sizeof(real))
        for j in range(width if job.copies > 1 else 0):
            c = channel_of(job, c0 + j) - channel
            if 0 <= c < n:
                centre[j] = some[c]
        channel += n


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


cdef void exact_moments(const Job* job, Py_ssize_t c, double count, Block* of, Py_ssize_t j) noexcept nogil:
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
            of.mean[j], of.mean_lost[j], of.var[j] = s, 0, s - s
            return
        a = (s + lost_s if finite(lost_s) else s) / count
        m = two_sum(m, a, &rest)
    of.mean[j], of.mean_lost[j] = m, rest
    of.var[j] = ((q - s * a) + lost_q if finite(lost_q) else q - s * a) / count


cdef void update(const Vector* running, Py_ssize_t c0, Py_ssize_t n, const double* batch, double momentum, double factor) noexcept nogil:
    """running = (1 - momentum) * running + momentum * (batch * factor), in float64, rounded once."""
    cdef double values[CONCLUDED]
    cdef Py_ssize_t j
    read(running, c0, n, 0, values)
    for j in range(n):
        values[j] = (1 - momentum) * values[j] + momentum * (batch[j] * factor)
    write(running, c0, n, values)


cdef inline int judge_moments(const double* sums, double count, const double* centre, bint by_columns, Block* of, int* bad) noexcept nogil:
    """Means and variances, and how many of them are no good: where the mean lies more than 1.4 standard deviations from the guess, in the column
    layout 1 (1 normal channel in 16,000), or squares have left the range of the type."""
    cdef const double* s = sums
    cdef const double* q = sums + CONCLUDED
    cdef double least = (1e-30 if sizeof(real) == 4 else 1e-290) * count, most = 1e37 if sizeof(real) == 4 else 1e300
    cdef double d, m2, lost_s, lost_q, far = 1 if by_columns else 2
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
        of.var[j], of.mean_lost[j] = m2 / count, 0
        of.mean[j] = two_sum(centre[j], d, &of.mean_lost[j]) if sizeof(real) == 8 else centre[j] + d
        bad[j] = not ((far * m2 >= s[j] * d) & (m2 >= least) & (q[j] <= most))
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
    if judge_moments(sums, count, centre, job.by_columns, of, bad):
        for j in range(n):
            bad[j] &= not (sums[j] == 0 and sums[CONCLUDED + j] == 0 and all_are(job, c0 + j, centre[j]))
            any_bad |= bad[j]
        if any_bad:
            improve_moments(job, c0, n, of, bad)
    write(&job.mean, c0, n, of.mean)
    write(&job.var, c0, n, of.var)
    if job.running_mean.data != NULL:
        update(&job.running_mean, c0, n, of.mean, job.momentum, 1)
        update(&job.running_var, c0, n, of.var, job.momentum, count / (count - 1) if job.unbiased else 1)


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
    judge_moments(sums, count, centre, job.by_columns, of, still)
    for j in range(n):
        if bad[j] and still[j]:
            exact_moments(job, c0 + j, count, of, j)
