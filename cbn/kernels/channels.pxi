# What there is one of for each channel, a block of CONCLUDED channels at a time: parameters, results, coefficients, and the sums of chunks.

cdef enum:
    CONCLUDED = 32              # channels that are concluded side by side: always so many, as loops of constant length are vectors throughout


cdef inline bint finite(double a) noexcept nogil:
    return fabs(a) <= DBL_MAX


cdef inline real* coefficients_of(const Job* job, int which) noexcept nogil:
    """One of the arrays of coefficients; it may be read LANES before its beginning."""
    return <real*>job.coefficients + LANES + which * coefficient_stride(job.columns)


cdef inline Py_ssize_t channel_of(const Job* job, Py_ssize_t column) noexcept nogil:
    if job.copies == 1:
        return column
    return column // job.column_step if job.column_step > 1 else column % job.channels


cdef void read_some(const Vector* vector, Py_ssize_t c0, Py_ssize_t n, double otherwise, double* to) noexcept nogil:
    cdef Py_ssize_t j, at
    for j in range(CONCLUDED):
        at = (c0 + j) * vector.stride
        to[j] = otherwise
        if j < n and vector.data != NULL:
            to[j] = (<const float*>vector.data)[at] if vector.dtype == FLOAT32 else (<const double*>vector.data)[at]


cdef inline void read(const Vector* vector, Py_ssize_t c0, Py_ssize_t n, double otherwise, double* to) noexcept nogil:
    """Values c0 to c0 + n of a vector, and `otherwise` for those there are none of. Whole blocks, side by side, are loops of constant length."""
    cdef float singles[CONCLUDED]
    cdef Py_ssize_t j
    if n < CONCLUDED or vector.stride != 1 or vector.data == NULL:
        read_some(vector, c0, n, otherwise, to)
    elif vector.dtype == FLOAT32:
        memcpy(singles, <const float*>vector.data + c0, sizeof(singles))
        for j in range(CONCLUDED):
            to[j] = singles[j]
    else:
        memcpy(to, <const double*>vector.data + c0, CONCLUDED * sizeof(double))


cdef void write(const Vector* vector, Py_ssize_t c0, Py_ssize_t n, const double* values) noexcept nogil:
    cdef Py_ssize_t j, stride = vector.stride
    cdef float* singles = <float*>vector.data + c0 * stride
    cdef double* doubles = <double*>vector.data + c0 * stride
    if vector.dtype == FLOAT32:
        for j in range(n):
            singles[j * stride] = <float>values[j]
    elif n == CONCLUDED and stride == 1:
        memcpy(doubles, values, CONCLUDED * sizeof(double))
    else:
        for j in range(n):
            doubles[j * stride] = values[j]


cdef inline void gather(const double* values, Py_ssize_t n, Py_ssize_t step, double* to) noexcept nogil:
    """Of channels that are `step` apart."""
    cdef Py_ssize_t j
    if n == CONCLUDED and step == 1:
        memcpy(to, values, CONCLUDED * sizeof(double))
    else:
        for j in range(n):
            to[j] = values[j * step]


cdef void merge(const Job* job, Py_ssize_t c0, Py_ssize_t n, double* sums) noexcept nogil:
    """The sums of channels over chunks and columns, in their order: CONCLUDED numbers of each kind."""
    cdef int i, kinds = 4 if sizeof(real) == 8 else 2
    cdef Py_ssize_t j, k, copy
    cdef double more[4 * CONCLUDED]
    cdef const double* part
    for j in range(kinds * CONCLUDED if n < CONCLUDED else 0):
        sums[j] = more[j] = 0
    for k in range(job.chunks):
        for copy in range(job.copies):
            part = job.partials + k * kinds * job.columns + c0 * job.column_step + copy * job.copy_step
            for i in range(kinds):
                gather(part + i * job.columns, n, job.column_step, (sums if k + copy == 0 else more) + i * CONCLUDED)
            if k + copy > 0:
                merge_sums(sums, more)


cdef inline void merge_sums(double* sums, const double* more) noexcept nogil:
    cdef Py_ssize_t j
    cdef double total[4 * CONCLUDED]
    memcpy(total, sums, (4 if sizeof(real) == 8 else 2) * CONCLUDED * sizeof(double))
    for j in range(2 * CONCLUDED):
        if sizeof(real) == 4:
            total[j] += more[j]
        else:
            total[j] = two_sum(total[j], more[j], &total[2 * CONCLUDED + j])
            total[2 * CONCLUDED + j] += more[2 * CONCLUDED + j]
    memcpy(sums, total, (4 if sizeof(real) == 8 else 2) * CONCLUDED * sizeof(double))
