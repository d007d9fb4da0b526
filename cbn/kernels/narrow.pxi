# Arrays of 16 bits that are read where they are, and converted in registers. A part of body.pxi.

cdef extern from "elements.h" nogil:
    void load_16(bint brain, const void* p, float* to)
    void store_16(bint brain, const float* from_, void* p, bint stream)
    void store_32(bint brain, const float* from_, void* p, bint stream)


cdef inline bint read_narrow(const Job* job, int which, int dtype) noexcept nogil:
    return copied(job, which) and job.places.of[which].dtype == dtype and contiguous(job, &job.places.of[which])


cdef inline int narrow_source(const Job* job, int paired) noexcept nogil:
    """FLOAT16 or BFLOAT16 where all that a reduction takes is of that type, and in order, and the residual has x's strides; otherwise 0."""
    cdef int dtype
    cdef const Place* x
    cdef const Place* residual
    if not copied(job, OF_X) or paired == PAIRED and job.fusion:
        return 0
    x, residual = &job.places.of[OF_X], &job.places.of[OF_RESIDUAL]
    dtype = x.dtype
    if (dtype != FLOAT16 and dtype != BFLOAT16) or not read_narrow(job, OF_X, dtype) or paired and not read_narrow(job, OF_DY, dtype):
        return 0
    if paired == ADDED_PAIR and not (read_narrow(job, OF_RESIDUAL, dtype) and residual.strides[0] == x.strides[0]
                                     and residual.channel_stride == x.channel_stride):
        return 0
    return dtype
