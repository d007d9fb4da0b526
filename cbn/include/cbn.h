/* Batch normalization of arrays in memory, for callers without Python: C, C++, Cython, ctypes, numba.
 *
 * With mean and var those of a channel over its outer * inner elements, var the population variance:
 *
 *     y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)
 *
 * The functions do what the Python package's batch_norm, batch_norm_train and batch_norm_backward do, to the same bits. They need neither the
 * GIL nor a thread that Python knows, and may be called by any number of threads at once, on outputs of their own.
 *
 * Arrays
 *   x, y, dy, dx, residual, residual_grad : contiguous, of type `dtype` and shape (outer, channels, inner). N,C,*spatial is
 *       (N, C, product of spatial); with the channels last, N,*spatial,C is (N * product of spatial, C, 1); N,C is (N, C, 1).
 *   weight, bias, running_mean, running_var, weight_grad, bias_grad : contiguous, of type `parameter_dtype` and shape (channels).
 *   mean, var : of doubles and shape (channels).
 *   What is written overlaps nothing else, except that y may be exactly x or residual, and dx exactly dy, x or residual. NULL is for what may
 *   be left out, where it says so below, and for arrays without elements.
 *
 * Numbers
 *   dtype, parameter_dtype : CBN_FLOAT32 or CBN_FLOAT64, which are the sizes of an element.
 *   eps : finite and >= 0; > 0 in training.
 *   activation : one of those below, with alpha and beta, which are not looked at where they have no meaning.
 *   threads : the most that the call may use, up to 4096; 0: the process's limit (cbn.set_num_threads). Results never depend on it.
 *
 * Each returns CBN_OK or, having written nothing,
 *   the number of a wrong argument, counted from the left and from 1: also a pointer that is NULL, not aligned to its type, or to memory that
 *       overlaps another argument's; a variance where one is negative; alpha where alpha and beta don't suit the activation;
 *   CBN_ONE_VALUE : training on one element a channel;
 *   CBN_NO_MEMORY : the system refuses the working memory, a few numbers for each channel and thread.
 *
 * As for the Python package: a forked child may call, calls from many threads don't use more threads together than the limit, the caller's
 * floating-point mode makes no difference. `with cbn.num_threads(n)` holds for Python calls only.
 *
 * To get the functions: each is a capsule in the dictionary cbn.capi.__pyx_capi__, once cbn.capi has been imported, for good. The
 * arguments of a function never change: what takes others gets another name.
 *
 *     C extension   include <Python.h>, then <cbn.h> (from the directory cbn.get_include()), and in each source file call cbn_import() first
 *     Cython        from cbn.capi cimport cbn_inference, CBN_FLOAT32
 *     ctypes        PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)), both from ctypes.pythonapi
 *     numba         numba.extending.get_cython_function_address("cbn.capi", "cbn_inference"), called as a ctypes.CFUNCTYPE that takes pointers
 *                   as ctypes.c_ssize_t: give it a.ctypes.data, or 0 for NULL
 *     C library     a pointer of type cbn_inference_function *, that one of the others hands to it
 */
#ifndef CBN_H
#define CBN_H

#include <stddef.h>

enum { CBN_FLOAT32 = 4, CBN_FLOAT64 = 8 };

enum {
    CBN_NONE = 0,
    CBN_RELU = 1,
    CBN_RELU6 = 2,
    CBN_CLIP = 3,           /* to alpha <= beta */
    CBN_LEAKY_RELU = 4,     /* with the finite slope alpha below 0 */
    CBN_HARD_SWISH = 5,
    CBN_SIGMOID = 6,
    CBN_SILU = 7
};

enum { CBN_OK = 0, CBN_NO_MEMORY = -1, CBN_ONE_VALUE = -2 };

#ifdef __cplusplus
extern "C" {
#endif

/* y, by the running statistics. residual, weight (ones) and bias (zeros) may be NULL. */
typedef int cbn_inference_function(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void *x, const void *residual, void *y,
    int parameter_dtype, const void *weight, const void *bias, const void *running_mean, const void *running_var,
    double eps, int activation, double alpha, double beta, int threads);

/* y, by the batch's own statistics, which go to mean and var (NaN for an empty batch). residual, weight and bias may be NULL. The running
 * statistics, unless both are NULL or the batch is empty, are updated, with m = outer * inner and 0 <= momentum <= 1:
 *
 *     running_mean = (1 - momentum) * running_mean + momentum * mean
 *     running_var  = (1 - momentum) * running_var  + momentum * var * m / (m - 1)
 *
 * To track the population variance, as Keras, TensorFlow, ONNX and Flax do, pass NULL for both and update them by mean and var.
 */
typedef int cbn_training_function(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void *x, const void *residual, void *y,
    int parameter_dtype, const void *weight, const void *bias, void *running_mean, void *running_var, double *mean, double *var,
    double momentum, double eps, int activation, double alpha, double beta, int threads);

/* dx, weight_grad, bias_grad and residual_grad: the gradients of a loss with respect to x, weight, bias and residual, from dy, that with
 * respect to y. x, residual, weight, bias, eps and the activation are as in the forward call. residual_grad, residual, weight and bias may be
 * NULL. training != 0: mean and var are what cbn_training gave; 0: they are the running statistics, and constants.
 */
typedef int cbn_backward_function(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void *dy, const void *x, const void *residual,
    void *dx, void *residual_grad,
    int parameter_dtype, const void *weight, const void *bias, const double *mean, const double *var, void *weight_grad, void *bias_grad,
    int training, double eps, int activation, double alpha, double beta, int threads);

/* The two halves of cbn_backward with training != 0, for a batch in parts: sum_dy and sum_dy_xhat of one part, arrays of doubles and shape (channels)
 * that are added up over all parts, and the gradients of a part from these. mean and var are those of the whole batch, and count its elements a
 * channel. The sums of all parts are the gradients of bias and weight. What may be NULL is as above.
 */
typedef int cbn_gradient_sums_function(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void *dy, const void *x, const void *residual,
    int parameter_dtype, const void *weight, const void *bias, const double *mean, const double *var, double *sum_dy, double *sum_dy_xhat,
    double eps, int activation, double alpha, double beta, int threads);

typedef int cbn_backward_by_sums_function(
    int dtype, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const void *dy, const void *x, const void *residual,
    void *dx, void *residual_grad,
    int parameter_dtype, const void *weight, const void *bias, const double *mean, const double *var,
    double count, const double *sum_dy, const double *sum_dy_xhat,
    double eps, int activation, double alpha, double beta, int threads);

#ifdef __cplusplus
}
#endif

#ifdef Py_PYTHON_H

static cbn_inference_function *cbn_inference;
static cbn_training_function *cbn_training;
static cbn_backward_function *cbn_backward;
static cbn_gradient_sums_function *cbn_gradient_sums;
static cbn_backward_by_sums_function *cbn_backward_by_sums;

/* Makes the functions above callable, with the GIL held. Returns 0, or -1 with a Python exception set. */
static inline int cbn_import(void)
{
    static const char *const names[] = {"cbn_inference", "cbn_training", "cbn_backward", "cbn_gradient_sums", "cbn_backward_by_sums"};
    void *functions[5];
    PyObject *module = PyImport_ImportModule("cbn.capi");
    PyObject *all = module ? PyObject_GetAttrString(module, "__pyx_capi__") : NULL;
    int i;
    Py_XDECREF(module);
    for (i = 0; i < 5 && all; i++) {
        PyObject *capsule = PyMapping_GetItemString(all, names[i]);
        functions[i] = capsule ? PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)) : NULL;
        Py_XDECREF(capsule);
        if (!functions[i])
            Py_CLEAR(all);
    }
    if (!all)
        return -1;
    Py_DECREF(all);
    cbn_inference = (cbn_inference_function *)functions[0];
    cbn_training = (cbn_training_function *)functions[1];
    cbn_backward = (cbn_backward_function *)functions[2];
    cbn_gradient_sums = (cbn_gradient_sums_function *)functions[3];
    cbn_backward_by_sums = (cbn_backward_by_sums_function *)functions[4];
    return 0;
}

#endif
#endif
