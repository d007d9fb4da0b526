# cython: language_level=3
"""Calls cbn's functions from Cython, with no GIL: pointers come as addresses, with 0 for NULL."""

from cython.parallel cimport prange

from cbn.capi cimport CBN_FLOAT32, CBN_NONE, CBN_OK, cbn_backward, cbn_inference, cbn_training


def inference(int dtype, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, size_t x, size_t residual, size_t y, int parameter_dtype,
              size_t weight, size_t bias, size_t running_mean, size_t running_var, double eps, int activation, double alpha, double beta,
              int threads):
    with nogil:
        status = cbn_inference(dtype, outer, channels, inner, <void*>x, <void*>residual, <void*>y, parameter_dtype, <void*>weight, <void*>bias,
                               <void*>running_mean, <void*>running_var, eps, activation, alpha, beta, threads)
    return status


def training(int dtype, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, size_t x, size_t residual, size_t y, int parameter_dtype,
             size_t weight, size_t bias, size_t running_mean, size_t running_var, size_t mean, size_t var, double momentum, double eps,
             int activation, double alpha, double beta, int threads):
    with nogil:
        status = cbn_training(dtype, outer, channels, inner, <void*>x, <void*>residual, <void*>y, parameter_dtype, <void*>weight, <void*>bias,
                              <void*>running_mean, <void*>running_var, <double*>mean, <double*>var, momentum, eps, activation, alpha, beta,
                              threads)
    return status


def backward(int dtype, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, size_t dy, size_t x, size_t residual, size_t dx,
             size_t residual_grad, int parameter_dtype, size_t weight, size_t bias, size_t mean, size_t var, size_t weight_grad,
             size_t bias_grad, int training, double eps, int activation, double alpha, double beta, int threads):
    with nogil:
        status = cbn_backward(dtype, outer, channels, inner, <void*>dy, <void*>x, <void*>residual, <void*>dx, <void*>residual_grad,
                              parameter_dtype, <void*>weight, <void*>bias, <double*>mean, <double*>var, <void*>weight_grad, <void*>bias_grad,
                              training, eps, activation, alpha, beta, threads)
    return status


def batches_in_parallel(const float[:, :, ::1] x, double[:, ::1] mean, double[:, ::1] var, float[:, :, ::1] y):
    """Training on each of some batches (N, C) in a prange of two threads; returns how many failed."""
    cdef Py_ssize_t n
    cdef int failed = 0
    for n in prange(x.shape[0], nogil=True, num_threads=2):
        failed += cbn_training(CBN_FLOAT32, x.shape[1], x.shape[2], 1, <void*>&x[n, 0, 0], NULL, &y[n, 0, 0], CBN_FLOAT32, NULL, NULL, NULL, NULL,
                               &mean[n, 0], &var[n, 0], 0.1, 1e-5, CBN_NONE, 0, 0, 0) != CBN_OK
    return failed


def samples_in_parallel(const float[:, :, ::1] x, const float[::1] mean, const float[::1] var, float[:, :, ::1] y):
    """Inference on each sample in a prange of two threads; returns how many failed."""
    cdef Py_ssize_t n
    cdef int failed = 0
    for n in prange(x.shape[0], nogil=True, num_threads=2):
        failed += cbn_inference(CBN_FLOAT32, 1, x.shape[1], x.shape[2], &x[n, 0, 0], NULL, &y[n, 0, 0], CBN_FLOAT32, NULL, NULL, &mean[0],
                                &var[0], 1e-5, CBN_NONE, 0, 0, 0) != CBN_OK
    return failed
