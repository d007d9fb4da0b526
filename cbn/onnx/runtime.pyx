# A custom-operator library for ONNX Runtime: BatchNormalization of the domain "cbn", at inference, by cbn_inference.
#
# ONNX Runtime's packages come without its C header, so what is needed of it stands here. Its API is a table of functions, and a custom operator
# is one as well; neither ever changes the places of its entries, so that a function is known by its number (onnxruntime_c_api.h).

from libc.stdint cimport int64_t, uint32_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport strcmp

from cbn.capi cimport (
    CBN_CLIP, CBN_FLOAT32, CBN_FLOAT64, CBN_HARD_SWISH, CBN_LEAKY_RELU, CBN_NO_MEMORY, CBN_NONE, CBN_RELU, CBN_RELU6, CBN_SIGMOID, CBN_SILU,
    cbn_inference)

cdef extern from *:             # Cython declares it again, and the package is compiled with all symbols hidden
    """
    __attribute__((visibility("default"))) void *RegisterCustomOps(void *, void **);
    """

cdef enum:
    VERSION = 17                # of the API: of ONNX Runtime 1.17, the first that knows all entries of Operator
    FAIL = 1                    # codes of errors
    INVALID_ARGUMENT = 2
    FLOAT = 1                   # types of elements
    DOUBLE = 11
    MOST_DIMENSIONS = 32
    LAST_VERSION = 2147483647

cdef enum:                      # the functions' numbers in the API's table
    CREATE_STATUS = 0
    CREATE_DOMAIN = 26
    ADD_OPERATOR = 27
    ADD_DOMAIN = 28
    TENSOR_DATA = 51
    COUNT_DIMENSIONS = 61
    DIMENSIONS = 62
    TYPE_AND_SHAPE = 65
    FLOAT_ATTRIBUTE = 85
    STRING_ATTRIBUTE = 87
    INPUT = 90
    OUTPUT = 91
    RELEASE_STATUS = 93
    RELEASE_TYPE_AND_SHAPE = 99

ctypedef void *Status           # NULL: no error
ctypedef void **Api
ctypedef const void **(*get_api)(uint32_t version) noexcept nogil
ctypedef Status (*create_status)(int code, const char *message) noexcept nogil
ctypedef Status (*create_domain)(const char *name, void **domain) noexcept nogil
ctypedef Status (*add)(void *to, void *what) noexcept nogil
ctypedef Status (*get)(const void *of, void *out) noexcept nogil
ctypedef Status (*get_dimensions)(const void *info, int64_t *dimensions, size_t count) noexcept nogil
ctypedef Status (*get_float)(const void *info, const char *name, float *out) noexcept nogil
ctypedef Status (*get_string)(const void *info, const char *name, char *out, size_t *size) noexcept nogil
ctypedef Status (*get_input)(const void *context, size_t i, void **value) noexcept nogil
ctypedef Status (*get_output)(void *context, size_t i, const int64_t *dimensions, size_t count, void **value) noexcept nogil
ctypedef void (*release)(void *what) noexcept nogil

cdef struct Operator:
    uint32_t version
    void *without_errors        # a form of create that ONNX Runtime doesn't look at in this version
    const char *(*name)(const Operator *) noexcept nogil
    const char *(*provider)(const Operator *) noexcept nogil
    int (*input_type)(const Operator *, size_t) noexcept nogil
    size_t (*inputs)(const Operator *) noexcept nogil
    int (*output_type)(const Operator *, size_t) noexcept nogil
    size_t (*outputs)(const Operator *) noexcept nogil
    void *compute_without_errors
    void (*destroy)(void *) noexcept nogil
    int (*input_kind)(const Operator *, size_t) noexcept nogil
    int (*output_kind)(const Operator *, size_t) noexcept nogil
    int (*input_memory)(const Operator *, size_t) noexcept nogil
    void *variadic[4]
    Status (*create)(const Operator *, Api, const void *, void **) noexcept nogil
    Status (*compute)(void *, void *) noexcept nogil
    Status (*infer_shape)(const Operator *, void *) noexcept nogil
    int (*first_version)(const Operator *) noexcept nogil
    int (*last_version)(const Operator *) noexcept nogil
    void *later[4]
    int type                    # ours

cdef struct Kernel:
    Api api
    int dtype
    int activation
    float eps
    float alpha
    float beta

cdef const char *ACTIVATIONS[8]
ACTIVATIONS[CBN_NONE], ACTIVATIONS[CBN_RELU], ACTIVATIONS[CBN_RELU6], ACTIVATIONS[CBN_CLIP] = "none", "relu", "relu6", "clip"
ACTIVATIONS[CBN_LEAKY_RELU], ACTIVATIONS[CBN_HARD_SWISH], ACTIVATIONS[CBN_SIGMOID], ACTIVATIONS[CBN_SILU] = "leaky_relu", "hard_swish", "sigmoid", "silu"

cdef Operator operators[2]
cdef void *domain = NULL


cdef const char *name(const Operator *op) noexcept nogil:
    return "BatchNormalization"


cdef const char *provider(const Operator *op) noexcept nogil:
    return NULL                 # the CPU


cdef int type_of(const Operator *op, size_t i) noexcept nogil:
    return op.type


cdef size_t five(const Operator *op) noexcept nogil:
    return 5


cdef size_t one(const Operator *op) noexcept nogil:
    return 1


cdef int zero(const Operator *op, size_t i) noexcept nogil:
    return 0                    # an input or output that must be there; ordinary memory


cdef int first_version(const Operator *op) noexcept nogil:
    return 1


cdef int last_version(const Operator *op) noexcept nogil:
    return LAST_VERSION


cdef Status fail(Api api, int code, const char *message) noexcept nogil:
    return (<create_status>api[CREATE_STATUS])(code, message)


cdef float attribute(Api api, const void *info, const char *name, float default) noexcept nogil:
    """A number that a node may leave out."""
    cdef float value = default
    cdef Status status = (<get_float>api[FLOAT_ATTRIBUTE])(info, name, &value)
    if status != NULL:
        (<release>api[RELEASE_STATUS])(status)
        return default
    return value


cdef Status create(const Operator *op, Api api, const void *info, void **kernel) noexcept nogil:
    cdef char activation[16]
    cdef size_t size = sizeof(activation)
    cdef Status status = (<get_string>api[STRING_ATTRIBUTE])(info, "activation", activation, &size)
    cdef int a = CBN_NONE
    if status == NULL or size > sizeof(activation):     # it's there; one that is too long is none that is known
        if status != NULL:
            activation[0] = 0
        while a <= CBN_SILU and strcmp(ACTIVATIONS[a], activation) != 0:
            a += 1
    if status != NULL:
        (<release>api[RELEASE_STATUS])(status)
    if a > CBN_SILU:
        return fail(api, INVALID_ARGUMENT, "activation: expected none, relu, relu6, clip, leaky_relu, hard_swish, sigmoid or silu")
    cdef Kernel *k = <Kernel *>malloc(sizeof(Kernel))
    if k == NULL:
        return fail(api, FAIL, "out of memory")
    k.api, k.activation = api, a
    k.dtype = CBN_FLOAT32 if op.type == FLOAT else CBN_FLOAT64
    k.eps = attribute(api, info, "epsilon", <float>1e-5)
    k.alpha = attribute(api, info, "alpha", 0)
    k.beta = attribute(api, info, "beta", 0)
    kernel[0] = k
    return NULL


cdef void destroy(void *kernel) noexcept nogil:
    free(kernel)


cdef Status tensor(Api api, void *context, size_t i, void **data, int64_t *dimensions, size_t *count) noexcept nogil:
    """The data and the shape of input i."""
    cdef void *value
    cdef void *info
    cdef Status status = (<get_input>api[INPUT])(context, i, &value)
    if status == NULL:
        status = (<get>api[TENSOR_DATA])(value, data)
    if status == NULL:
        status = (<get>api[TYPE_AND_SHAPE])(value, &info)
    if status != NULL:
        return status
    status = (<get>api[COUNT_DIMENSIONS])(info, count)
    if status == NULL and count[0] <= MOST_DIMENSIONS:
        status = (<get_dimensions>api[DIMENSIONS])(info, dimensions, count[0])
    (<release>api[RELEASE_TYPE_AND_SHAPE])(info)
    return status


cdef Status compute(void *kernel, void *context) noexcept nogil:
    cdef Kernel *k = <Kernel *>kernel
    cdef Api api = k.api
    cdef void *data[5]
    cdef void *value
    cdef void *y
    cdef int64_t shape[MOST_DIMENSIONS]
    cdef int64_t length[MOST_DIMENSIONS]
    cdef size_t rank, count, i
    cdef char message[160]
    cdef Status status = tensor(api, context, 0, &data[0], shape, &rank)
    if status != NULL:
        return status
    if not 2 <= rank <= MOST_DIMENSIONS:
        return fail(api, INVALID_ARGUMENT, "X: expected 2 to 32 dimensions")
    for i in range(1, 5):
        status = tensor(api, context, i, &data[i], length, &count)
        if status != NULL:
            return status
        if count != 1 or length[0] != shape[1]:
            snprintf(message, sizeof(message), "input %d: expected shape (%lld,), that of X's channels", <int>i, <long long>shape[1])
            return fail(api, INVALID_ARGUMENT, message)
    status = (<get_output>api[OUTPUT])(context, 0, shape, rank, &value)
    if status == NULL:
        status = (<get>api[TENSOR_DATA])(value, &y)
    if status != NULL:
        return status
    cdef int64_t inner = 1
    for i in range(2, rank):
        inner *= shape[i]
    cdef int result = cbn_inference(k.dtype, shape[0], shape[1], inner, data[0], NULL, y, k.dtype, data[1], data[2], data[3], data[4],
                                    k.eps, k.activation, k.alpha, k.beta, 0)
    if result == CBN_NO_MEMORY:
        return fail(api, FAIL, "out of memory")
    if result == 12:            # the variances' place among the arguments
        return fail(api, INVALID_ARGUMENT, "var: expected non-negative values")
    if result != 0:
        snprintf(message, sizeof(message), "epsilon, alpha or beta: expected a number that suits (argument %d of cbn_inference)", result)
        return fail(api, INVALID_ARGUMENT, message)
    return NULL


cdef public void *RegisterCustomOps(void *options, void **base) noexcept nogil:
    """What ONNX Runtime looks for in a library: adds our domain to a session's options."""
    global domain
    cdef Api api = <Api>(<get_api>base[0])(VERSION)
    if api == NULL:
        return NULL             # an older ONNX Runtime, which then doesn't know the operator
    cdef Status status = NULL
    cdef void *created
    if domain == NULL:
        status = (<create_domain>api[CREATE_DOMAIN])("cbn", &created)
        for i in range(2):
            if status == NULL:
                status = (<add>api[ADD_OPERATOR])(created, &operators[i])
        if status == NULL:
            domain = created
    return status if status != NULL else (<add>api[ADD_DOMAIN])(options, domain)


for i, type in enumerate((FLOAT, DOUBLE)):
    operators[i].version, operators[i].type = VERSION, type
    operators[i].name, operators[i].provider = name, provider
    operators[i].input_type, operators[i].output_type = type_of, type_of
    operators[i].inputs, operators[i].outputs = five, one
    operators[i].input_kind, operators[i].output_kind, operators[i].input_memory = zero, zero, zero
    operators[i].create, operators[i].compute, operators[i].destroy = create, compute, destroy
    operators[i].first_version, operators[i].last_version = first_version, last_version
