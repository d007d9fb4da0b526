# Between the sums and the apply pass: results, running statistics, and what the apply pass needs of each channel.
#
# forward:  y  = (x - hi) * scale + offset                       with scale = weight * invstd
# backward: dx = ((dy - offset) - (x - hi) * slope) * scale      with slope = weight_grad * invstd / m
# frozen:   dx = dy * scale
#
# hi is of the element type. Forward, it is where y is 0 (mean - bias / scale), so that small elements are right, too; where that is none, or leaves
# the type's range, or all elements are the same, and backward, it is the mean. What rounding it loses goes into the offset. Of channels whose elements
# may lie further apart than the type's largest number, hi is 0, so that x - hi stays finite.

# Of CONCLUDED channels.
ctypedef struct Block:
    double mean[CONCLUDED]
    double mean_lost[CONCLUDED]         # of float64 elements: what the batch's mean has lost by rounding
    double var[CONCLUDED]
    double invstd[CONCLUDED]
    double weight[CONCLUDED]
    double bias[CONCLUDED]
    double dy_sum[CONCLUDED]
    double weight_grad[CONCLUDED]
    double exact[CONCLUDED]             # the offset before it is rounded, and what is delicate if it is less
    double least[CONCLUDED]
    real hi[CONCLUDED]
    real scale[CONCLUDED]
    real offset[CONCLUDED]
    real slope[CONCLUDED]


cdef inline bint roughly(double eps, const Block* of, float* rough) noexcept nogil:
    """1 / sqrt(var + eps) as floats, and whether these have room for all of it."""
    cdef Py_ssize_t j
    cdef int ordinary = 0       # as wide as a float, so that they are counted side by side
    for j in range(CONCLUDED):
        rough[j] = <float>(of.var[j] + eps)
    for j in range(CONCLUDED):
        ordinary += (1 if rough[j] < <float>1e30 else 0) if rough[j] > <float>1e-30 else 0
    for j in range(CONCLUDED):
        rough[j] = <float>1 / sqrtf(rough[j])
    return ordinary == CONCLUDED


cdef inline void inverse_roots(double eps, Block* of) noexcept nogil:
    """invstd = 1 / sqrt(var + eps), where the elements are float32 in a third of the time of what float64 needs."""
    cdef float rough[CONCLUDED]
    cdef Py_ssize_t j
    cdef double a, r
    if sizeof(real) == 4 and roughly(eps, of, rough):
        for j in range(CONCLUDED):
            a, r = of.var[j] + eps, rough[j]
            r = r * (1.5 - 0.5 * a * r * r)         # Newton's method
            of.invstd[j] = r + 0.5 * r * (1 - a * r * r)
        return
    for j in range(CONCLUDED):
        of.invstd[j] = 1 / sqrt(of.var[j] + eps)


cdef inline double least_far_apart(const Job* job) noexcept nogil:
    """The variance from which on elements may differ from their mean by more than FLT_MAX: in this batch or, where it is given, by 256 standard
    deviations."""
    cdef double largest = FLT_MAX * <double>FLT_MAX
    if sizeof(real) == 8:
        return INFINITY
    return min(largest / 65536, largest / (<double>job.outer * job.inner)) if job.reduction == MOMENTS else largest / 65536


cdef inline void map_forward(const Job* job, Py_ssize_t c0, Py_ssize_t n, Block* of) noexcept nogil:
    """hi, scale and offset of the forward map."""
    cdef Py_ssize_t j
    cdef double s, root, r, most_root = FLT_MAX if sizeof(real) == 4 else DBL_MAX, far = least_far_apart(job)
    cdef int delicate = 0
    read(&job.weight, c0, n, 1, of.weight)
    read(&job.bias, c0, n, 0, of.bias)
    for j in range(CONCLUDED):
        s = of.weight[j] * of.invstd[j]
        if sizeof(real) == 4:               # to 14 digits
            r = <float>1 / <float>s
            root = of.mean[j] - of.bias[j] * (r * (2 - s * r))
        else:
            root = of.mean[j] - of.bias[j] / s
        root = root if fabs(root) <= most_root and of.var[j] > 0 else of.mean[j]
        of.hi[j], of.scale[j] = <real>(0 if of.var[j] >= far else root), <real>s
        s *= of.mean[j] - of.hi[j]
        of.exact[j] = of.bias[j] - s if fabs(s) <= DBL_MAX else of.bias[j]
        of.least[j] = 2.0 ** -30 * fabs(s)
        delicate += fabs(of.exact[j]) < of.least[j]
    if sizeof(real) == 8:
        refine_doubles(job.eps, of)
    elif delicate:
        refine_singles(job.eps, of)
    for j in range(CONCLUDED):
        of.offset[j] = <real>of.exact[j]


# offset = bias - (mean - hi) * weight / sqrt(var + eps) is y where x is hi. Both terms are equal but for the rounding of hi, so that float64 loses what
# small elements consist of: of float32 elements, in the channels where less than 2 ** -30 of them is left, one in 30; of float64 elements always.
# There the offset is computed in numbers of two parts each, and taken if no part has left the range of the type.

cdef void refine_singles(double eps, Block* of) noexcept nogil:
    """Products of two floats are exact in float64."""
    cdef float rough[CONCLUDED]
    cdef double a, lost, r, u, residual, w, s, rest, m, offset
    cdef float m1, s1
    cdef Py_ssize_t j
    if not roughly(eps, of, rough):
        return
    for j in range(CONCLUDED):
        # invstd = r + rest, by a step of Newton's method whose residual 1 - (var + eps) * r ** 2 is exact to 20 digits
        lost = 0
        a, r = two_sum(of.var[j], eps, &lost), rough[j]
        u = <float>a * r
        residual = ((1 - <float>u * r) - (u - <float>u) * r) - ((a - <float>a) + lost) * r * r
        rest = r * residual * (0.5 + 0.375 * residual)
        lost = 0
        w = <float>of.weight[j]
        s, rest = w * r, w * rest + (of.weight[j] - w) * r
        m = two_sum(of.mean[j], -of.hi[j], &lost)
        m1, s1 = <float>m, <float>s
        rest = ((m - m1) * (s - s1) + m * rest) + lost * s
        offset = (((of.bias[j] - <double>m1 * s1) - m1 * (s - s1)) - (m - m1) * s1) - rest
        of.exact[j] = (offset if fabs(offset) <= DBL_MAX else of.exact[j]) if fabs(of.exact[j]) < of.least[j] else of.exact[j]


cdef void refine_doubles(double eps, Block* of) noexcept nogil:
    cdef double v, lost_v, r, p, lost, s, lost_s, m, lost_m, rest, offset
    cdef Py_ssize_t j
    for j in range(CONCLUDED):
        lost_v = lost_m = 0
        v = two_sum(of.var[j], eps, &lost_v)
        r = sqrt(v)
        p = two_product(r, r, &lost)
        lost_v = (((v - p) - lost) + lost_v) / (2 * r)
        s = of.weight[j] / r
        p = two_product(s, r, &lost)
        lost_s = (((of.weight[j] - p) - lost) - s * lost_v) / r
        m = two_sum(of.mean[j], -of.hi[j], &lost_m)
        lost_m += of.mean_lost[j]
        p = two_product(m, s, &lost)
        rest = -((lost + m * lost_s) + lost_m * s)
        offset = two_sum(of.bias[j], -p, &rest) + rest
        of.exact[j] = offset if fabs(offset) <= DBL_MAX else of.exact[j]


cdef inline void map_backward(const Job* job, Py_ssize_t c0, Py_ssize_t n, Block* of) noexcept nogil:
    """hi, scale, offset and slope of the backward map."""
    cdef Py_ssize_t j
    cdef double lost, mean, count = job.count, far = least_far_apart(job)
    read(&job.weight, c0, n, 1, of.weight)
    for j in range(CONCLUDED):
        of.hi[j] = <real>(0 if of.var[j] >= far else of.mean[j])
        of.scale[j] = <real>(of.weight[j] * of.invstd[j])
        of.slope[j] = <real>(of.weight_grad[j] * of.invstd[j] / count)
        lost = (of.mean[j] - of.hi[j]) * of.slope[j]
        mean = of.dy_sum[j] / count
        of.offset[j] = <real>(mean - lost if fabs(lost) <= DBL_MAX else mean)


cdef void conclude_gradients(const Job* job, Py_ssize_t c0, Py_ssize_t n, Block* of) noexcept nogil:
    cdef double sums[4 * CONCLUDED]
    cdef Py_ssize_t j
    cdef double s, q
    merge(job, c0, n, sums)
    for j in range(n):
        s, q = sums[j], sums[CONCLUDED + j]
        if sizeof(real) == 8:
            q = q + sums[3 * CONCLUDED + j] if finite(sums[3 * CONCLUDED + j]) else q
            s = s + sums[2 * CONCLUDED + j] if finite(sums[2 * CONCLUDED + j]) else s
        else:
            q -= s * (of.mean[j] - <float>of.mean[j]) if of.mean[j] != <float>of.mean[j] else 0     # the sums are about the rounded mean
        of.dy_sum[j], of.weight_grad[j] = s, q * of.invstd[j]
    write(&job.weight_grad, c0, n, of.weight_grad)
    write(&job.bias_grad, c0, n, of.dy_sum)


cdef void spread_coefficients(const Job* job, real* to, Py_ssize_t c0, Py_ssize_t n, const real* values) noexcept nogil:
    cdef Py_ssize_t j, copy, column, first = c0 * job.column_step
    for copy in range(job.copies):
        for j in range(n):
            to[first + copy * job.copy_step + j * job.column_step] = values[j]
    for column in range(first, LANES if job.by_columns else 0):
        if 0 <= channel_of(job, column) - c0 < n:
            to[job.columns + column] = to[column]


cdef inline void set_coefficients(const Job* job, int which, Py_ssize_t c0, Py_ssize_t n, const real* values) noexcept nogil:
    """Of each of the channels' columns; the first columns' stand once more after the last, for rows that begin later."""
    cdef real* to = coefficients_of(job, which)
    if n < CONCLUDED or job.copies > 1:
        spread_coefficients(job, to, c0, n, values)
        return
    memcpy(to + c0, values, CONCLUDED * sizeof(real))
    if c0 == 0 and job.by_columns:
        memcpy(to + job.columns, values, LANES * sizeof(real))


cdef void conclude_block(const Job* job, Py_ssize_t c0, Py_ssize_t n) noexcept nogil:
    """For n <= CONCLUDED channels from c0 on, from the chunks' sums to the results and to what the apply pass needs."""
    cdef Block of
    cdef int first
    if job.reduction == MOMENTS:
        conclude_moments(job, c0, n, &of)
    else:
        read(&job.mean, c0, n, 0, of.mean)
        memset(of.mean_lost, 0, sizeof(of.mean_lost))
        read(&job.var, c0, n, 1, of.var)
    if not (job.apply or job.reduction == GRADIENTS):
        return
    inverse_roots(job.eps, &of)
    if job.apply == FORWARD or job.activation:
        map_forward(job, c0, n, &of)
        first = HI if job.apply == FORWARD else GATE_HI
        set_coefficients(job, first, c0, n, of.hi)
        set_coefficients(job, first + 1, c0, n, of.scale)
        set_coefficients(job, first + 2, c0, n, of.offset)
    if job.apply == FORWARD:
        return
    memset(of.dy_sum, 0, sizeof(of.dy_sum))
    memset(of.weight_grad, 0, sizeof(of.weight_grad))
    if job.reduction == GRADIENTS and job.weight_grad.data != NULL:
        conclude_gradients(job, c0, n, &of)
    elif job.reduction == 0:
        read(&job.weight_grad, c0, n, 0, of.weight_grad)
        read(&job.bias_grad, c0, n, 0, of.dy_sum)
    if job.apply:
        map_backward(job, c0, n, &of)
        set_coefficients(job, HI, c0, n, of.hi)
        set_coefficients(job, SCALE, c0, n, of.scale)
        set_coefficients(job, OFFSET, c0, n, of.offset)
        set_coefficients(job, SLOPE, c0, n, of.slope)


cdef inline void conclude(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    while c0 < c1:
        conclude_block(job, c0, min(<Py_ssize_t>CONCLUDED, c1 - c0))
        c0 += CONCLUDED


cdef void centre_gradients(const Job* job, Py_ssize_t c0, Py_ssize_t width, Centres* of) noexcept nogil:
    """What sums of gradients need: of each column the mean and, behind an activation, the forward map."""
    cdef Block block
    cdef bint folded = job.fold > 1
    cdef Py_ssize_t j, n, c, channel = 0 if folded else channel_of(job, c0), end = job.channels if folded else channel_of(job, c0 + width - 1) + 1
    of.activation = activation_of(job)
    while channel < end:
        n = min(end - channel, <Py_ssize_t>CONCLUDED)
        read(&job.mean, channel, n, 0, block.mean)
        if job.activation:
            memset(block.mean_lost, 0, sizeof(block.mean_lost))
            read(&job.var, channel, n, 1, block.var)
            inverse_roots(job.eps, &block)
            map_forward(job, channel, n, &block)
        for j in range(channel - c0 if job.copies == 1 else 0, channel - c0 + n if job.copies == 1 else width):
            c = channel_of(job, c0 + j) - channel
            if 0 <= c < n:
                of.centre[j] = <real>block.mean[c]
                if job.activation:
                    of.hi[j], of.scale[j], of.offset[j] = block.hi[c], block.scale[c], block.offset[c]
        channel += n


cdef void reduce(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width) noexcept nogil:
    """The sums of columns c0 to c0 + width over chunk k, into job.partials."""
    cdef Centres of
    cdef Chunk chunk = chunk_of(job, k)
    if job.reduction == MOMENTS:
        guess_centres(job, c0, width, of.centre)
        if k == 0:
            memcpy(coefficients_of(job, CENTRE) + c0, of.centre, width * sizeof(real))
    elif job.weight_grad.data != NULL:
        centre_gradients(job, c0, width, &of)
    else:
        return
    sum_group(job, &chunk, c0, width, &of, job.partials + k * sums_of(job) * job.columns + c0, job.columns)
