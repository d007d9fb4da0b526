# What a kernel module is asked (Job) and what it hands out (Table): the contract between the functions and the kernels.

cdef enum:                      # types of elements; those that are computed with, Job.dtype and Vector.dtype, are the first two
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16
    INT8
    UINT8
    INT16
    UINT16

cdef enum:                      # Job.reduction
    MOMENTS = 1                 # mean and var of x
    GRADIENTS                   # weight_grad and bias_grad from x, dy, mean and var

cdef enum:                      # Job.apply
    FORWARD = 1                 # y from x, mean and var
    BACKWARD                    # dx where mean and var are functions of x
    FROZEN                      # dx where they are constants

cdef enum:                      # Job.activation: what follows the affine map and the residual, in the same pass
    NO_ACTIVATION
    CLIPPED                     # relu, relu6, clip
    LEAKY
    HARD_SWISH
    SIGMOID
    SILU

cdef enum:                      # arrays of coefficients, one for each column: see conclude.pxi
    HI
    SCALE
    OFFSET
    SLOPE
    GATE_HI                     # those of the forward pass, by which gradients find the activation's input
    GATE_SCALE
    GATE_OFFSET
    CENTRE                      # what moments are shifted by
    COEFFICIENTS

# An array seen as (outer, channels, inner); the inner axis is contiguous. Strides count elements.
ctypedef struct View:
    void* data
    Py_ssize_t outer_stride
    Py_ssize_t channel_stride

cdef enum:
    MAX_AXES = 64               # of a NumPy array
    COPIED = 4096               # elements that are copied at a time of an array that isn't used where it is

cdef enum:                      # the arrays of a job
    OF_X
    OF_RESIDUAL
    OF_DY
    OF_Y
    OF_RESIDUAL_GRAD
    ARRAYS

# An array of which pieces are copied, as its elements are of another type or byte order, misaligned, or in no order that a View can tell.
ctypedef struct Place:
    void* data                  # or NULL: the array is used where it is, or there is none
    int dtype
    bint swapped
    Py_ssize_t channel_stride   # strides count bytes
    Py_ssize_t strides[MAX_AXES]

# The axes of such arrays that make up the outer and the inner axis of a View, the same for each of them.
ctypedef struct Places:
    int outer_axes
    int axes                    # the inner ones come after the outer ones
    Py_ssize_t lengths[MAX_AXES]
    Place of[ARRAYS]

# One value for each channel: float32 or float64, native, aligned. The stride counts elements; data may be NULL where it says so.
ctypedef struct Vector:
    void* data
    Py_ssize_t stride
    int dtype

ctypedef struct Job:
    int dtype                   # that is computed with, FLOAT32 or FLOAT64
    int stored                  # of elements that are used where they are: dtype, or FLOAT16 or BFLOAT16
    int reduction               # or 0
    int apply                   # or 0
    # The problem: N,C,*spatial is (N, C, prod(spatial)), the row layout; *outer,C is (prod(outer), C, 1), the column layout.
    Py_ssize_t outer
    Py_ssize_t channels
    Py_ssize_t inner
    View x
    View dy
    View y                      # what apply writes; may be x or dy itself
    Places* places              # or NULL: all arrays are used where they are
    int bytes_read              # of an element, in all arrays together
    int bytes_written
    int activation
    double slope                # LEAKY: what is below 0 is multiplied by it
    double low                  # CLIPPED: what is below becomes this; NaN: nothing does. Gradients are 0 for v <= low and v >= high
    double high
    bint with_residual          # an array of x's strides (or copied too) is added before the activation
    Py_ssize_t residual         # bytes from an element of x to that of the residual
    bint with_residual_grad     # an array of y's strides (or copied too) gets the gradient behind the activation
    Py_ssize_t residual_grad    # bytes from an element of y to that of it
    double eps
    Vector weight               # or NULL for ones
    Vector bias                 # or NULL for zeros
    Vector mean                 # results of MOMENTS, otherwise given
    Vector var
    Vector running_mean         # updated by MOMENTS unless NULL
    Vector running_var
    double momentum
    bint unbiased               # running_var takes var * m / (m - 1) rather than var
    double count                # values of a channel: x's own or, without a reduction, those of all parts of a batch
    Vector weight_grad          # results of GRADIENTS; NULL where FROZEN is all that is wanted. BACKWARD without a reduction: sum(dy * xhat), given
    Vector bias_grad            # and sum(dy)

    # How a channel is cut for its reductions: a function of the shape alone (order.pxd).
    bint by_columns             # the column layout, otherwise the row layout
    Py_ssize_t length           # elements of a run: inner in the row layout, 1 in the column layout
    Py_ssize_t fold             # pixels seen side by side as one row, in the column layout with few channels; they must be contiguous
    Py_ssize_t rows             # outer // fold
    Py_ssize_t columns          # of a row: channels, or, in the column layout, times copies
    Py_ssize_t tail             # columns of a last row that is not whole
    Py_ssize_t copies           # columns of each channel: fold pixels, or the inner elements of a small plane
    Py_ssize_t copy_step        # from one of them to the next
    Py_ssize_t column_step      # from the first of a channel to the first of the next channel
    Py_ssize_t chunk_rows
    Py_ssize_t chunk_length     # inner indices to a chunk
    Py_ssize_t chunks_along     # chunks along the inner axis
    Py_ssize_t chunks
    # How the work is shared: never changes a result.
    int threads
    Py_ssize_t group            # columns that a reduction takes side by side
    bint by_channel             # threads take groups, rather than all threads together a window
    Py_ssize_t window           # columns to a window
    bint stream                 # write past the caches; y is none of what is read then
    bint far                    # the second-level caches don't hold what is read
    bint beyond                 # nor is it likely that the last-level cache holds much of it
    bint fetches                # within its caches the CPU gains by being told what is needed soon
    Py_ssize_t piece            # inner indices to a piece of the apply pass
    Py_ssize_t pieces
    double* serial_seconds      # or NULL: what the work would take one thread, by what the calling thread's share of it took, is added to it

    # Working memory, given by the caller.
    double* partials            # (chunks, sums_of, columns)
    void* coefficients          # (COEFFICIENTS, coefficient_stride) of the type computed with; without a reduction, or by_channel, for each thread
    void* copies_at             # (ARRAYS, COPIED) of it for each thread, where boxes are copied

ctypedef struct Table:
    void (*run)(const Job*) noexcept nogil
