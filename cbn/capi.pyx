"""The functions for callers without Python, which include/cbn.h describes: check plain arguments, make a job of them, run it.

A wrong argument is answered with its position; `a or b` is the first that isn't 0.
"""

from libc.float cimport DBL_MAX
from libc.stddef cimport ptrdiff_t
from libc.string cimport memset

from .kernels.job cimport BACKWARD, FLOAT32, FLOAT64, FORWARD, FROZEN, GRADIENTS, MOMENTS, Job, Vector, View
from .kernels.order cimport cut_channels, fold_views
from .native cimport any_negative, conclude_empty, execute, set_activation, worth_threads
from .threads cimport allowed

cdef enum:
    MOST_THREADS = 4096

cdef enum:                      # Array.role
    OPTIONAL = 1
    WRITTEN = 2
    ELEMENTS = 4                # of two with this role, what is written may be exactly what is read

# An argument that points to contiguous memory.
ctypedef struct Array:
    int position
    int role
    const char* data
    ptrdiff_t itemsize
    ptrdiff_t bytes


cdef inline Array array(int position, int role, const void* data, ptrdiff_t length, ptrdiff_t itemsize) noexcept nogil:
    return Array(position, role, <const char*>data, itemsize, length * itemsize)


cdef int wrong_array(const Array* arrays, int count) noexcept nogil:
    """The position of an array that is missing, misaligned, or written where it overlaps another one."""
    cdef const Array* a
    cdef const Array* b
    cdef int i, j
    for i in range(count):
        a = &arrays[i]
        if a.bytes == 0 or a.data == NULL and a.role & OPTIONAL:
            continue
        if a.data == NULL or <size_t>a.data % <size_t>a.itemsize:
            return a.position
        for j in range(count if a.role & WRITTEN else 0):
            b = &arrays[j]
            if i == j or b.data == NULL or b.bytes == 0 or a.data == b.data and a.role & b.role & ELEMENTS:
                continue
            if a.data < b.data + b.bytes and b.data < a.data + a.bytes:
                return a.position
    return 0


cdef int kernel_dtype(int dtype) noexcept nogil:
    return FLOAT32 if dtype == CBN_FLOAT32 else FLOAT64


cdef Vector vector(const void* data, int dtype) noexcept nogil:
    return Vector(<void*>data, 1, kernel_dtype(dtype))


cdef int begin(Job* job, int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, int position, int parameter_dtype) noexcept nogil:
    """Begin a job on arrays of this shape and type; parameter_dtype is at `position`, the others come first."""
    memset(job, 0, sizeof(Job))
    if dtype != CBN_FLOAT32 and dtype != CBN_FLOAT64:
        return 1
    if outer < 0:
        return 2
    if channels < 0:
        return 3
    # The bytes of an array are counted in a ptrdiff_t.
    if inner < 0 or <double>max(1, outer) * max(1, channels) * max(1, inner) > 2.0 ** (8 * sizeof(ptrdiff_t) - 5):
        return 4
    if parameter_dtype != CBN_FLOAT32 and parameter_dtype != CBN_FLOAT64:
        return position
    job.dtype = job.stored = kernel_dtype(dtype)
    job.outer, job.channels, job.inner = outer, channels, inner
    if channels == 1:           # all its elements are one stretch of memory, however they are split
        job.outer, job.inner = 1, outer * inner
    return 0


cdef int finish(Job* job, int last, double eps, bint training, int activation, double alpha, double beta, int threads) noexcept nogil:
    """Set what the last arguments say, `threads` being at position `last`."""
    if not 0 <= eps <= DBL_MAX or training and eps == 0:
        return last - 4
    if not CBN_NONE <= activation <= CBN_SILU:
        return last - 3
    if not set_activation(job, activation, alpha, beta, job.reduction == GRADIENTS or job.apply == BACKWARD):
        return last - 2
    if not 0 <= threads <= MOST_THREADS:
        return last
    job.eps = eps
    return 0


cdef int run(Job* job, const void* x, const void* dy, const void* residual, void* y, void* residual_grad, int threads) noexcept nogil:
    """Run a job that is complete but for its arrays."""
    cdef View* view
    cdef int i, itemsize
    if job.outer * job.channels * job.inner == 0:
        conclude_empty(job, job.channels)
        return CBN_OK
    job.x.data, job.dy.data, job.y.data = <void*>x, <void*>dy, y
    for i in range(3):
        view = &job.x if i == 0 else &job.dy if i == 1 else &job.y
        view.outer_stride = job.channels * job.inner
        view.channel_stride = job.inner
    if residual != NULL:
        job.with_residual = True
        job.residual = <const char*>residual - <const char*>x
    if residual_grad != NULL:
        job.with_residual_grad = True
        job.residual_grad = <char*>residual_grad - <char*>y
    cut_channels(job)
    fold_views(job)
    itemsize = 4 if job.dtype == FLOAT32 else 8
    job.bytes_read = itemsize * (1 + (dy != NULL) + (residual != NULL))
    job.bytes_written = itemsize * ((y != NULL) + (residual_grad != NULL))
    if execute(job, allowed(threads) if worth_threads(job) else 1):
        return CBN_OK
    return CBN_NO_MEMORY


cdef int cbn_inference(
        int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* x, const void* residual, void* y,
        int parameter_dtype, const void* weight, const void* bias, const void* running_mean, const void* running_var,
        double eps, int activation, double alpha, double beta, int threads) noexcept nogil:
    cdef Job job
    cdef Array arrays[7]
    cdef ptrdiff_t n
    cdef int wrong = begin(&job, dtype, outer, channels, inner, 8, parameter_dtype)
    if wrong:
        return wrong
    n = outer * channels * inner
    arrays[0] = array(5, ELEMENTS, x, n, dtype)
    arrays[1] = array(6, ELEMENTS | OPTIONAL, residual, n, dtype)
    arrays[2] = array(7, ELEMENTS | WRITTEN, y, n, dtype)
    arrays[3] = array(9, OPTIONAL, weight, channels, parameter_dtype)
    arrays[4] = array(10, OPTIONAL, bias, channels, parameter_dtype)
    arrays[5] = array(11, 0, running_mean, channels, parameter_dtype)
    arrays[6] = array(12, 0, running_var, channels, parameter_dtype)
    job.apply = FORWARD
    job.weight, job.bias = vector(weight, parameter_dtype), vector(bias, parameter_dtype)
    job.mean, job.var = vector(running_mean, parameter_dtype), vector(running_var, parameter_dtype)
    wrong = wrong_array(arrays, 7) or (12 if any_negative(&job.var, channels) else 0) \
        or finish(&job, 17, eps, False, activation, alpha, beta, threads)
    return wrong or run(&job, x, NULL, residual, y, NULL, threads)


cdef int cbn_training(
        int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* x, const void* residual, void* y,
        int parameter_dtype, const void* weight, const void* bias, void* running_mean, void* running_var, double* mean, double* var,
        double momentum, double eps, int activation, double alpha, double beta, int threads) noexcept nogil:
    cdef Job job
    cdef Array arrays[9]
    cdef ptrdiff_t n
    cdef int wrong = begin(&job, dtype, outer, channels, inner, 8, parameter_dtype)
    if wrong:
        return wrong
    n = outer * channels * inner
    arrays[0] = array(5, ELEMENTS, x, n, dtype)
    arrays[1] = array(6, ELEMENTS | OPTIONAL, residual, n, dtype)
    arrays[2] = array(7, ELEMENTS | WRITTEN, y, n, dtype)
    arrays[3] = array(9, OPTIONAL, weight, channels, parameter_dtype)
    arrays[4] = array(10, OPTIONAL, bias, channels, parameter_dtype)
    arrays[5] = array(11, WRITTEN | (OPTIONAL if running_var == NULL else 0), running_mean, channels, parameter_dtype)
    arrays[6] = array(12, WRITTEN | (OPTIONAL if running_mean == NULL else 0), running_var, channels, parameter_dtype)
    arrays[7] = array(13, WRITTEN, mean, channels, sizeof(double))
    arrays[8] = array(14, WRITTEN, var, channels, sizeof(double))
    job.reduction, job.apply = MOMENTS, FORWARD
    job.weight, job.bias = vector(weight, parameter_dtype), vector(bias, parameter_dtype)
    job.running_mean, job.running_var = vector(running_mean, parameter_dtype), vector(running_var, parameter_dtype)
    job.mean, job.var = vector(mean, CBN_FLOAT64), vector(var, CBN_FLOAT64)
    job.momentum = momentum
    job.unbiased = True
    wrong = wrong_array(arrays, 9) or (0 if 0 <= momentum <= 1 else 15) or finish(&job, 20, eps, True, activation, alpha, beta, threads) \
        or (CBN_ONE_VALUE if outer * inner == 1 else 0)
    return wrong or run(&job, x, NULL, residual, y, NULL, threads)


cdef int cbn_backward(
        int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* dy, const void* x, const void* residual,
        void* dx, void* residual_grad,
        int parameter_dtype, const void* weight, const void* bias, const double* mean, const double* var, void* weight_grad, void* bias_grad,
        int training, double eps, int activation, double alpha, double beta, int threads) noexcept nogil:
    cdef Job job
    cdef Array arrays[11]
    cdef ptrdiff_t n
    cdef int wrong = begin(&job, dtype, outer, channels, inner, 10, parameter_dtype)
    if wrong:
        return wrong
    n = outer * channels * inner
    arrays[0] = array(5, ELEMENTS, dy, n, dtype)
    arrays[1] = array(6, ELEMENTS, x, n, dtype)
    arrays[2] = array(7, ELEMENTS | OPTIONAL, residual, n, dtype)
    arrays[3] = array(8, ELEMENTS | WRITTEN, dx, n, dtype)
    arrays[4] = array(9, WRITTEN | OPTIONAL, residual_grad, n, dtype)
    arrays[5] = array(11, OPTIONAL, weight, channels, parameter_dtype)
    arrays[6] = array(12, OPTIONAL, bias, channels, parameter_dtype)
    arrays[7] = array(13, 0, mean, channels, sizeof(double))
    arrays[8] = array(14, 0, var, channels, sizeof(double))
    arrays[9] = array(15, WRITTEN, weight_grad, channels, parameter_dtype)
    arrays[10] = array(16, WRITTEN, bias_grad, channels, parameter_dtype)
    job.reduction, job.apply = GRADIENTS, BACKWARD if training else FROZEN
    job.weight, job.bias = vector(weight, parameter_dtype), vector(bias, parameter_dtype)
    job.mean, job.var = vector(mean, CBN_FLOAT64), vector(var, CBN_FLOAT64)
    job.weight_grad, job.bias_grad = vector(weight_grad, parameter_dtype), vector(bias_grad, parameter_dtype)
    wrong = wrong_array(arrays, 11) or (14 if any_negative(&job.var, channels) else 0) \
        or finish(&job, 22, eps, training, activation, alpha, beta, threads)
    # Without an activation nothing depends on the residual.
    return wrong or run(&job, x, dy, residual if job.activation else NULL, dx, residual_grad, threads)


cdef int cbn_gradient_sums(
        int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* dy, const void* x, const void* residual,
        int parameter_dtype, const void* weight, const void* bias, const double* mean, const double* var, double* sum_dy, double* sum_dy_xhat,
        double eps, int activation, double alpha, double beta, int threads) noexcept nogil:
    cdef Job job
    cdef Array arrays[9]
    cdef ptrdiff_t n
    cdef int wrong = begin(&job, dtype, outer, channels, inner, 8, parameter_dtype)
    if wrong:
        return wrong
    n = outer * channels * inner
    arrays[0] = array(5, ELEMENTS, dy, n, dtype)
    arrays[1] = array(6, ELEMENTS, x, n, dtype)
    arrays[2] = array(7, ELEMENTS | OPTIONAL, residual, n, dtype)
    arrays[3] = array(9, OPTIONAL, weight, channels, parameter_dtype)
    arrays[4] = array(10, OPTIONAL, bias, channels, parameter_dtype)
    arrays[5] = array(11, 0, mean, channels, sizeof(double))
    arrays[6] = array(12, 0, var, channels, sizeof(double))
    arrays[7] = array(13, WRITTEN, sum_dy, channels, sizeof(double))
    arrays[8] = array(14, WRITTEN, sum_dy_xhat, channels, sizeof(double))
    job.reduction = GRADIENTS
    job.weight, job.bias = vector(weight, parameter_dtype), vector(bias, parameter_dtype)
    job.mean, job.var = vector(mean, CBN_FLOAT64), vector(var, CBN_FLOAT64)
    job.bias_grad, job.weight_grad = vector(sum_dy, CBN_FLOAT64), vector(sum_dy_xhat, CBN_FLOAT64)
    wrong = wrong_array(arrays, 9) or (12 if any_negative(&job.var, channels) else 0) \
        or finish(&job, 19, eps, True, activation, alpha, beta, threads)
    return wrong or run(&job, x, dy, residual if job.activation else NULL, NULL, NULL, threads)


cdef int cbn_backward_by_sums(
        int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* dy, const void* x, const void* residual,
        void* dx, void* residual_grad,
        int parameter_dtype, const void* weight, const void* bias, const double* mean, const double* var,
        double count, const double* sum_dy, const double* sum_dy_xhat,
        double eps, int activation, double alpha, double beta, int threads) noexcept nogil:
    cdef Job job
    cdef Array arrays[11]
    cdef ptrdiff_t n
    cdef int wrong = begin(&job, dtype, outer, channels, inner, 10, parameter_dtype)
    if wrong:
        return wrong
    n = outer * channels * inner
    arrays[0] = array(5, ELEMENTS, dy, n, dtype)
    arrays[1] = array(6, ELEMENTS, x, n, dtype)
    arrays[2] = array(7, ELEMENTS | OPTIONAL, residual, n, dtype)
    arrays[3] = array(8, ELEMENTS | WRITTEN, dx, n, dtype)
    arrays[4] = array(9, WRITTEN | OPTIONAL, residual_grad, n, dtype)
    arrays[5] = array(11, OPTIONAL, weight, channels, parameter_dtype)
    arrays[6] = array(12, OPTIONAL, bias, channels, parameter_dtype)
    arrays[7] = array(13, 0, mean, channels, sizeof(double))
    arrays[8] = array(14, 0, var, channels, sizeof(double))
    arrays[9] = array(16, 0, sum_dy, channels, sizeof(double))
    arrays[10] = array(17, 0, sum_dy_xhat, channels, sizeof(double))
    job.apply = BACKWARD
    job.weight, job.bias = vector(weight, parameter_dtype), vector(bias, parameter_dtype)
    job.mean, job.var = vector(mean, CBN_FLOAT64), vector(var, CBN_FLOAT64)
    job.bias_grad, job.weight_grad = vector(sum_dy, CBN_FLOAT64), vector(sum_dy_xhat, CBN_FLOAT64)
    job.count = count
    wrong = wrong_array(arrays, 11) or (14 if any_negative(&job.var, channels) else 0) \
        or (0 if <double>outer * inner <= count <= 2.0 ** 62 else 15) or finish(&job, 22, eps, True, activation, alpha, beta, threads)
    return wrong or run(&job, x, dy, residual if job.activation else NULL, dx, residual_grad, threads)
