# Who does what in which order: the phases of a job, each a range of items that threads share.

cdef enum:              # phases
    CHANNELS            # all that is to be done, a group of channels after the other
    REDUCE
    CONCLUDE
    APPLY
    ALONE               # CONCLUDE and APPLY


cdef inline void channel_phase(const Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Items are groups of channels, which are columns: reduced, concluded and applied to while they are in cache."""
    cdef Py_ssize_t item, n, k, c0, c1
    for item in range(begin, end):
        c0 = item * job.group
        c1 = min(c0 + job.group, job.columns)
        for k in range(job.chunks):
            reduce(job, k, c0, c1 - c0)
        conclude(job, c0, c1)
        if job.apply and job.by_columns:
            apply(job, 0, job.rows, c0, c1, 0, 1)
        elif job.apply:
            # From the end: what was read last is most likely still in cache.
            for n in range(job.rows - 1, -1, -1):
                apply(job, n, n + 1, c0, c1, 0, job.length)


cdef inline void reduce_phase(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Items are chunks x groups of the columns c0 to c1."""
    cdef Py_ssize_t item, c, groups = groups_of(job, c0, c1)
    for item in range(begin, end):
        c = c0 + item % groups * job.group
        reduce(job, item // groups, c, min(job.group, c1 - c))


cdef inline void apply_rows_phase(const Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Items are rows of the column layout. They are taken from the end: what a reduction has just read last is most likely still in cache."""
    cdef Py_ssize_t item = end, n, count = max(<Py_ssize_t>1, RECENT // job.columns) if job.far and job.reduction and not job.stream else end - begin
    if job.tail and end == job.rows:
        apply(job, end, end + 1, 0, job.tail, 0, 1)
    while item > begin:
        n = max(begin, item - count)
        apply(job, n, item, 0, job.columns, 0, 1)
        item = n


cdef inline void apply_runs_phase(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Items are runs or pieces of runs of the columns c0 to c1, in the order of memory; from the end, as above."""
    cdef Py_ssize_t item = end, n, c, piece, count, width = c1 - c0
    while item > begin:
        n = (item - 1) // (width * job.pieces)
        c = (item - 1) // job.pieces - n * width
        if job.pieces == 1:
            count = min(c + 1, item - begin)
            apply(job, n, n + 1, c0 + c + 1 - count, c0 + c + 1, 0, job.length)
            item -= count
        else:
            piece = (item - 1) % job.pieces
            apply(job, n, n + 1, c0 + c, c0 + c + 1, piece * job.piece, (piece + 1) * job.piece if piece < job.pieces - 1 else job.length)
            item -= 1


cdef inline void conclude_alone(const Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """For the apply pass over these items."""
    cdef Py_ssize_t first = begin // job.pieces, final = (end - 1) // job.pieces
    if job.by_columns or first // job.columns != final // job.columns:
        conclude(job, 0, job.channels)
    else:
        conclude(job, first % job.columns, final % job.columns + 1)


cdef inline Py_ssize_t items_of(const Job* job, int phase, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    if phase == CHANNELS:
        return groups_of(job, 0, job.columns)
    elif phase == REDUCE:
        return job.chunks * groups_of(job, c0, c1)
    elif phase == CONCLUDE:
        return job.channels if job.by_columns else c1 - c0
    elif job.by_columns:
        return job.rows
    return job.rows * (c1 - c0) * job.pieces


cdef inline void work(const Job* job, int phase, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    if phase == CHANNELS:
        channel_phase(job, begin, end)
    elif phase == REDUCE:
        reduce_phase(job, c0, c1, begin, end)
    elif phase == CONCLUDE:
        conclude(job, c0 + begin, c0 + end)
    else:
        if phase == ALONE:
            conclude_alone(job, begin, end)
        if job.by_columns:
            apply_rows_phase(job, begin, end)
        else:
            apply_runs_phase(job, c0, c1, begin, end)
    if job.stream:
        stream_fence()


cdef void share(const Job* shared, int phase, Py_ssize_t window, Py_ssize_t i) noexcept nogil:
    """Share i of job.threads of a phase's items: each thread the same share every time."""
    cdef unsigned long caller_mode = default_float_mode()
    cdef Job job = shared[0]
    cdef bint timed = i == 0 and job.serial_seconds != NULL     # the calling thread takes the first share
    cdef double start = seconds() if timed else 0
    cdef Py_ssize_t c0 = window * job.window, c1 = min(c0 + job.window, job.columns), items = items_of(&job, phase, c0, c1)
    cdef Py_ssize_t begin = ceil_div(items * i, job.threads), end = ceil_div(items * (i + 1), job.threads)       # the first share is never empty
    if phase == ALONE or phase == CHANNELS:
        # Coefficients of its own for each thread: made twice sooner than fetched from another core, with which it shares no cache line.
        job.coefficients = <real*>job.coefficients + i * COEFFICIENTS * coefficient_stride(job.columns)
    job.copies_at = <char*>job.copies_at + i * ARRAYS * COPIED * sizeof(real)
    if begin < end:
        work(&job, phase, c0, c1, begin, end)
    if timed and begin < end:
        job.serial_seconds[0] += (seconds() - start) * items / (end - begin)
    restore_float_mode(caller_mode)


cdef void one_phase(const Job* job, int phase) noexcept nogil:
    """A phase that needs no other one: groups of channels from statistics to results, or rows. In a function of its own, to whose stack alone the
    thread of the last share writes its number."""
    cdef Py_ssize_t i
    for i in prange(job.threads, num_threads=job.threads, schedule="static", chunksize=1):
        share(job, phase, 0, i)


cdef void all_phases(const Job* job, Py_ssize_t thread) noexcept nogil:
    """What one thread of a team does of all the phases, window by window; the team waits for all its threads between them."""
    cdef Py_ssize_t window, i
    cdef int phase
    for window in range(ceil_div(job.columns, job.window)):
        for phase in range(REDUCE, APPLY + 1 if job.apply else CONCLUDE + 1):
            if job.threads > 1 and (window > 0 or phase > REDUCE):      # of one thread, it would be that of a region around the call
                team_barrier()
            i = thread
            while i < job.threads:
                share(job, phase, window, i)
                i += team_size()


cdef void run(const Job* job) noexcept nogil:
    cdef bint one = job.by_channel or not job.reduction
    if one and job.threads > 1:
        one_phase(job, CHANNELS if job.by_channel else ALONE)
    elif one:
        share(job, CHANNELS if job.by_channel else ALONE, 0, 0)
    elif job.threads == 1:
        all_phases(job, 0)
    else:
        # No prange for each phase: the thread of the last share would write its number to this stack every time, 0.3 us each.
        with parallel(num_threads=job.threads):
            all_phases(job, threadid())


cdef Table table = Table(run=run)
capsule = PyCapsule_New(&table, "cbn.kernels.Table", NULL)
