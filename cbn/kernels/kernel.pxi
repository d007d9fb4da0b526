# The loops of batch normalization: the only place where elements meet arithmetic. Written once, compiled for each CPU level and type of elements.
#
#   lanes.h         LANES elements as a value                        reduce.pxi           what sums are made of
#   totals.h        sums of lanes in float64                         reduce_runs.pxi      ... of the row layout
#   halves.h        loads and stores of 16 bits                      reduce_columns.pxi   ... of the column layout
#   elements.h      elements of other types, and strides
#   job.pxd         what a kernel is asked                           channels.pxi         parameters, results and coefficients of channels
#   order.pxd       what fixes bits: runs, trees, chunks             moments.pxi          mean and variance from the sums
#   tuning.pxd      what fixes only speed: groups, windows           conclude.pxi         the coefficients of the maps
#   pack.pxi        any array as boxes that lanes can take           apply.pxi            the maps, over runs and columns
#   activation.pxi  each activation                                  walk.pxi             who does what in which order

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange, threadid
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY, fabs, sqrt, sqrtf
from libc.string cimport memcpy, memset

from .job cimport (ARRAYS, BACKWARD, CENTRE, CLIPPED, COEFFICIENTS, COPIED, FLOAT32, FORWARD, FROZEN, GATE_HI, GATE_OFFSET, GATE_SCALE, GRADIENTS,
                   HARD_SWISH, HI, LEAKY, MOMENTS, OF_DY, OF_RESIDUAL, OF_RESIDUAL_GRAD, OF_X, OF_Y, OFFSET, SCALE, SIGMOID, SILU, SLOPE, Job,
                   Place, Places, Table, Vector, View)
from .order cimport LONG_RUN, RUN_SAMPLES, SAMPLES, TREES, ceil_div, chunk_of, Chunk, coefficient_stride, sums_of
from .tuning cimport (ALIGNED_RUN, APPLIED_UNITS, BLOCK, FURTHER, MOST_GROUP, OUTPUT_AHEAD, RECENT, STREAM_AHEAD, WIDE, groups_of)

cdef extern from "lanes.h" nogil:
    ctypedef float real         # what is computed with: float or, of float64 elements, double
    ctypedef unsigned short elem        # as elements are stored
    enum:
        LANES
        TILE_LANES              # units of LANES columns that registers have room for
    ctypedef struct lanes:
        pass
    lanes spread(real)
    lanes add(lanes, lanes)
    lanes sub(lanes, lanes)
    lanes mul(lanes, lanes)
    lanes quotient(lanes, lanes)
    lanes most(lanes, lanes)
    lanes least(lanes, lanes)
    lanes rounded(lanes)
    lanes power_of_2(lanes)
    lanes if_less(lanes, lanes, lanes, lanes)
    lanes if_up_to(lanes, lanes, lanes, lanes)
    lanes load_reals(const real*)
    void store_reals(real*, lanes)
    lanes load(const elem*)
    void store(elem*, lanes)
    void stream(elem*, lanes)
    lanes last(Py_ssize_t, lanes, lanes)
    void store_last(elem*, Py_ssize_t, lanes)
    void stream_first(elem*, Py_ssize_t, lanes)
    void stream_last(elem*, Py_ssize_t, lanes)
    double real_of(elem)
    double two_sum(double, double, double*)
    double two_product(double, double, double*)
    void begin_totals(double*, double*, lanes)
    void add_to_totals(double*, double*, lanes)
    ctypedef struct Twice "twice":
        double number, lost
    Twice sum_of_totals(const double*)
    Twice sum_of_lanes(lanes)
    void stream_fence()
    void fetch(const void*)
    void fetch_to_write(const void*)

cdef extern from "elements.h" nogil:
    void load_elements(int, bint, const char*, Py_ssize_t, Py_ssize_t, real*)
    void store_elements(int, bint, const real*, Py_ssize_t, char*, Py_ssize_t, bint)

cdef extern from "float_mode.h" nogil:
    unsigned long default_float_mode()
    void restore_float_mode(unsigned long mode)

cdef extern from "team.h" nogil:
    double seconds()
    int team_size()
    void team_barrier()

include "pack.pxi"
include "activation.pxi"
include "reduce.pxi"
include "reduce_runs.pxi"
include "reduce_columns.pxi"
include "channels.pxi"
include "conclude.pxi"
include "moments.pxi"
include "apply.pxi"
include "walk.pxi"
