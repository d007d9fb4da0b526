# Batch normalization for callers without Python, from any thread, with no GIL: include/cbn.h says what each function does.

from libc.stddef cimport ptrdiff_t

cdef enum:
    CBN_FLOAT32 = 4
    CBN_FLOAT64 = 8

cdef enum:
    CBN_NONE = 0
    CBN_RELU = 1
    CBN_RELU6 = 2
    CBN_CLIP = 3
    CBN_LEAKY_RELU = 4
    CBN_HARD_SWISH = 5
    CBN_SIGMOID = 6
    CBN_SILU = 7

cdef enum:
    CBN_OK = 0
    CBN_NO_MEMORY = -1
    CBN_ONE_VALUE = -2

cdef int cbn_inference(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* x, const void* residual, void* y,
    int parameter_dtype, const void* weight, const void* bias, const void* running_mean, const void* running_var,
    double eps, int activation, double alpha, double beta, int threads) noexcept nogil

cdef int cbn_training(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* x, const void* residual, void* y,
    int parameter_dtype, const void* weight, const void* bias, void* running_mean, void* running_var, double* mean, double* var,
    double momentum, double eps, int activation, double alpha, double beta, int threads) noexcept nogil

cdef int cbn_backward(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* dy, const void* x, const void* residual,
    void* dx, void* residual_grad,
    int parameter_dtype, const void* weight, const void* bias, const double* mean, const double* var, void* weight_grad, void* bias_grad,
    int training, double eps, int activation, double alpha, double beta, int threads) noexcept nogil

cdef int cbn_gradient_sums(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* dy, const void* x, const void* residual,
    int parameter_dtype, const void* weight, const void* bias, const double* mean, const double* var, double* sum_dy, double* sum_dy_xhat,
    double eps, int activation, double alpha, double beta, int threads) noexcept nogil

cdef int cbn_backward_by_sums(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void* dy, const void* x, const void* residual,
    void* dx, void* residual_grad,
    int parameter_dtype, const void* weight, const void* bias, const double* mean, const double* var,
    double count, const double* sum_dy, const double* sum_dy_xhat,
    double eps, int activation, double alpha, double beta, int threads) noexcept nogil
