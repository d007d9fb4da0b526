/* Calls cbn's functions from a C extension, with no GIL: pointers come as addresses, with 0 for NULL. */
#include <Python.h>
#include <cbn.h>

#define P(address) ((void *)(size_t)(address))

static PyObject *inference(PyObject *self, PyObject *args)
{
    int dtype, parameter_dtype, activation, threads, status;
    Py_ssize_t outer, channels, inner;
    unsigned long long x, residual, y, weight, bias, mean, var;
    double eps, alpha, beta;
    (void)self;
    if (!PyArg_ParseTuple(args, "innnKKKiKKKKdiddi", &dtype, &outer, &channels, &inner, &x, &residual, &y, &parameter_dtype, &weight, &bias,
                          &mean, &var, &eps, &activation, &alpha, &beta, &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_inference(dtype, outer, channels, inner, P(x), P(residual), P(y), parameter_dtype, P(weight), P(bias), P(mean), P(var), eps,
                           activation, alpha, beta, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(status);
}

static PyObject *training(PyObject *self, PyObject *args)
{
    int dtype, parameter_dtype, activation, threads, status;
    Py_ssize_t outer, channels, inner;
    unsigned long long x, residual, y, weight, bias, running_mean, running_var, mean, var;
    double momentum, eps, alpha, beta;
    (void)self;
    if (!PyArg_ParseTuple(args, "innnKKKiKKKKKKddiddi", &dtype, &outer, &channels, &inner, &x, &residual, &y, &parameter_dtype, &weight, &bias,
                          &running_mean, &running_var, &mean, &var, &momentum, &eps, &activation, &alpha, &beta, &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_training(dtype, outer, channels, inner, P(x), P(residual), P(y), parameter_dtype, P(weight), P(bias), P(running_mean),
                          P(running_var), P(mean), P(var), momentum, eps, activation, alpha, beta, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(status);
}

static PyObject *backward(PyObject *self, PyObject *args)
{
    int dtype, parameter_dtype, train, activation, threads, status;
    Py_ssize_t outer, channels, inner;
    unsigned long long dy, x, residual, dx, residual_grad, weight, bias, mean, var, weight_grad, bias_grad;
    double eps, alpha, beta;
    (void)self;
    if (!PyArg_ParseTuple(args, "innnKKKKKiKKKKKKididdi", &dtype, &outer, &channels, &inner, &dy, &x, &residual, &dx, &residual_grad,
                          &parameter_dtype, &weight, &bias, &mean, &var, &weight_grad, &bias_grad, &train, &eps, &activation, &alpha, &beta,
                          &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_backward(dtype, outer, channels, inner, P(dy), P(x), P(residual), P(dx), P(residual_grad), parameter_dtype, P(weight), P(bias),
                          P(mean), P(var), P(weight_grad), P(bias_grad), train, eps, activation, alpha, beta, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(status);
}

static PyMethodDef methods[] = {
    {"inference", inference, METH_VARARGS, NULL},
    {"training", training, METH_VARARGS, NULL},
    {"backward", backward, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "from_c", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_from_c(void)
{
    if (cbn_import() < 0)
        return NULL;
    return PyModule_Create(&definition);
}
