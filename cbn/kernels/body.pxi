# The loops of batch normalization: the only place where elements meet arithmetic. Written once, compiled for each CPU level.
#
# A channel's elements are taken as a matrix of rows: in the column layout (inner == 1) a row holds neighbouring channels, in the row layout
# (inner > 1) it holds LANES neighbouring elements of one channel; the next row is what follows these, or, in chunks of 8 images or more of planes of
# LANES to SHORT_PLANE elements, the same elements of the next image. Either way the loops below run down the rows with one independent accumulator a column, which is what
# makes them vectorize, and what makes the results the same bits at every vector width.
#
# The order of every sum is fixed by the shape: 8 rows (at the end 4, 2, 1) are added as a tree, up to SEQUENCE of such trees one after another, and
# what comes of that in float64. More in a row, and nearly equal terms, which all round the same way, would cost digits. Of float64 elements, what the
# latter additions round off is summed, too, and added at the end.

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, threadid
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport fabs, sqrt, sqrtf
from libc.string cimport memcpy, memset

from .plan cimport AROUND, LANES, TILE, WIDEST, ceil_div, coefficient_stride, group_begin, groups_of
from .table cimport (ARRAYS, BACKWARD, BFLOAT16, COEFFICIENTS, COPIED, FLOAT16, FLOAT32, FORWARD, FROZEN, GATES, GRADIENTS, INT8, INT16, MOMENTS, OF_DY,
                     OF_RESIDUAL, OF_RESIDUAL_GRAD, OF_X, OF_Y, PIECEWISE, UINT8, UINT16, Job, Place, Places, Table, Vector, View)

cdef extern from "stream.h" nogil:
    void stream_store(void* destination, const void* source, size_t bytes)
    void stream_fence()
    void stream_part(void* destination, const void* source, size_t bytes)
    void prefetch_row(const void* p, size_t width)
    void prefetch_output(const void* p, size_t width)
    void prefetch_input(const void* p, size_t width)
    void prefetch_rows(const void* p, size_t stride, size_t width, int near)

cdef extern from "lanes.h" nogil:
    double sum_of_floats(const float* p)
    double sum_of_doubles(const double* p)

cdef extern from "float_mode.h" nogil:
    unsigned long default_float_mode()
    void restore_float_mode(unsigned long mode)

cdef extern from "team.h" nogil:
    double seconds()
    int team_size()
    void team_barrier()

ctypedef fused real:            # of the elements
    float
    double

ctypedef fused wide:            # of the accumulators: as the elements, or wider
    float
    double

cdef enum:
    SEQUENCE = 8                # additions to an accumulator before it is added to a float64 one
    FLUSH = 8 * SEQUENCE        # the rows of that many trees
    ALIGN_LENGTH = 96           # elements of a segment that are worth aligning
    STREAM_LENGTH = 512         # elements of a segment that are worth writing past the caches
    GATE_OFFSET = COEFFICIENTS + 2      # of the arrays of coefficients, the gates' offset
    CONCLUDED = 128             # channels that are concluded side by side
    GATED = 2048                # elements that are taken back through an activation at a time
    LINE = 32                   # elements of 16 bits in a cache line
    APPLIED = 4096              # elements of copied arrays that the apply pass takes at a time, at most COPIED
    BLOCK = 4096                # elements of a block of pixels that the apply pass walks tile by tile
    STREAMED = 512              # the same where it writes past the caches: rows one after the other
    REGISTERED = 8              # rows of a tile that are worth keeping its coefficients in registers
    SHORT_PLANE = 1024          # the most elements of a plane that a reduction takes together with those of other images,
    COPIED_PLANE = 128          # and of each of 8 that are copied at a time, fewer than LANES more at the end: together at most COPIED
    SMALL = 2048                # columns that the apply pass makes of small planes at a time
    RECENT = 65536              # elements of rows, the last ones first, that the apply pass takes at a time after a reduction
    OUTPUT_AHEAD = 512          # elements from what is written to what is fetched to be written


# What a pass takes, as tags: the functions that take one stand alone, one for each of them.
ctypedef struct Alone:          # x
    char _
ctypedef struct Pair:           # x with dy
    char _
ctypedef struct GatedPair:      # x with dy that is first taken back through an activation of which the gradient is 0 or 1
    char _
ctypedef struct AddedPair:      # the same where the activation's input has a residual
    char _

ctypedef struct Clipped:        # x, and what comes of it is clipped at either end or none
    char _
ctypedef struct AddClipped:     # after adding the residual
    char _
ctypedef struct Finished:       # whatever the job says
    char _

ctypedef fused taken:           # by a reduction
    Alone
    Pair
    GatedPair
    AddedPair

ctypedef fused applied:         # by an apply pass
    Alone
    Clipped
    AddClipped
    Finished
    Pair
    GatedPair
    AddedPair

ctypedef struct Native:         # elements of the type that is computed with
    char _
ctypedef struct Half:           # float16
    char _
ctypedef struct Brain:          # bfloat16
    char _

ctypedef fused stored:
    Native
    Half
    Brain

ctypedef struct Cached:         # the output, in the ordinary way
    char _
ctypedef struct Streamed:       # past the caches
    char _

ctypedef fused written:
    Cached
    Streamed

cdef enum:                      # the same as `paired`, a constant of inlined loops
    X_ALONE
    PAIRED                      # x with dy
    GATED_PAIR                  # x with dy that is first taken back through an activation of which the gradient is 0 or 1
    ADDED_PAIR                  # the same where the activation's input has a residual

cdef enum:                      # the type of elements, a constant of inlined loops: FLOAT16, BFLOAT16, or
    NATIVE = -1                 # that which is computed with

cdef enum:                      # `finish`, a constant of inlined loops: what follows the affine map
    NOTHING
    CLIP                        # at either end or none
    ADD_CLIP                    # after adding the residual
    ANYTHING                    # whatever the job says

cdef enum:                      # phases of the work
    CHANNELS                    # all of it, a group of channels after the other
    BEFORE_APPLY                # PREPARE to CONCLUDE, of channels that are reduced in one piece
    PREPARE                     # for gradients through an activation
    REDUCE
    CONCLUDE
    APPLY
    ALONE                       # CONCLUDE and APPLY


cdef inline int paired_of(applied* how) noexcept nogil:
    if applied is Pair:
        return PAIRED
    elif applied is GatedPair:
        return GATED_PAIR
    elif applied is AddedPair:
        return ADDED_PAIR
    else:
        return X_ALONE


cdef inline int type_of(stored* kind) noexcept nogil:
    if stored is Half:
        return FLOAT16
    elif stored is Brain:
        return BFLOAT16
    else:
        return NATIVE


cdef inline int finish_tag(applied* how) noexcept nogil:
    if applied is Clipped:
        return CLIP
    elif applied is AddClipped:
        return ADD_CLIP
    elif applied is Finished:
        return ANYTHING
    else:
        return NOTHING


cdef inline bint finite(double a) noexcept nogil:
    return fabs(a) <= DBL_MAX


# ---- what there is one of for each channel ---------------------------------------------------------------------------------------------

cdef inline void read(const Vector* vector, Py_ssize_t c0, Py_ssize_t n, double otherwise, double* values) noexcept nogil:
    """Values c0 to c0 + n of a vector, or `otherwise` where there is none."""
    cdef Py_ssize_t j, stride = vector.stride
    cdef const float* singles = <const float*>vector.data
    cdef const double* doubles = <const double*>vector.data
    if vector.data == NULL:
        for j in range(n):
            values[j] = otherwise
    elif vector.dtype == FLOAT32:
        for j in range(n):
            values[j] = singles[(c0 + j) * stride]
    else:
        for j in range(n):
            values[j] = doubles[(c0 + j) * stride]


cdef inline void write(const Vector* vector, Py_ssize_t c0, Py_ssize_t n, const double* values) noexcept nogil:
    cdef Py_ssize_t j, stride = vector.stride
    cdef float* singles = <float*>vector.data
    cdef double* doubles = <double*>vector.data
    if vector.dtype == FLOAT32:
        for j in range(n):
            singles[(c0 + j) * stride] = <float>values[j]
    else:
        for j in range(n):
            doubles[(c0 + j) * stride] = values[j]


include "copies.pxi"


# ---- residual and activation -----------------------------------------------------------------------------------------------------------

cdef inline const real* residual_at(const Job* job, const real* x) noexcept nogil:
    return <const real*>(<const char*>x + job.residual)


cdef inline int finish_of(const Job* job) noexcept nogil:
    """What follows the affine map in the apply pass."""
    if not job.fusion or job.apply != FORWARD:
        return NOTHING
    if job.fusion == PIECEWISE and not job.leaky:
        return ADD_CLIP if job.with_residual else CLIP
    return ANYTHING


cdef inline void finish_row(const Job* job, const real* x, real* row, Py_ssize_t width, int finish) noexcept nogil:
    """Add the residual to a row of the affine map of x, and apply the activation. NaN stays NaN."""
    cdef const real* r = residual_at(job, x)
    cdef real low = <real>job.low, high = <real>job.high, slope = <real>job.slope, t
    cdef Py_ssize_t j
    if finish == ADD_CLIP or finish == ANYTHING and job.with_residual:
        for j in range(width):
            row[j] = row[j] + r[j]
    if finish != ANYTHING or job.fusion == PIECEWISE:
        for j in range(width):
            t = row[j] * slope if finish == ANYTHING and job.leaky else low
            t = t if row[j] < low else row[j]
            row[j] = high if t > high else t
    else:
        for j in range(width):
            t = row[j] + 3
            t = 0 if t < 0 else t
            t = 6 if t > 6 else t
            row[j] = row[j] * t / <real>6


cdef inline void gate_strip(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* g, Py_ssize_t g_stride,
                            Py_ssize_t rows, Py_ssize_t width, const real* hi, const real* scale, const real* offset,
                            bint with_residual, bint piecewise, bint leaky) noexcept nogil:
    """`rows` rows of `width` <= LANES columns of gate_rows."""
    cdef Py_ssize_t to_residual = residual_at(job, x) - x if with_residual else 0
    cdef real low = <real>job.low, high = <real>job.high, slope = <real>job.slope, v, d, t
    cdef real out[LANES]
    cdef Py_ssize_t row, j
    for row in range(rows):
        for j in range(width):
            v = (x[j] - hi[j]) * scale[j] + offset[j]
            d = dy[j]
            if with_residual:
                v = v + x[j + to_residual]
            if piecewise:
                t = d * slope if leaky else 0
                t = t if v <= low else d
                out[j] = 0 if v >= high else t
            else:
                t = d * (v / <real>3 + <real>0.5)
                t = 0 if v <= -3 else t
                out[j] = d if v >= 3 else t
        for j in range(width):
            g[j] = out[j]
        x += x_stride
        dy += dy_stride
        g += g_stride


cdef inline void gate_columns(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* g, Py_ssize_t g_stride,
                              Py_ssize_t rows, Py_ssize_t width, const real* gate, Py_ssize_t step) noexcept nogil:
    """gate_rows over `width` <= LANES columns, whose coefficients are `step` apart: 1, or 0 for those of one channel."""
    cdef real hi[LANES]
    cdef real scale[LANES]
    cdef real offset[LANES]
    cdef Py_ssize_t j, stride = coefficient_stride(job.columns)
    for j in range(width):
        hi[j] = gate[j * step]
        scale[j] = gate[j * step + stride]
        offset[j] = gate[j * step + 2 * stride]
    if job.fusion != PIECEWISE:
        gate_strip(job, x, x_stride, dy, dy_stride, g, g_stride, rows, width, hi, scale, offset, job.with_residual, False, False)
    elif job.leaky:
        gate_strip(job, x, x_stride, dy, dy_stride, g, g_stride, rows, width, hi, scale, offset, job.with_residual, True, True)
    elif job.with_residual:
        gate_strip(job, x, x_stride, dy, dy_stride, g, g_stride, rows, width, hi, scale, offset, True, True, False)
    else:
        gate_strip(job, x, x_stride, dy, dy_stride, g, g_stride, rows, width, hi, scale, offset, False, True, False)


cdef void gate_rows(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* g, Py_ssize_t g_stride,
                    Py_ssize_t rows, Py_ssize_t width, const real* gate) noexcept nogil:
    """g = dy taken back through the activation, whose input is computed anew from x. g is neither x nor dy.

    In the row layout, rows are taken as rows of LANES elements. Of a width that is no multiple of LANES, the last LANES columns overlap those before.
    gate : forward coefficients of the columns (row layout: of the one channel): hi, scale and offset, coefficient_stride apart.
    """
    cdef Py_ssize_t c = 0, row, rest = width - LANES
    if width < LANES:
        gate_columns(job, x, x_stride, dy, dy_stride, g, g_stride, rows, width, gate, job.inner == 1)
    elif job.inner > 1:
        for row in range(rows):
            gate_columns(job, x, LANES, dy, LANES, g, LANES, width // LANES, LANES, gate, 0)
            if width % LANES:
                gate_columns(job, x + rest, 0, dy + rest, 0, g + rest, 0, 1, LANES, gate, 0)
            x += x_stride
            dy += dy_stride
            g += g_stride
    else:
        while c < width:
            c = min(c, width - LANES)
            gate_columns(job, x + c, x_stride, dy + c, dy_stride, g + c, g_stride, rows, LANES, gate + c, 1)
            c += LANES


cdef inline const real* gates(const Job* job, Py_ssize_t c, const real* kind) noexcept nogil:
    """Those of columns from c on."""
    return <const real*>job.coefficients + COEFFICIENTS * coefficient_stride(job.columns) + c


include "narrow.pxi"


# ---- reductions ------------------------------------------------------------------------------------------------------------------------

ctypedef struct Chunk:
    # Outer indices [n0, n1) x inner indices [i0, i1) of a channel.
    Py_ssize_t n0, n1, i0, i1


cdef inline Chunk chunk_of(const Job* job, Py_ssize_t k) noexcept nogil:
    cdef Chunk chunk
    cdef Py_ssize_t n = k, i = 0
    if job.chunk_inner < job.inner:
        n = k // job.inner_chunks
        i = k % job.inner_chunks
    chunk.n0 = n * job.chunk_outer
    chunk.n1 = min(chunk.n0 + job.chunk_outer, job.rows)
    chunk.i0 = i * job.chunk_inner
    chunk.i1 = min(chunk.i0 + job.chunk_inner, job.inner)
    return chunk


cdef inline wide tree(Py_ssize_t n, wide a0, wide a1, wide a2, wide a3, wide a4, wide a5, wide a6, wide a7) noexcept nogil:
    """The sum of the first n = 1, 2, 4 or 8."""
    if n == 1:
        return a0
    if n == 2:
        return a0 + a1
    if n == 4:
        return (a0 + a1) + (a2 + a3)
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))


cdef inline real gated(real dy, real v, real low, real high) noexcept nogil:
    """dy behind an activation whose input is v. NaN lets it pass."""
    dy = 0 if v <= low else dy
    return 0 if v >= high else dy


cdef inline real activated(real b, real scale, real offset, real residual, int paired) noexcept nogil:
    """The input of that activation, with b = x - hi."""
    cdef real v = b * scale + offset
    return v + residual if paired == ADDED_PAIR else v


cdef inline bint gate_in_registers(const Job* job) noexcept nogil:
    return job.fusion == PIECEWISE and not job.leaky and (job.with_residual or not job.with_residual_grad)


ctypedef struct Source:
    # Rows of what a reduction takes: x, dy, and the residual, with x's steps. Steps count bytes.
    const char* x
    const char* dy
    const char* residual
    Py_ssize_t x_step, dy_step              # from row to row
    Py_ssize_t x_channel, dy_channel        # from channel to channel, in the row layout


cdef inline Source narrow_at(const Job* job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, int paired) noexcept nogil:
    """Elements of 16 bits where they are, from (n, c, i) on."""
    cdef const Place* x = &job.places.of[OF_X]
    cdef const Place* dy = &job.places.of[OF_DY]
    cdef Source at
    at.x, at.x_step, at.x_channel = place_of(job, x, n, c, i), job.fold * x.strides[0], x.channel_stride
    at.dy, at.residual, at.dy_step, at.dy_channel = NULL, NULL, 0, 0
    if paired:
        at.dy, at.dy_step, at.dy_channel = place_of(job, dy, n, c, i), job.fold * dy.strides[0], dy.channel_stride
    if paired == ADDED_PAIR:
        at.residual = place_of(job, &job.places.of[OF_RESIDUAL], n, c, i)
    return at


cdef inline Source moved(Source at, Py_ssize_t x_bytes, Py_ssize_t dy_bytes, int paired) noexcept nogil:
    at.x += x_bytes
    if paired:
        at.dy += dy_bytes
    if paired == ADDED_PAIR:
        at.residual += x_bytes
    return at


cdef inline wide kept(wide a, Py_ssize_t j, Py_ssize_t skipped) noexcept nogil:
    """Of what was loaded for all lanes: where only some are, the others hold what a register held before, and subnormal numbers take 100 cycles."""
    return a if j >= skipped else 0


cdef inline void add_rows(Py_ssize_t n, Source at, Py_ssize_t width, const wide* shift, const wide* gate, wide low, wide high, wide* s, wide* q,
                          Py_ssize_t skipped, int paired, const real* kind) noexcept nogil:
    """With b = x - shift, and a = dy if paired else b: s += sum of a, q += sum of a * b, over n = 1, 2, 4 or 8 rows of each column.

    gate : behind an activation, scale and offset of the columns, TILE apart; their hi is the shift.
    skipped : the first columns, of which a and b count as 0.
    """
    cdef Py_ssize_t j, x_stride = at.x_step // <Py_ssize_t>sizeof(real), dy_stride = at.dy_step // <Py_ssize_t>sizeof(real)
    cdef const real* x = <const real*>at.x
    cdef const real* dy = <const real*>at.dy
    cdef const real* r = <const real*>at.residual
    cdef wide r0, r1, r2, r3, r4, r5, r6, r7
    cdef wide c, k, o, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7
    a1 = a2 = a3 = a4 = a5 = a6 = a7 = b1 = b2 = b3 = b4 = b5 = b6 = b7 = r0 = r1 = r2 = r3 = r4 = r5 = r6 = r7 = 0
    for j in range(width):
        c = shift[j]
        b0 = <wide>x[j] - c
        if n > 1:
            b1 = <wide>x[j + x_stride] - c
        if n > 2:
            b2 = <wide>x[j + 2 * x_stride] - c
            b3 = <wide>x[j + 3 * x_stride] - c
        if n > 4:
            b4 = <wide>x[j + 4 * x_stride] - c
            b5 = <wide>x[j + 5 * x_stride] - c
            b6 = <wide>x[j + 6 * x_stride] - c
            b7 = <wide>x[j + 7 * x_stride] - c
        if paired:
            a0 = <wide>dy[j]
            if n > 1:
                a1 = <wide>dy[j + dy_stride]
            if n > 2:
                a2 = <wide>dy[j + 2 * dy_stride]
                a3 = <wide>dy[j + 3 * dy_stride]
            if n > 4:
                a4 = <wide>dy[j + 4 * dy_stride]
                a5 = <wide>dy[j + 5 * dy_stride]
                a6 = <wide>dy[j + 6 * dy_stride]
                a7 = <wide>dy[j + 7 * dy_stride]
            if paired == ADDED_PAIR:
                r0 = <wide>r[j]
                if n > 1:
                    r1 = <wide>r[j + x_stride]
                if n > 2:
                    r2 = <wide>r[j + 2 * x_stride]
                    r3 = <wide>r[j + 3 * x_stride]
                if n > 4:
                    r4 = <wide>r[j + 4 * x_stride]
                    r5 = <wide>r[j + 5 * x_stride]
                    r6 = <wide>r[j + 6 * x_stride]
                    r7 = <wide>r[j + 7 * x_stride]
            if paired != PAIRED:
                k, o = gate[j], gate[TILE + j]
                a0 = gated(a0, activated(b0, k, o, r0, paired), low, high)
                a1 = gated(a1, activated(b1, k, o, r1, paired), low, high)
                a2 = gated(a2, activated(b2, k, o, r2, paired), low, high)
                a3 = gated(a3, activated(b3, k, o, r3, paired), low, high)
                a4 = gated(a4, activated(b4, k, o, r4, paired), low, high)
                a5 = gated(a5, activated(b5, k, o, r5, paired), low, high)
                a6 = gated(a6, activated(b6, k, o, r6, paired), low, high)
                a7 = gated(a7, activated(b7, k, o, r7, paired), low, high)
            if skipped:
                a0, a1, a2, a3 = kept(a0, j, skipped), kept(a1, j, skipped), kept(a2, j, skipped), kept(a3, j, skipped)
                a4, a5, a6, a7 = kept(a4, j, skipped), kept(a5, j, skipped), kept(a6, j, skipped), kept(a7, j, skipped)
        if skipped:
            b0, b1, b2, b3 = kept(b0, j, skipped), kept(b1, j, skipped), kept(b2, j, skipped), kept(b3, j, skipped)
            b4, b5, b6, b7 = kept(b4, j, skipped), kept(b5, j, skipped), kept(b6, j, skipped), kept(b7, j, skipped)
        if not paired:
            a0, a1, a2, a3, a4, a5, a6, a7 = b0, b1, b2, b3, b4, b5, b6, b7
        s[j] += tree(n, a0, a1, a2, a3, a4, a5, a6, a7)
        q[j] += tree(n, a0 * b0, a1 * b1, a2 * b2, a3 * b3, a4 * b4, a5 * b5, a6 * b6, a7 * b7)


cdef inline void widen(Py_ssize_t n, const char* p, Py_ssize_t step, Py_ssize_t width, bint brain, real* to) noexcept nogil:
    """n rows of `width` elements of 16 bits, a multiple of LANES."""
    cdef Py_ssize_t row, j
    for row in range(n):
        for j in range(width // LANES):
            load_16(brain, p + row * step + 2 * LANES * j, <float*>to + row * width + LANES * j)


cdef inline void add_rows_of(Py_ssize_t n, Source at, Py_ssize_t width, const wide* shift, const wide* gate, wide low, wide high, wide* s, wide* q,
                             Py_ssize_t skipped, int paired, int dtype, const real* kind) noexcept nogil:
    """As add_rows, of elements of any type."""
    cdef real x_rows[8 * TILE]
    cdef real dy_rows[8 * TILE]
    cdef real residual_rows[8 * TILE]
    cdef Source rows
    if dtype == NATIVE:
        add_rows(n, at, width, shift, gate, low, high, s, q, skipped, paired, kind)
        return
    widen(n, at.x, at.x_step, width, dtype == BFLOAT16, x_rows)
    if paired:
        widen(n, at.dy, at.dy_step, width, dtype == BFLOAT16, dy_rows)
    if paired == ADDED_PAIR:
        widen(n, at.residual, at.x_step, width, dtype == BFLOAT16, residual_rows)
    rows.x, rows.dy, rows.residual = <const char*>x_rows, <const char*>dy_rows, <const char*>residual_rows
    rows.x_step = rows.dy_step = width * sizeof(real)
    add_rows(n, rows, width, shift, gate, low, high, s, q, skipped, paired, kind)


cdef inline void accumulate(Source at, Py_ssize_t rows, Py_ssize_t width, const wide* shift, const wide* gate, wide low, wide high, wide* s, wide* q,
                            bint far, int paired, int dtype, const real* kind) noexcept nogil:
    """As add_rows, over any number of rows. far : fetch those that follow ahead."""
    cdef Py_ssize_t row, bytes = width * (<Py_ssize_t>sizeof(real) if dtype == NATIVE else 2)
    for row in range(rows // 8):
        if far:
            prefetch_rows(at.x, at.x_step, bytes, paired)
            if paired:
                prefetch_rows(at.dy, at.dy_step, bytes, paired)
            if paired == ADDED_PAIR:
                prefetch_rows(at.residual, at.x_step, bytes, paired)
        add_rows_of(8, at, width, shift, gate, low, high, s, q, 0, paired, dtype, kind)
        at = moved(at, 8 * at.x_step, 8 * at.dy_step, paired)
    if rows & 4:
        add_rows_of(4, at, width, shift, gate, low, high, s, q, 0, paired, dtype, kind)
        at = moved(at, 4 * at.x_step, 4 * at.dy_step, paired)
    if rows & 2:
        add_rows_of(2, at, width, shift, gate, low, high, s, q, 0, paired, dtype, kind)
        at = moved(at, 2 * at.x_step, 2 * at.dy_step, paired)
    if rows & 1:
        add_rows_of(1, at, width, shift, gate, low, high, s, q, 0, paired, dtype, kind)


cdef inline double rounded_off(double a, double b) noexcept nogil:
    """What a + b loses by rounding: Knuth 1969, The Art of Computer Programming 2, 4.2.2."""
    cdef double total = a + b, b_in_it = total - a
    return (a - (total - b_in_it)) + (b - b_in_it)


cdef inline double restored(double total, double lost) noexcept nogil:
    return total + lost if finite(lost) else total


cdef inline void begin_totals(double* total_s, double* total_q, Py_ssize_t width, Py_ssize_t to_lost, const wide* kind) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        total_s[j] = total_q[j] = 0
        if wide is double:
            total_s[to_lost + j] = total_q[to_lost + j] = 0


cdef inline void flush(wide* s, wide* q, Py_ssize_t width, double* total_s, double* total_q, Py_ssize_t to_lost) noexcept nogil:
    """Add sums to the totals, and begin anew. What float64 sums lose by it is summed up `to_lost` elements after the totals."""
    cdef Py_ssize_t j
    cdef double a, b, c, d
    for j in range(width):
        # All is read before anything is written: where arrays lie multiples of 4 KB apart, reading one waits for what was written to another.
        a, b, c, d = total_s[j], total_q[j], s[j], q[j]
        if wide is double:
            total_s[to_lost + j] += rounded_off(a, c)
            total_q[to_lost + j] += rounded_off(b, d)
        total_s[j] = a + c
        total_q[j] = b + d
        s[j] = 0
        q[j] = 0


cdef void tile_sums(Source at, Py_ssize_t rows, Py_ssize_t width, const wide* shift, const real* gate, Py_ssize_t gate_stride, wide low, wide high,
                    bint far, wide* sums, wide* products, taken* how, stored* elements) noexcept nogil:
    """Add the sums of `width` <= TILE columns over `rows` rows. Of elements of 16 bits, TILE or LANES columns."""
    cdef int paired = paired_of(how), dtype = type_of(elements)
    cdef wide c[TILE]
    cdef wide s[TILE]
    cdef wide q[TILE]
    cdef wide of_gate[2 * TILE]
    cdef Py_ssize_t j
    for j in range(width):
        c[j] = shift[j]
        s[j] = sums[j]
        q[j] = products[j]
        if paired > PAIRED:
            of_gate[j], of_gate[TILE + j] = gate[j + gate_stride], gate[j + 2 * gate_stride]
    # The usual widths are constants of the inlined loops.
    if width == TILE:
        accumulate(at, rows, TILE, c, of_gate, low, high, s, q, far, paired, dtype, gate)
        for j in range(TILE):
            sums[j], products[j] = s[j], q[j]
    elif width == LANES:
        accumulate(at, rows, LANES, c, of_gate, low, high, s, q, far, paired, dtype, gate)
        for j in range(LANES):
            sums[j], products[j] = s[j], q[j]
    elif dtype == NATIVE:
        accumulate(at, rows, width, c, of_gate, low, high, s, q, far, paired, dtype, gate)
        for j in range(width):
            sums[j], products[j] = s[j], q[j]


cdef inline void column_sums(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const wide* shift, const real* gate,
                             double* total_s, double* total_q, taken* how) noexcept nogil:
    """Sums of `width` columns: tile by tile over some rows at a time, so that neighbouring tiles are read soon after one another."""
    cdef int narrow = narrow_source(job, paired_of(how))
    cdef wide low = <wide>job.low, high = <wide>job.high
    cdef Py_ssize_t c, first, j, w, n = chunk.n0, rows, done = 0, stride = coefficient_stride(job.columns)
    # In the order of memory, where it is memory that takes the time.
    cdef Py_ssize_t some = 8 if job.far and width > TILE and (job.places == NULL or narrow) else FLUSH
    cdef Source at
    cdef real g[FLUSH * TILE]
    cdef wide s[WIDEST]
    cdef wide q[WIDEST]
    cdef wide part_s[LANES]
    cdef wide part_q[LANES]
    for j in range(width):
        s[j] = q[j] = 0
    while n < chunk.n1:
        rows = min(some, chunk.n1 - n)
        c = 0
        while c < width:
            w = TILE if width - c >= TILE else min(LANES, width - c)
            if c0 + c == 0 and job.head:
                w = min(job.head, width)
            if w < LANES <= width and not narrow:
                # Full width, of which a part counts.
                first = min(c, width - LANES)
                memcpy(part_s, s + first, sizeof(part_s))
                memcpy(part_q, q + first, sizeof(part_q))
                at = source(job, n, c0 + first, 0, rows, LANES, 1, gate + first, g, how)
                tile_sums(at, rows, LANES, shift + first, gate + first, stride, low, high, job.far, part_s, part_q, how, <Native*>NULL)
                memcpy(s + c, part_s + (c - first), w * sizeof(wide))
                memcpy(q + c, part_q + (c - first), w * sizeof(wide))
            elif not narrow or w < LANES:
                at = source(job, n, c0 + c, 0, rows, w, 1, gate + c, g, how)
                tile_sums(at, rows, w, shift + c, gate + c, stride, low, high, job.far, s + c, q + c, how, <Native*>NULL)
            elif real is float:
                at = narrow_at(job, n, c0 + c, 0, paired_of(how))
                if narrow == FLOAT16:
                    tile_sums(at, rows, w, shift + c, gate + c, stride, low, high, job.far, s + c, q + c, how, <Half*>NULL)
                else:
                    tile_sums(at, rows, w, shift + c, gate + c, stride, low, high, job.far, s + c, q + c, how, <Brain*>NULL)
            c += w
        n += rows
        done += rows
        if done == FLUSH or n == chunk.n1:
            flush(s, q, width, total_s, total_q, WIDEST)
            done = 0


cdef inline Source source(const Job* job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t length,
                          const real* gate, real* g, taken* how) noexcept nogil:
    """Where a box of the arrays can be read; of dy behind an activation that isn't taken in registers, in g."""
    cdef Py_ssize_t x_stride, dy_stride = 0
    cdef const real* x = readable(job, OF_X, &job.x, n, c, i, rows, width, length, &x_stride, gate)
    cdef const real* dy = NULL
    cdef Source at
    at.residual = NULL
    if taken is not Alone:
        dy = readable(job, OF_DY, &job.dy, n, c, i, rows, width, length, &dy_stride, gate)
    if taken is Pair and job.fusion:
        gate_rows(job, x, x_stride, dy, dy_stride, g, width * length, rows, width * length, gate)
        dy = g
        dy_stride = width * length
    if taken is AddedPair:
        at.residual = <const char*>residual_at(job, x)
    at.x, at.dy = <const char*>x, <const char*>dy
    at.x_step, at.dy_step = x_stride * sizeof(real), dy_stride * sizeof(real)
    at.x_channel, at.dy_channel = job.x.channel_stride * sizeof(real), job.dy.channel_stride * sizeof(real)
    return at


cdef inline void end_segment(Source at, int rows, Py_ssize_t rest, const wide* shift, const wide* gate, wide low, wide high, const wide* lanes_s,
                             const wide* lanes_q, wide* s, wide* q, int paired, int dtype, const real* kind) noexcept nogil:
    """Sums of the last `rows` < 8 rows of LANES elements, a constant, and of `rest` < LANES more, with lanes_s and lanes_q into s and q."""
    cdef wide of_s[LANES]
    cdef wide of_q[LANES]
    cdef Py_ssize_t j, to_end = at.x_step // LANES * (rows * LANES + rest - LANES)
    for j in range(LANES):
        of_s[j], of_q[j] = lanes_s[j], lanes_q[j]
    accumulate(at, rows, LANES, shift, gate, low, high, of_s, of_q, False, paired, dtype, kind)
    # The last LANES elements again, those done before left out: full width, no tail loop.
    add_rows_of(1, moved(at, to_end, to_end, paired), LANES, shift, gate, low, high, of_s, of_q, LANES - rest, paired, dtype, kind)
    for j in range(LANES):
        s[j], q[j] = of_s[j], of_q[j]


cdef inline void add_segment(Source at, Py_ssize_t length, const wide* shift, const wide* gate, wide low, wide high, bint far, wide* s, wide* q,
                             int paired, int dtype, const real* kind) noexcept nogil:
    """Add LANES <= `length` <= FLUSH * LANES elements of a channel: element i to lane i % LANES, the last length % LANES ones to the last lanes."""
    cdef wide lanes_s[LANES]
    cdef wide lanes_q[LANES]
    cdef Py_ssize_t j, whole = length // (8 * LANES) * 8, rows = length // LANES - whole, rest = length % LANES
    cdef Py_ssize_t step = LANES * (<Py_ssize_t>sizeof(real) if dtype == NATIVE else 2)
    for j in range(LANES):
        lanes_s[j], lanes_q[j] = s[j], q[j]
    at.x_step = at.dy_step = step
    if whole:
        accumulate(at, whole, LANES, shift, gate, low, high, lanes_s, lanes_q, far, paired, dtype, kind)
    at = moved(at, whole * step, whole * step, paired)
    # Constants of the inlined loops: what is left keeps the sums in registers.
    if rows == 0:
        end_segment(at, 0, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)
    elif rows == 1:
        end_segment(at, 1, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)
    elif rows == 2:
        end_segment(at, 2, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)
    elif rows == 3:
        end_segment(at, 3, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)
    elif rows == 4:
        end_segment(at, 4, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)
    elif rows == 5:
        end_segment(at, 5, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)
    elif rows == 6:
        end_segment(at, 6, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)
    else:
        end_segment(at, 7, rest, shift, gate, low, high, lanes_s, lanes_q, s, q, paired, dtype, kind)


cdef inline void of_lanes(const wide* shift, const real* gate, Py_ssize_t gate_stride, wide* shifts, wide* of_gate, int paired) noexcept nogil:
    """The shift of a channel, and what its gate takes, for each lane."""
    cdef Py_ssize_t j
    for j in range(LANES):
        shifts[j] = shift[0]
        if paired > PAIRED:
            of_gate[j], of_gate[TILE + j] = gate[gate_stride], gate[2 * gate_stride]


cdef void segment_sums(Source at, Py_ssize_t length, Py_ssize_t width, const wide* shift, const real* gate, Py_ssize_t gate_stride, wide low, wide high,
                       bint far, wide* s, wide* q, taken* how, stored* elements) noexcept nogil:
    """Add a segment of each of `width` channels to the channel's LANES sums."""
    cdef int paired = paired_of(how), dtype = type_of(elements)
    cdef wide shifts[LANES]
    cdef wide of_gate[2 * TILE]
    cdef Py_ssize_t c
    for c in range(width):
        of_lanes(shift + c, gate + c, gate_stride, shifts, of_gate, paired)
        add_segment(at, length, shifts, of_gate, low, high, far, s, q, paired, dtype, gate)
        s += LANES
        q += LANES
        at = moved(at, at.x_channel, at.dy_channel, paired)


cdef void long_sums(Source at, Py_ssize_t planes, Py_ssize_t length, Py_ssize_t width, const wide* shift, const real* gate, Py_ssize_t gate_stride,
                    wide low, wide high, bint far, double* total_s, double* total_q, taken* how, stored* elements) noexcept nogil:
    """Sums over `planes` planes of `length` >= FLUSH * LANES elements of each of `width` channels, into the totals, in the order of row_sums: there, too,
    each segment is added in float64 by itself. What is left after whole segments is none or at least LANES elements."""
    cdef int paired = paired_of(how), dtype = type_of(elements)
    cdef wide shifts[LANES]
    cdef wide of_gate[2 * TILE]
    cdef wide s[LANES]
    cdef wide q[LANES]
    cdef double lanes_s[2 * LANES]
    cdef double lanes_q[2 * LANES]
    cdef Py_ssize_t c, i, j, n, step = FLUSH * LANES * (<Py_ssize_t>sizeof(real) if dtype == NATIVE else 2), rest = length % (FLUSH * LANES)
    cdef Source segment
    for c in range(width):
        of_lanes(shift + c, gate + c, gate_stride, shifts, of_gate, paired)
        begin_totals(lanes_s, lanes_q, LANES, LANES, shift)
        for j in range(LANES):
            s[j] = q[j] = 0
        for n in range(planes):
            segment = moved(at, n * at.x_step, n * at.dy_step, paired)
            for i in range(length // (FLUSH * LANES)):
                add_segment(segment, FLUSH * LANES, shifts, of_gate, low, high, far, s, q, paired, dtype, gate)
                flush(s, q, LANES, lanes_s, lanes_q, LANES)
                segment = moved(segment, step, step, paired)
            if rest:
                add_segment(segment, rest, shifts, of_gate, low, high, far, s, q, paired, dtype, gate)
                flush(s, q, LANES, lanes_s, lanes_q, LANES)
        fold(lanes_s, 1, total_s + c)
        fold(lanes_q, 1, total_q + c)
        if wide is double:
            fold(lanes_s + LANES, 1, total_s + WIDEST + c)
            fold(lanes_q + LANES, 1, total_q + WIDEST + c)
        at = moved(at, at.x_channel, at.dy_channel, paired)


cdef inline void segments_of(int rows, Source at, Py_ssize_t whole, Py_ssize_t rest, Py_ssize_t width, const wide* shift, const real* gate,
                             Py_ssize_t gate_stride, wide low, wide high, bint far, double* total_s, double* total_q, taken* how, stored* elements) noexcept nogil:
    """single_sums of `whole` rows, a multiple of 8, `rows` < 8 more, a constant, and `rest` elements."""
    cdef int paired = paired_of(how), dtype = type_of(elements)
    cdef Py_ssize_t c, j, step = LANES * (<Py_ssize_t>sizeof(real) if dtype == NATIVE else 2)
    cdef wide shifts[LANES]
    cdef wide of_gate[2 * TILE]
    cdef wide s[LANES]
    cdef wide q[LANES]
    cdef Source segment
    for c in range(width):
        of_lanes(shift + c, gate + c, gate_stride, shifts, of_gate, paired)
        for j in range(LANES):
            s[j] = q[j] = 0
        segment = at
        segment.x_step = segment.dy_step = step
        if whole:
            accumulate(segment, whole, LANES, shifts, of_gate, low, high, s, q, far, paired, dtype, gate)
        end_segment(moved(segment, whole * step, whole * step, paired), rows, rest, shifts, of_gate, low, high, s, q, s, q, paired, dtype, gate)
        fold(s, 1, total_s + c)
        fold(q, 1, total_q + c)
        at = moved(at, at.x_channel, at.dy_channel, paired)


cdef void single_sums(Source at, Py_ssize_t length, Py_ssize_t width, const wide* shift, const real* gate, Py_ssize_t gate_stride, wide low, wide high,
                      bint far, double* total_s, double* total_q, taken* how, stored* elements) noexcept nogil:
    """Sums over one segment of each of `width` channels, into the totals: those of long_sums, sooner where segments are short."""
    cdef Py_ssize_t whole = length // (8 * LANES) * 8, rows = length // LANES - whole, rest = length % LANES
    # Decided here, as compilers decide anew for each channel.
    if rows == 0:
        segments_of(0, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)
    elif rows == 1:
        segments_of(1, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)
    elif rows == 2:
        segments_of(2, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)
    elif rows == 3:
        segments_of(3, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)
    elif rows == 4:
        segments_of(4, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)
    elif rows == 5:
        segments_of(5, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)
    elif rows == 6:
        segments_of(6, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)
    else:
        segments_of(7, at, whole, rest, width, shift, gate, gate_stride, low, high, far, total_s, total_q, how, elements)


cdef void short_sums(Source at, Py_ssize_t length, Py_ssize_t width, const wide* shift, const real* gate, Py_ssize_t gate_stride, wide low, wide high,
                     wide* s, wide* q, taken* how) noexcept nogil:
    """As segment_sums, of less than LANES elements: the first lanes'."""
    cdef int paired = paired_of(how)
    cdef wide a, b
    cdef Py_ssize_t c, j
    for c in range(width):
        for j in range(length):
            b = <wide>(<const real*>at.x)[j] - shift[c]
            a = <wide>(<const real*>at.dy)[j] if paired else b
            if paired > PAIRED:
                a = gated(a, activated(b, <wide>gate[c + gate_stride], <wide>gate[c + 2 * gate_stride],
                                       <wide>(<const real*>at.residual)[j] if paired == ADDED_PAIR else 0, paired), low, high)
            s[j] += a
            q[j] += a * b
        s += LANES
        q += LANES
        at = moved(at, at.x_channel, at.dy_channel, paired)


cdef inline void fold(const wide* lanes, Py_ssize_t width, double* totals) noexcept nogil:
    """Add the sum of each channel's LANES values, in float64, halves upon halves, to its total."""
    cdef Py_ssize_t c
    for c in range(width):
        if wide is float:
            totals[c] += sum_of_floats(lanes + c * LANES)
        else:
            totals[c] += sum_of_doubles(lanes + c * LANES)


cdef inline void row_part(const Job* job, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t i, Py_ssize_t length, Py_ssize_t width, const wide* shift,
                          const real* gate, int narrow, wide* s, wide* q, taken* how) noexcept nogil:
    """Sums of a segment of each of `width` channels from (n, c0, i) on."""
    cdef real g[FLUSH * LANES]
    cdef wide low = <wide>job.low, high = <wide>job.high
    cdef Py_ssize_t stride = coefficient_stride(job.columns)
    cdef Source at
    if narrow and length >= LANES:
        at = narrow_at(job, n, c0, i, paired_of(how))
    else:
        at = source(job, n, c0, i, 1, 1, length, gate, g, how)
    if length < LANES:
        short_sums(at, length, width, shift, gate, stride, low, high, s, q, how)
    elif not narrow:
        segment_sums(at, length, width, shift, gate, stride, low, high, job.far, s, q, how, <Native*>NULL)
    elif real is float and narrow == FLOAT16:
        segment_sums(at, length, width, shift, gate, stride, low, high, job.far, s, q, how, <Half*>NULL)
    elif real is float:
        segment_sums(at, length, width, shift, gate, stride, low, high, job.far, s, q, how, <Brain*>NULL)


cdef inline void row_sums(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const wide* shift, const real* gate,
                          double* total_s, double* total_q, taken* how) noexcept nogil:
    """Sums of `width` channels, one after the other in each row."""
    cdef wide s[TILE * LANES]
    cdef wide q[TILE * LANES]
    cdef double lanes_s[2 * TILE * LANES]
    cdef double lanes_q[2 * TILE * LANES]
    cdef bint flushed = False
    cdef int narrow = narrow_source(job, paired_of(how))
    cdef bint together = job.places == NULL and not (taken is Pair and job.fusion)      # otherwise each of the channels needs the copy
    cdef Py_ssize_t c, i, j, n, part, whole, additions, filled = 0
    for j in range(width * LANES):
        s[j] = q[j] = 0
    for n in range(chunk.n0, chunk.n1):
        i = chunk.i0
        while i < chunk.i1:
            part = min(chunk.i1 - i, FLUSH * LANES)
            whole = part // LANES
            additions = whole // 8 + (whole >> 2 & 1) + (whole >> 1 & 1) + (whole & 1) + (part % LANES > 0)
            if filled and filled + additions > SEQUENCE:
                for c in range(width):
                    j = c * LANES
                    if not flushed:
                        begin_totals(lanes_s + j, lanes_q + j, LANES, TILE * LANES, s)
                    flush(s + j, q + j, LANES, lanes_s + j, lanes_q + j, TILE * LANES)
                flushed = True
                filled = 0
            if together or narrow and part >= LANES:
                row_part(job, n, c0, i, part, width, shift, gate, narrow, s, q, how)
            else:
                for c in range(width):
                    row_part(job, n, c0 + c, i, part, 1, shift + c, gate + c, narrow, s + c * LANES, q + c * LANES, how)
            i += part
            filled += additions
    if flushed:
        for c in range(width):
            j = c * LANES
            flush(s + j, q + j, LANES, lanes_s + j, lanes_q + j, TILE * LANES)
        fold(lanes_s, width, total_s)
        fold(lanes_q, width, total_q)
        if wide is double:
            fold(lanes_s + TILE * LANES, width, total_s + WIDEST)
            fold(lanes_q + TILE * LANES, width, total_q + WIDEST)
    else:
        fold(s, width, total_s)
        fold(q, width, total_q)


cdef inline void end_sequence(wide* s, wide* q, Py_ssize_t additions, double* lanes_s, double* lanes_q) noexcept nogil:
    """Flush LANES sums to the float64 lanes, which begin with the first SEQUENCE of additions."""
    if additions <= SEQUENCE:
        begin_totals(lanes_s, lanes_q, LANES, LANES, s)
    flush(s, q, LANES, lanes_s, lanes_q, LANES)


cdef inline Py_ssize_t add_planes(Py_ssize_t n, Source at, Py_ssize_t length, const wide* shift, const wide* gate, wide low, wide high, wide* s,
                                  wide* q, Py_ssize_t additions, double* lanes_s, double* lanes_q, int paired, int dtype,
                                  const real* kind) noexcept nogil:
    """As add_rows, over `length` >= LANES elements of each of n planes of a channel: element i goes to lane i % LANES, the last length % LANES ones to
    the last lanes, where what comes before them can be read, too.

    additions : how many there were; the last 1 to SEQUENCE of them are in s and q, those before in the float64 lanes. Returns what that is then.
    """
    cdef Py_ssize_t v = 0, end, vectors = ceil_div(length, LANES), full = length // LANES, rest = length % LANES
    cdef Py_ssize_t itemsize = <Py_ssize_t>sizeof(real) if dtype == NATIVE else 2, step = LANES * itemsize, back = (rest - LANES) * itemsize
    while v < vectors:
        if additions and additions % SEQUENCE == 0:
            end_sequence(s, q, additions, lanes_s, lanes_q)
        end = min(vectors, v + SEQUENCE - additions % SEQUENCE)
        additions += end - v
        while v < min(end, full):       # a loop without branches: the sums stay in registers
            add_rows_of(n, at, LANES, shift, gate, low, high, s, q, 0, paired, dtype, kind)
            at = moved(at, step, step, paired)
            v += 1
        if v < end:
            add_rows_of(n, moved(at, back, back, paired), LANES, shift, gate, low, high, s, q, LANES - rest, paired, dtype, kind)
            v += 1
    return additions


cdef inline void end_channel(wide* s, wide* q, Py_ssize_t additions, double* lanes_s, double* lanes_q, double* total_s,
                             double* total_q) noexcept nogil:
    """Add all that a channel's lanes hold to its totals."""
    if additions <= SEQUENCE:
        fold(s, 1, total_s)
        fold(q, 1, total_q)
        return
    end_sequence(s, q, additions, lanes_s, lanes_q)
    fold(lanes_s, 1, total_s)
    fold(lanes_q, 1, total_q)
    if wide is double:
        fold(lanes_s + LANES, 1, total_s + WIDEST)
        fold(lanes_q + LANES, 1, total_q + WIDEST)


cdef Py_ssize_t channels_of_planes(Source at, Py_ssize_t planes, Py_ssize_t length, Py_ssize_t width, const wide* shift, const real* gate,
                                   Py_ssize_t gate_stride, wide low, wide high, wide* piece_s, wide* piece_q, Py_ssize_t additions, double* lanes_s,
                                   double* lanes_q, double* total_s, double* total_q, taken* how, stored* elements) noexcept nogil:
    """Sums over `length` elements of `planes` planes of each of `width` channels, into the totals. Unless piece_s is NULL: of a piece of one channel, whose
    lanes are taken from piece_s and piece_q, and left there. Returns the additions so far. Fetching ahead gains nothing here, with 8 streams of loads."""
    cdef int paired = paired_of(how), dtype = type_of(elements)
    cdef wide k[LANES]
    cdef wide s[LANES]
    cdef wide q[LANES]
    cdef wide of_gate[2 * TILE]
    cdef Py_ssize_t c, j
    cdef Source rows
    for c in range(width):
        of_lanes(shift + c, gate + c, gate_stride, k, of_gate, paired)
        for j in range(LANES):
            s[j] = q[j] = 0
        if piece_s != NULL:
            for j in range(LANES):
                s[j], q[j] = piece_s[j], piece_q[j]
        else:
            additions = 0
        rows = at
        for j in range(planes // 8):
            additions = add_planes(8, rows, length, k, of_gate, low, high, s, q, additions, lanes_s, lanes_q, paired, dtype, gate)
            rows = moved(rows, 8 * at.x_step, 8 * at.dy_step, paired)
        if planes & 4:
            additions = add_planes(4, rows, length, k, of_gate, low, high, s, q, additions, lanes_s, lanes_q, paired, dtype, gate)
            rows = moved(rows, 4 * at.x_step, 4 * at.dy_step, paired)
        if planes & 2:
            additions = add_planes(2, rows, length, k, of_gate, low, high, s, q, additions, lanes_s, lanes_q, paired, dtype, gate)
            rows = moved(rows, 2 * at.x_step, 2 * at.dy_step, paired)
        if planes & 1:
            additions = add_planes(1, rows, length, k, of_gate, low, high, s, q, additions, lanes_s, lanes_q, paired, dtype, gate)
        if piece_s != NULL:
            for j in range(LANES):
                piece_s[j], piece_q[j] = s[j], q[j]
        else:
            end_channel(s, q, additions, lanes_s, lanes_q, total_s + c, total_q + c)
        at = moved(at, at.x_channel, at.dy_channel, paired)
    return additions


cdef inline bint short_planes(const Job* job, const Chunk* chunk) noexcept nogil:
    """Whether the same elements of 8 planes (at the end 4, 2, 1) are added as a tree, so that it is for those together, and not for each plane, that
    there is an end to take care of, and something to add in float64."""
    return LANES <= job.inner <= SHORT_PLANE and chunk.n1 - chunk.n0 >= 8


cdef inline bint one_by_one(const Job* job, const Chunk* chunk, int narrow, const wide* shift, const real* gate, taken* how) noexcept nogil:
    """Whether there are loops that reduce one channel after the other, all of its elements where they are."""
    cdef Py_ssize_t length = chunk.i1 - chunk.i0, rest = length % (FLUSH * LANES)
    if job.places != NULL and not narrow or taken is Pair and job.fusion:
        return False
    elif short_planes(job, chunk):
        return True
    elif real is not wide:          # exact_moments, which is rare
        return False
    elif length >= FLUSH * LANES:
        return rest == 0 or rest >= LANES
    else:
        return wide is float and chunk.n1 - chunk.n0 == 1 and length >= LANES       # for float64 not worth so much code


cdef inline void channel_sums(const Job* job, const Chunk* chunk, Source at, Py_ssize_t width, const wide* shift, const real* gate, double* total_s,
                               double* total_q, taken* how, stored* elements) noexcept nogil:
    """Sums of `width` channels, one after the other, from `at` on."""
    cdef wide low = <wide>job.low, high = <wide>job.high
    cdef double lanes_s[2 * LANES]
    cdef double lanes_q[2 * LANES]
    cdef Py_ssize_t planes = chunk.n1 - chunk.n0, length = chunk.i1 - chunk.i0, stride = coefficient_stride(job.columns)
    if real is double and stored is not Native:
        return                      # there are none
    elif short_planes(job, chunk):
        channels_of_planes(at, planes, length, width, shift, gate, stride, low, high, NULL, NULL, 0, lanes_s, lanes_q, total_s, total_q, how, elements)
    elif wide is float and real is float and length < FLUSH * LANES:
        single_sums(at, length, width, shift, gate, stride, low, high, job.far, total_s, total_q, how, elements)
    elif real is wide:
        long_sums(at, planes, length, width, shift, gate, stride, low, high, job.far, total_s, total_q, how, elements)


cdef inline void piece_sums(const Job* job, const Chunk* chunk, Py_ssize_t c, const wide* shift, const real* gate,
                            double* total_s, double* total_q, taken* how) noexcept nogil:
    """Sums of one channel, of short_planes, that is copied, or taken back through an activation, piece by piece first."""
    cdef wide s[LANES]
    cdef wide q[LANES]
    cdef double lanes_s[2 * LANES]
    cdef double lanes_q[2 * LANES]
    cdef real g[8 * (COPIED_PLANE + LANES)]
    cdef Py_ssize_t i, n = chunk.n0, rest, planes, length, additions = 0, stride = coefficient_stride(job.columns)
    cdef Source at
    for i in range(LANES):
        s[i] = q[i] = 0
    while n < chunk.n1:
        rest = chunk.n1 - n
        planes = 8 if rest >= 8 else 4 if rest >= 4 else 2 if rest >= 2 else 1      # in this order in all pieces
        i = 0
        while i < job.inner:
            length = COPIED_PLANE if job.inner - i >= COPIED_PLANE + LANES else job.inner - i       # never less than LANES
            at = source(job, n, c, i, planes, 1, length, gate, g, how)
            additions = channels_of_planes(at, planes, length, 1, shift, gate, stride, <wide>job.low, <wide>job.high, s, q, additions, lanes_s, lanes_q,
                                           NULL, NULL, how, <Native*>NULL)
            i += length
        n += planes
    end_channel(s, q, additions, lanes_s, lanes_q, total_s, total_q)


cdef void chunk_sums(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const wide* shift,
                     double* total_s, double* total_q, const real* kind, taken* how) noexcept nogil:
    """Sums over a chunk for `width` <= WIDEST columns from c0 on (in the row layout, <= TILE). Of the totals' 2 x WIDEST elements,
    the second half is, of float64 elements, what the first ones lose by rounding."""
    cdef Py_ssize_t j
    cdef int narrow = narrow_source(job, paired_of(how))
    cdef const real* gate = gates(job, c0, kind)
    cdef Source at
    begin_totals(total_s, total_q, width, WIDEST, shift)
    if job.inner == 1:
        column_sums(job, chunk, c0, width, shift, gate, total_s, total_q, how)
    elif one_by_one(job, chunk, narrow, shift, gate, how):
        if real is float and narrow == FLOAT16:
            at = narrow_at(job, chunk.n0, c0, chunk.i0, paired_of(how))
            channel_sums(job, chunk, at, width, shift, gate, total_s, total_q, how, <Half*>NULL)
        elif real is float and narrow == BFLOAT16:
            at = narrow_at(job, chunk.n0, c0, chunk.i0, paired_of(how))
            channel_sums(job, chunk, at, width, shift, gate, total_s, total_q, how, <Brain*>NULL)
        else:
            at = source(job, chunk.n0, c0, chunk.i0, chunk.n1 - chunk.n0, 1, chunk.i1 - chunk.i0, gate, NULL, how)
            channel_sums(job, chunk, at, width, shift, gate, total_s, total_q, how, <Native*>NULL)
    elif short_planes(job, chunk):
        for j in range(width):
            piece_sums(job, chunk, c0 + j, shift + j, gate + j, total_s + j, total_q + j, how)
    else:
        row_sums(job, chunk, c0, width, shift, gate, total_s, total_q, how)
    if wide is double:
        for j in range(width):
            total_s[j] = restored(total_s[j], total_s[WIDEST + j])
            total_q[j] = restored(total_q[j], total_q[WIDEST + j])


cdef void exact_moments(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, double count, const bint* wanted,
                        double* means, double* m2s, const real* kind) noexcept nogil:
    """Mean and M2 of the wanted ones of a chunk's channels c0 to c0 + width, by two passes in float64."""
    cdef double shift[WIDEST]
    cdef double total_s[2 * WIDEST]
    cdef double total_q[2 * WIDEST]
    cdef double mean
    cdef Py_ssize_t j
    cdef bint any_wanted = False
    for j in range(width):
        any_wanted |= wanted[j]
    if not any_wanted:
        return
    for j in range(width):
        shift[j] = value(job, OF_X, &job.x, chunk.n0, c0 + j, chunk.i0, kind)
        if not finite(shift[j]):
            shift[j] = 0
    chunk_sums(job, chunk, c0, width, shift, total_s, total_q, kind, <Alone*>NULL)
    for j in range(width):
        shift[j] += total_s[j] / count
    chunk_sums(job, chunk, c0, width, shift, total_s, total_q, kind, <Alone*>NULL)
    for j in range(width):
        if wanted[j]:
            mean = total_s[j] / count
            means[j] = shift[j] + mean if finite(mean) else shift[j]
            m2s[j] = total_q[j] - total_s[j] * mean


cdef inline real guess(const real* x, Py_ssize_t step) noexcept nogil:
    """The mean of 8 elements."""
    return tree(8, x[0], x[step], x[2 * step], x[3 * step], x[4 * step], x[5 * step], x[6 * step], x[7 * step]) * <real>0.125


cdef void chunk_moments(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    """Mean and M2 (sum of squared deviations) of chunk k, for channels c0 to c0 + width, into job.partials.

    One pass over shifted data: the shift is the mean of 8 elements spread over the chunk. Where that was a bad guess (the mean lies more than
    1.4 standard deviations off: 1 normal channel in 16,000), or squares left the range of the element type, the channel is done again by two
    passes in float64.
    """
    cdef Chunk chunk = chunk_of(job, k)
    cdef real shift[WIDEST]
    cdef double total_s[2 * WIDEST]
    cdef double total_q[2 * WIDEST]
    cdef bint bad[WIDEST]
    cdef bint any_bad = False
    cdef Py_ssize_t few = 1 if job.inner > 1 else LANES     # channels that are done again together
    cdef Py_ssize_t j, rows = chunk.n1 - chunk.n0, length = chunk.i1 - chunk.i0
    cdef Py_ssize_t i, n, inner, step = WIDEST, channel_step = 1
    cdef double count = <double>(rows * length), each = 1 / count, total, square, mean, m2
    cdef double least = 1e-30 if real is float else 1e-290
    cdef double most = 1e37 if real is float else 1e300
    cdef double* means = job.partials + 2 * k * job.columns + c0
    cdef double* m2s = means + job.columns
    cdef real few_values[8 * WIDEST]
    cdef const real* at

    shift[0] = 0        # for compilers that think of no channels at all
    at = few_values
    if copied(job, OF_X) or length < 8 and (rows < 8 or length > 1):
        for i in range(8):
            n, inner = i * (rows // 8), i * (length // 8) if length >= 8 else i % length
            if rows < 8 and length < 8:
                n, inner = i * rows * length // 8 // length, i * rows * length // 8 % length
            if copied(job, OF_X):
                move_box(job, OF_X, chunk.n0 + n, c0, chunk.i0 + inner, 1, width, 1, few_values + i * WIDEST, False)
            else:
                for j in range(width):
                    few_values[i * WIDEST + j] = element(&job.x, chunk.n0 + n, c0 + j, chunk.i0 + inner, kind)[0]
    else:
        at = element(&job.x, chunk.n0, c0, chunk.i0, kind)
        step = rows // 8 * job.x.outer_stride + length // 8
        channel_step = job.x.channel_stride
    if channel_step == 1:
        for j in range(width):
            shift[j] = guess(at + j, step)
    else:
        for j in range(width):
            shift[j] = guess(at + j * channel_step, step)
    chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, kind, <Alone*>NULL)
    for j in range(width):
        total, square = total_s[j], total_q[j]
        mean = total * each if real is float else total / count
        m2 = square - total * mean
        means[j] = shift[j] + mean
        m2s[j] = m2
        bad[j] = not (2 * m2 >= total * mean and m2 >= least * count and square <= most)
        any_bad |= bad[j]
    if any_bad:
        j = 0
        while j < width:
            exact_moments(job, &chunk, c0 + j, min(few, width - j), count, bad + j, means + j, m2s + j, kind)
            j += few


cdef inline void merge_moments(const Job* job, Py_ssize_t c0, Py_ssize_t width, double* mean, double* var, const real* kind) noexcept nogil:
    """mean and var of channels from the chunks' moments, in their order: Chan, Golub & LeVeque 1983, eq. 1.5."""
    cdef Py_ssize_t i, j, k
    cdef Chunk chunk
    cdef double count = 0, n, delta, share, weight, x
    cdef const double* means
    cdef const double* m2s
    for j in range(width):
        mean[j] = var[j] = 0        # for compilers that think of no chunks at all
    for k in range(job.chunks):
        chunk = chunk_of(job, k)
        n = <double>((chunk.n1 - chunk.n0) * (chunk.i1 - chunk.i0))
        for i in range(job.fold):
            means = job.partials + 2 * k * job.columns + i * job.channels + c0
            m2s = means + job.columns
            share = n / (count + n)
            weight = share * count
            count += n
            if k == 0 and i == 0:
                for j in range(width):
                    mean[j] = means[j]
                    var[j] = m2s[j]
            else:
                for j in range(width):
                    delta = means[j] - mean[j]
                    # Of infinities, the sum says what the mean is; the variance is NaN, as infinity - infinity is.
                    mean[j] = mean[j] + delta * share if finite(delta) else mean[j] + means[j]
                    var[j] += m2s[j] + delta * delta * weight + (delta - delta)
    for i in range(job.tail // max(1, job.channels)):
        share = 1 / (count + 1)
        weight = share * count
        count += 1
        for j in range(width):
            x = value(job, OF_X, &job.x, job.rows, i * job.channels + c0 + j, 0, kind)
            delta = x - mean[j]
            mean[j] = mean[j] + delta * share if finite(delta) else mean[j] + x
            var[j] += delta * delta * weight + (delta - delta)
    # Multiplied in a quarter of the time; float64 keeps the last bit.
    for j in range(width):
        var[j] = var[j] * (1 / count) if real is float else var[j] / count


cdef void chunk_gradients(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    """Sums of dy and of dy * (x - mean) over chunk k, into job.partials."""
    cdef Chunk chunk = chunk_of(job, k)
    cdef real shift[WIDEST]
    cdef double total_s[2 * WIDEST]
    cdef double total_q[2 * WIDEST]
    cdef double rest[WIDEST]
    cdef double total, product, lost
    cdef Py_ssize_t j = 0, c = c0 % job.channels, n
    cdef double* dy_sums = job.partials + 2 * k * job.columns + c0
    cdef double* products = dy_sums + job.columns
    while j < width:            # once, unless the columns are several pixels' channels
        n = min(width - j, job.channels - c)
        read(&job.mean, c, n, 0, rest + j)
        j += n
        c = 0
    for j in range(width):
        shift[j] = <real>rest[j]
        rest[j] -= shift[j]
    if gate_in_registers(job) and job.with_residual:
        chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, kind, <AddedPair*>NULL)
    elif gate_in_registers(job):
        chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, kind, <GatedPair*>NULL)
    else:
        chunk_sums(job, &chunk, c0, width, shift, total_s, total_q, kind, <Pair*>NULL)
    for j in range(width):
        total, product, lost = total_s[j], total_q[j], rest[j]
        dy_sums[j] = total
        products[j] = product - (lost * total if lost != 0 else 0)


cdef inline void merge_gradients(const Job* job, Py_ssize_t c0, Py_ssize_t width, const double* mean, double* dy_sum, double* product,
                                 const real* kind) noexcept nogil:
    """Sums of dy and of dy * (x - mean) of channels from the chunks' sums, in their order."""
    cdef Py_ssize_t c, i, j, k, stride
    cdef real g
    cdef const real* x
    cdef const real* dy
    cdef const double* dy_sums
    cdef double lost[CONCLUDED]
    cdef double lost_product[CONCLUDED]
    for j in range(width):
        dy_sum[j] = product[j] = 0
        if real is double:
            lost[j] = lost_product[j] = 0
    for k in range(job.chunks):
        for i in range(job.fold):
            dy_sums = job.partials + 2 * k * job.columns + i * job.channels + c0
            for j in range(width):
                if real is double:
                    lost[j] += rounded_off(dy_sum[j], dy_sums[j])
                    lost_product[j] += rounded_off(product[j], dy_sums[job.columns + j])
                dy_sum[j] += dy_sums[j]
                product[j] += dy_sums[job.columns + j]
    if real is double:
        for j in range(width):
            dy_sum[j] = restored(dy_sum[j], lost[j])
            product[j] = restored(product[j], lost_product[j])
    for i in range(job.tail // max(1, job.channels)):
        for j in range(width):
            c = i * job.channels + c0 + j
            x = readable(job, OF_X, &job.x, job.rows, c, 0, 1, 1, 1, &stride, kind)
            dy = readable(job, OF_DY, &job.dy, job.rows, c, 0, 1, 1, 1, &stride, kind)
            g = dy[0]
            if job.fusion:
                gate_rows(job, x, 0, dy, 0, &g, 0, 1, 1, gates(job, c, kind))
            dy_sum[j] += g
            product[j] += g * (x[0] - mean[j])


# ---- between reduction and apply -------------------------------------------------------------------------------------------------------
#
# hi is the mean, rounded to the element type; what that loses, lo = mean - hi, goes into the offset. Of channels whose elements may lie further apart
# than the type's largest number, hi is 0, so that x - hi stays finite.
#
# forward:  y  = (x - hi) * scale + offset                with scale = weight * invstd, offset = bias - lo * scale
# backward: dx = ((dy - offset) - (x - hi) * slope) * scale     with slope = weight_grad * invstd / m, offset = bias_grad / m - lo * slope
# frozen:   dx = dy * scale, as forward of dy with a mean and bias of 0

cdef inline void update(const Vector* running, Py_ssize_t c0, Py_ssize_t width, const double* batch, double momentum, double factor) noexcept nogil:
    """running = (1 - momentum) * running + momentum * (batch * factor), in float64, rounded once."""
    cdef double values[CONCLUDED]
    cdef Py_ssize_t j
    read(running, c0, width, 0, values)
    for j in range(width):
        values[j] = (1 - momentum) * values[j] + momentum * (batch[j] * factor)
    write(running, c0, width, values)


cdef inline void inverse_roots(const double* var, double eps, Py_ssize_t width, double* invstd, const real* kind) noexcept nogil:
    """invstd = 1 / sqrt(var + eps), to 14 digits where the elements are float32: a third of the time of what float64 needs."""
    cdef float rough[CONCLUDED]
    cdef Py_ssize_t j
    cdef int ordinary = 0       # as wide as a float, so that they are counted side by side
    cdef double a, r
    if real is float:
        for j in range(width):
            rough[j] = <float>(var[j] + eps)
        for j in range(width):
            ordinary += (1 if rough[j] < <float>1e30 else 0) if rough[j] > <float>1e-30 else 0
        for j in range(width):
            rough[j] = <float>1 / sqrtf(rough[j])
        if ordinary == width:
            for j in range(width):
                a = var[j] + eps
                r = rough[j]
                invstd[j] = r * (1.5 - 0.5 * a * r * r)     # Newton's method
            return
    for j in range(width):
        invstd[j] = 1 / sqrt(var[j] + eps)


cdef inline bint far_apart(const Job* job, double var, const real* kind) noexcept nogil:
    """Whether elements may differ from their mean by more than FLT_MAX: in this batch, or, where var is given, by 256 standard deviations."""
    cdef double most = FLT_MAX * <double>FLT_MAX
    return real is float and var >= (min(most / 65536, most / (<double>job.outer * job.inner)) if job.reduction == MOMENTS else most / 65536)


cdef inline void conclude_channels(const Job* job, Py_ssize_t c0, Py_ssize_t width, real* kind) noexcept nogil:
    """For `width` <= CONCLUDED channels from c0 on, from the chunks' sums to the results and to what the apply pass needs."""
    cdef double mean[CONCLUDED]
    cdef double var[CONCLUDED]
    cdef double invstd[CONCLUDED]
    cdef double weight[CONCLUDED]
    cdef double dy_sum[CONCLUDED]
    cdef double weight_grad[CONCLUDED]
    cdef double bias[CONCLUDED]
    cdef double count = <double>job.outer * job.inner, each = 1 / count, lost
    cdef Py_ssize_t i, j, array, stride = coefficient_stride(job.columns)
    cdef bint any_far = False
    cdef real* hi = <real*>job.coefficients + c0
    cdef real* scale = hi + stride
    cdef real* offset = scale + stride
    cdef real* slope = offset + stride

    dy_sum[0] = weight_grad[0] = 0      # for compilers that think of gradients without sums
    if job.reduction == MOMENTS:
        merge_moments(job, c0, width, mean, var, kind)
        write(&job.mean, c0, width, mean)
        write(&job.var, c0, width, var)
        if job.running_mean.data != NULL:
            update(&job.running_mean, c0, width, mean, job.momentum, 1)
            update(&job.running_var, c0, width, var, job.momentum, count / (count - 1))
    else:
        read(&job.mean, c0, width, 0, mean)
        read(&job.var, c0, width, 1, var)
    inverse_roots(var, job.eps, width, invstd, kind)
    if job.reduction == GRADIENTS and job.weight_grad.data != NULL:
        merge_gradients(job, c0, width, mean, dy_sum, weight_grad, kind)
        for j in range(width):
            weight_grad[j] *= invstd[j]
        write(&job.weight_grad, c0, width, weight_grad)
        write(&job.bias_grad, c0, width, dy_sum)
    if not job.apply:
        return

    read(&job.weight, c0, width, 1, weight)
    for j in range(width):
        hi[j] = <real>mean[j]
        scale[j] = <real>(weight[j] * invstd[j])
    for j in range(width):
        any_far |= far_apart(job, var[j], kind)
    if any_far:
        for j in range(width):
            if far_apart(job, var[j], kind):
                hi[j] = 0
    if job.apply == FORWARD:
        read(&job.bias, c0, width, 0, bias)
        for j in range(width):
            lost = (mean[j] - hi[j]) * scale[j]
            offset[j] = <real>(bias[j] - lost if finite(lost) else bias[j])
    elif job.apply == BACKWARD:
        for j in range(width):
            slope[j] = <real>(weight_grad[j] * invstd[j] * each)
            lost = (mean[j] - hi[j]) * slope[j]
            offset[j] = <real>(dy_sum[j] * each - lost if finite(lost) else dy_sum[j] * each)
    else:
        for j in range(width):
            hi[j] = offset[j] = 0
    for array in range(COEFFICIENTS if job.apply == BACKWARD else GATES):
        for i in range(1, job.fold):
            for j in range(width):
                hi[array * stride + i * job.channels + j] = hi[array * stride + j]
        # In the column layout, the first ones once more after the last, for rows that begin later.
        i = job.columns
        while job.inner == 1 and c0 + i < stride:
            for j in range(min(width, stride - i - c0)):
                hi[array * stride + i + j] = hi[array * stride + j]
            i += job.channels


cdef void conclude_block(const Job* job, Py_ssize_t c0, Py_ssize_t width, real* kind) noexcept nogil:
    # The sizes of groups (share_work), as constants of the inlined loops: 0.9 to 1.0 of a call's time within the caches, for 12 KB of code each, which
    # float64 does without.
    if real is float and width == 1:
        conclude_channels(job, c0, 1, kind)
    elif real is float and width == 2:
        conclude_channels(job, c0, 2, kind)
    elif real is float and width == 4:
        conclude_channels(job, c0, 4, kind)
    elif real is float and width == 8:
        conclude_channels(job, c0, 8, kind)
    elif real is float and width == 16:
        conclude_channels(job, c0, 16, kind)
    elif real is float and width == 32:
        conclude_channels(job, c0, 32, kind)
    else:
        conclude_channels(job, c0, width, kind)


cdef inline void prepare_gradients(const Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """The coefficients by which gradients find the activation's input: those of the forward formula."""
    cdef Job forward = job[0]
    forward.reduction = 0
    forward.apply = FORWARD
    forward.coefficients = <void*>gates(job, 0, kind)
    conclude(&forward, c0, c1, kind)


cdef inline void conclude(const Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    while c0 < c1:
        conclude_block(job, c0, min(CONCLUDED, c1 - c0), kind)
        c0 += CONCLUDED


# ---- apply -----------------------------------------------------------------------------------------------------------------------------

cdef inline void transform_row(const Job* job, const real* x, const real* dy, real* y, real* g, Py_ssize_t width, const real* hi,
                               const real* scale, const real* offset, const real* slope, const real* bias, int finish, bint stream,
                               int paired) noexcept nogil:
    """One row of the apply pass; computed before it is stored, so y may be x, dy or the residual. ADDED_PAIR: g, unless NULL, gets the residual's gradient."""
    cdef real row[TILE]         # of this function, so that it never leaves the registers
    cdef real g_row[TILE]
    cdef const real* r = residual_at(job, x) if paired == ADDED_PAIR else x
    cdef real b, low = <real>job.low, high = <real>job.high
    cdef Py_ssize_t j
    for j in range(width):
        if paired > PAIRED:
            b = x[j] - hi[j]
            g_row[j] = gated(dy[j], activated(b, scale[j], bias[j], r[j], paired), low, high)
            row[j] = ((g_row[j] - offset[j]) - b * slope[j]) * scale[j]
        elif paired:
            row[j] = ((dy[j] - offset[j]) - (x[j] - hi[j]) * slope[j]) * scale[j]
        else:
            row[j] = (x[j] - hi[j]) * scale[j] + offset[j]
    if finish and not paired:
        finish_row(job, x, row, width, finish)
    if stream:
        stream_store(y, row, width * sizeof(real))
    else:
        for j in range(width):
            y[j] = row[j]
    if paired == ADDED_PAIR and g != NULL:
        if stream and <size_t>g % 16 == 0:
            stream_store(g, g_row, width * sizeof(real))
        else:
            for j in range(width):
                g[j] = g_row[j]


cdef inline void transform_rows(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                                real* g, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t ahead, Py_ssize_t reach, const real* hi,
                                const real* scale, const real* offset, const real* slope, const real* bias, int finish, bint stream,
                                int paired) noexcept nogil:
    """ahead, reach : to be written soon, and by this thread, is what lies `ahead` elements after the first `reach` rows."""
    cdef Py_ssize_t i
    for i in range(rows):
        if stream:
            prefetch_row(x, width * sizeof(real))
            if paired:
                prefetch_row(dy, width * sizeof(real))
            if (finish or paired == ADDED_PAIR) and job.with_residual:
                prefetch_row(residual_at(job, x), width * sizeof(real))
        elif i < reach:
            prefetch_output(y + ahead, width * sizeof(real))
        transform_row(job, x, dy, y, g, width, hi, scale, offset, slope, bias, finish, stream, paired)
        x += x_stride
        y += y_stride
        if paired:
            dy += dy_stride
        if g != NULL:
            g += y_stride


cdef inline void transform(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                           Py_ssize_t rows, Py_ssize_t width, Py_ssize_t ahead, Py_ssize_t reach, Py_ssize_t head, Py_ssize_t overlap,
                           const real* hi, const real* scale, const real* offset, const real* slope, const real* bias, int finish,
                           bint stream, int paired) noexcept nogil:
    """The apply pass down the rows of a tile, the first of which begins at `head`.

    head, overlap : unless 0, there is a further row at 0, or at `overlap`, which overlaps the others: what comes before the first boundary of a
    cache line, and the end of what isn't whole rows. As y may be x, dy or the residual, these are computed before anything is stored. Past the caches y
    is none of these, and nothing is stored twice, nor in the ordinary way: between the others, that would cost a fifth of the time.
    """
    cdef real first[TILE]
    cdef real last[TILE]
    cdef real g_first[TILE]
    cdef real g_last[TILE]
    cdef real* g = <real*>(<char*>y + job.residual_grad) if paired == ADDED_PAIR and job.with_residual_grad else NULL
    cdef real* g_begin = g
    cdef real* g_end = g + overlap if g != NULL else NULL
    cdef const real* x_end = x + overlap
    cdef const real* dy_end = dy + overlap if paired else dy
    cdef real* begin = y
    cdef real* end = y + overlap
    cdef Py_ssize_t done = head + rows * width - overlap        # of the last row
    cdef Py_ssize_t j
    if head:
        transform_row(job, x, dy, first, g_first, width, hi, scale, offset, slope, bias, finish, False, paired)
    if stream:
        stream_part(begin, first, head * sizeof(real))
        if g != NULL:
            stream_part(g_begin, g_first, head * sizeof(real))
    elif overlap:
        transform_row(job, x_end, dy_end, last, g_last, width, hi, scale, offset, slope, bias, finish, False, paired)
    x += head
    y += head
    if paired:
        dy += head
    if g != NULL:
        g += head
    transform_rows(job, x, x_stride, dy, dy_stride, y, y_stride, g, rows, width, ahead, reach, hi, scale, offset, slope, bias, finish, stream, paired)
    if not stream:
        if head:
            for j in range(width):
                begin[j] = first[j]
            if g_begin != NULL:
                for j in range(width):
                    g_begin[j] = g_first[j]
        if overlap:
            for j in range(width):
                end[j] = last[j]
            if g_end != NULL:
                for j in range(width):
                    g_end[j] = g_last[j]
    elif overlap:
        transform_row(job, x_end, dy_end, last, g_last, width, hi, scale, offset, slope, bias, finish, False, paired)
        stream_part(end + done, last + done, (width - done) * sizeof(real))
        if g_end != NULL:
            stream_part(g_end + done, g_last + done, (width - done) * sizeof(real))


cdef inline Py_ssize_t to_cache_line(const real* y) noexcept nogil:
    """The number of elements from y to the next boundary of a cache line."""
    return <Py_ssize_t>((64 - <size_t>y % 64) % 64 // sizeof(real))


cdef void transform_channels(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                             Py_ssize_t width, Py_ssize_t length, const real* coefficients, Py_ssize_t stride, applied* how,
                             written* where) noexcept nogil:
    """The apply pass over `length` contiguous elements of each of `width` channels."""
    cdef int paired = paired_of(how), finish = finish_tag(how)
    cdef bint stream = written is Streamed
    cdef real hi[LANES]
    cdef real scale[LANES]
    cdef real offset[LANES]
    cdef real slope[LANES]
    cdef real bias[LANES]
    cdef Py_ssize_t c, j, reach, head = 0
    for c in range(width):
        for j in range(LANES):
            hi[j] = coefficients[c]
            scale[j] = coefficients[c + stride]
            offset[j] = coefficients[c + 2 * stride]
            if paired:
                slope[j] = coefficients[c + 3 * stride]
            if paired > PAIRED:
                bias[j] = coefficients[c + GATE_OFFSET * stride]
        if length < LANES:
            transform(job, x, 0, dy, 0, y, 0, 1, length, 0, 0, 0, 0, hi, scale, offset, slope, bias, finish, False, paired)
        else:
            if length >= ALIGN_LENGTH:
                head = to_cache_line(y)
            reach = ((width - c if y_stride == length else 1) * length - head - OUTPUT_AHEAD) // LANES if not paired or job.far else 0
            transform(job, x, LANES, dy, LANES, y, LANES, (length - head) // LANES, LANES, OUTPUT_AHEAD, reach, head,
                      length - LANES if (length - head) % LANES else 0, hi, scale, offset, slope, bias, finish, stream, paired)
        x += x_stride
        y += y_stride
        if paired:
            dy += dy_stride


cdef inline void tile_transform(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                                Py_ssize_t rows, Py_ssize_t width, Py_ssize_t ahead, Py_ssize_t reach, const real* coefficients, Py_ssize_t stride, int finish,
                                bint stream, int paired) noexcept nogil:
    """The apply pass over a tile of `width` <= TILE columns."""
    cdef real of_tile[COEFFICIENTS * TILE]
    cdef const real* at = coefficients
    cdef Py_ssize_t j
    if paired <= PAIRED and rows >= REGISTERED:
        # Once, for all rows: of this function, so that they stay in registers.
        for j in range(width):
            of_tile[j], of_tile[TILE + j], of_tile[2 * TILE + j] = at[j], at[stride + j], at[2 * stride + j]
            if paired:
                of_tile[3 * TILE + j] = at[3 * stride + j]
        transform(job, x, x_stride, dy, dy_stride, y, y_stride, rows, width, ahead, reach, 0, 0, of_tile, of_tile + TILE, of_tile + 2 * TILE,
                  of_tile + 3 * TILE, NULL, finish, stream, paired)
    else:
        transform(job, x, x_stride, dy, dy_stride, y, y_stride, rows, width, ahead, reach, 0, 0, at, at + stride, at + 2 * stride, at + 3 * stride,
                  at + GATE_OFFSET * stride, finish, stream, paired)


cdef void transform_columns(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                            Py_ssize_t rows, Py_ssize_t width, const real* coefficients, Py_ssize_t stride, applied* how, written* where) noexcept nogil:
    """The apply pass over `rows` rows of `width` columns, tile by tile in blocks of rows so that neighbouring tiles follow one another closely."""
    cdef int paired = paired_of(how), finish = finish_tag(how)
    cdef bint stream = written is Streamed
    cdef Py_ssize_t c, w, n = 0, to_dy, reach, rows_ahead = OUTPUT_AHEAD // max(1, y_stride), ahead = rows_ahead * y_stride
    cdef Py_ssize_t some = max(1, STREAMED // max(1, x_stride)) if stream else max(REGISTERED, BLOCK // max(1, x_stride))
    while n < rows:
        some = min(some, rows - n)
        reach = rows - n - rows_ahead if rows_ahead and (not paired or job.far) else 0
        c = 0
        while c < width:
            to_dy = n * dy_stride + c if paired else 0
            if job.inner > 1 and not paired:        # planes, the rows of which lie far apart
                ahead, reach = TILE, some if c + 2 * TILE <= width else 0
            w = TILE if width - c >= TILE else min(LANES, width - c)
            # The usual widths are constants of the inlined loops.
            if w == TILE:
                tile_transform(job, x + n * x_stride + c, x_stride, dy + to_dy, dy_stride, y + n * y_stride + c, y_stride, some, TILE, ahead, reach,
                               coefficients + c, stride, finish, stream, paired)
            elif w == LANES:
                tile_transform(job, x + n * x_stride + c, x_stride, dy + to_dy, dy_stride, y + n * y_stride + c, y_stride, some, LANES, ahead, reach,
                               coefficients + c, stride, finish, stream, paired)
            else:
                tile_transform(job, x + n * x_stride + c, x_stride, dy + to_dy, dy_stride, y + n * y_stride + c, y_stride, some, w, ahead, reach,
                               coefficients + c, stride, finish, stream, paired)
            c += w
        n += some


cdef void transform_planes(const Job* job, const real* x, Py_ssize_t x_stride, const real* dy, Py_ssize_t dy_stride, real* y, Py_ssize_t y_stride,
                           Py_ssize_t rows, Py_ssize_t width, const real* coefficients, Py_ssize_t stride, applied* how) noexcept nogil:
    """The apply pass over `rows` rows of `width` channels' small planes: columns, each of which has the coefficients of its channel."""
    cdef int paired = paired_of(how)
    cdef real of_columns[COEFFICIENTS * (SMALL + LANES)]
    cdef real* to
    cdef real value
    cdef Py_ssize_t c, n, i, j, array, columns, head, first = 0, length = job.inner
    while first < width:
        n = min(width - first, SMALL // length)
        for c in range(n):
            for array in range(COEFFICIENTS if paired else GATES):
                value = coefficients[array * stride + first + c]
                to = of_columns + array * (SMALL + LANES) + c * length
                for i in range(ceil_div(length, LANES)):        # the end of the last ones belongs to the next channel
                    for j in range(LANES):
                        to[i * LANES + j] = value
        columns = n * length
        head = min(to_cache_line(y), columns) if y_stride * sizeof(real) % 64 == 0 else 0
        if head:
            transform_columns(job, x, x_stride, dy, dy_stride, y, y_stride, rows, head, of_columns, SMALL + LANES, how, <Cached*>NULL)
        transform_columns(job, x + head, x_stride, dy + head if paired else dy, dy_stride, y + head, y_stride, rows, columns - head, of_columns + head,
                          SMALL + LANES, how, <Cached*>NULL)
        x += columns
        y += columns
        if paired:
            dy += columns
        first += n


# ---- phases: a range of the work's items, for one thread -------------------------------------------------------------------------------

cdef inline void reduce(const Job* job, Py_ssize_t k, Py_ssize_t c0, Py_ssize_t width, const real* kind) noexcept nogil:
    if job.reduction == MOMENTS:
        chunk_moments(job, k, c0, width, kind)
    elif job.weight_grad.data != NULL:
        chunk_gradients(job, k, c0, width, kind)


cdef inline void apply(const Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                       real* kind) noexcept nogil:
    """The apply pass over the box of rows [n0, n1) x columns [c0, c1) x inner indices [i0, i1)."""
    if job.places != NULL:
        apply_copied(job, n0, n1, c0, c1, i0, i1, kind)
    elif job.apply == BACKWARD and gate_in_registers(job):
        apply_gated_pair(job, n0, n1, c0, c1, i0, i1, kind)
    elif job.apply == FORWARD or not job.fusion:
        apply_from(job, &job.x, &job.dy, n0, n1, c0, c1, i0, i1, kind)
    else:
        apply_gated(job, n0, n1, c0, c1, i0, i1, kind)


cdef inline void see_copy(View* view, void* copy, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, Py_ssize_t width, Py_ssize_t length,
                          const real* kind) noexcept nogil:
    """Let a view of the whole array have the box that begins at (n, c, i) in `copy`."""
    view.outer_stride = width * length
    view.channel_stride = length
    view.data = <real*>copy - (n * view.outer_stride + c * view.channel_stride + i)


include "apply_narrow.pxi"


cdef void apply_copied(const Job* of_places, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                       real* kind) noexcept nogil:
    """The apply pass over arrays of which pieces are copied, piece by piece."""
    cdef Job job = of_places[0]
    cdef Py_ssize_t n = n0, c, i
    cdef Py_ssize_t length = min(i1 - i0, APPLIED)
    cdef Py_ssize_t width = min(c1 - c0, APPLIED // length) if length == i1 - i0 else 1
    cdef Py_ssize_t rows = 1 if job.inner > 1 else max(1, APPLIED // width)
    if apply_narrow(of_places, n0, n1, c0, c1, i0, i1):
        return
    job.places = NULL
    while n < n1:
        c = c0
        while c < c1:
            i = i0
            while i < i1:
                apply_piece(of_places, &job, n, min(n + rows, n1), c, min(c + width, c1), i, min(i + length, i1), kind)
                i += length
            c += width
        n += rows


cdef void apply_piece(const Job* of_places, Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                      real* kind) noexcept nogil:
    """The apply pass over at most APPLIED elements of each array; `job` is that of `of_places` without these."""
    cdef Py_ssize_t rows = n1 - n0, width = c1 - c0, length = i1 - i0
    cdef int which
    for which in range(OF_Y):
        if copied(of_places, which) and (which != OF_X or job.apply != FROZEN or job.fusion):
            move_box(of_places, which, n0, c0, i0, rows, width, length, copy_of(job, which, kind), False)
    if copied(of_places, OF_X):
        see_copy(&job.x, copy_of(job, OF_X, kind), n0, c0, i0, width, length, kind)
    if copied(of_places, OF_DY):
        see_copy(&job.dy, copy_of(job, OF_DY, kind), n0, c0, i0, width, length, kind)
    if copied(of_places, OF_Y):
        see_copy(&job.y, copy_of(job, OF_Y, kind), n0, c0, i0, width, length, kind)
        job.stream = False
    apply(job, n0, n1, c0, c1, i0, i1, kind)
    for which in range(OF_Y, ARRAYS):
        if copied(of_places, which):
            move_box(of_places, which, n0, c0, i0, rows, width, length, copy_of(job, which, kind), True)


cdef void apply_from(const Job* job, const View* x, const View* dy, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1,
                     Py_ssize_t i0, Py_ssize_t i1, real* kind) noexcept nogil:
    cdef int finish = finish_of(job)
    if job.apply == BACKWARD:
        apply_box(job, x, dy, n0, n1, c0, c1, i0, i1, kind, <Pair*>NULL)
    elif finish == NOTHING:
        # What scales dy alone is the forward formula with dy in the place of x.
        apply_box(job, dy if job.apply == FROZEN else x, dy, n0, n1, c0, c1, i0, i1, kind, <Alone*>NULL)
    elif finish == CLIP:
        apply_box(job, x, dy, n0, n1, c0, c1, i0, i1, kind, <Clipped*>NULL)
    elif finish == ADD_CLIP:
        apply_box(job, x, dy, n0, n1, c0, c1, i0, i1, kind, <AddClipped*>NULL)
    else:
        apply_box(job, x, dy, n0, n1, c0, c1, i0, i1, kind, <Finished*>NULL)


cdef void apply_gated_pair(const Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                           real* kind) noexcept nogil:
    if job.with_residual:
        apply_box(job, &job.x, &job.dy, n0, n1, c0, c1, i0, i1, kind, <AddedPair*>NULL)
    else:
        apply_box(job, &job.x, &job.dy, n0, n1, c0, c1, i0, i1, kind, <GatedPair*>NULL)


cdef void apply_gated(const Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1,
                      real* kind) noexcept nogil:
    """Gradients behind an activation: dy is taken back through it piece by piece, into the residual's gradient or else into a buffer."""
    cdef real buffer[GATED]
    cdef View g
    cdef Py_ssize_t n, c, i, rows, width, length
    cdef Py_ssize_t most_width = GATED if job.inner == 1 else 1, most_length = 1 if job.inner == 1 else GATED
    n = n0
    while n < n1:
        rows = 1 if job.inner > 1 else min(n1 - n, max(1, GATED // (c1 - c0)))
        c = c0
        while c < c1:
            width = min(c1 - c, most_width)
            i = i0
            while i < i1:
                length = min(i1 - i, most_length)
                if job.with_residual_grad:
                    g = job.y
                    g.data = <char*>job.y.data + job.residual_grad
                else:
                    # Where element (n, c, i) would stand if the buffer were the whole array.
                    g.outer_stride = width
                    g.channel_stride = 1
                    g.data = buffer - (n * g.outer_stride + c * g.channel_stride + i)
                gate_rows(job, element(&job.x, n, c, i, kind), job.x.outer_stride, element(&job.dy, n, c, i, kind), job.dy.outer_stride,
                          <real*>element(&g, n, c, i, kind), g.outer_stride, rows, width * length, gates(job, c, kind))
                apply_from(job, &job.x, &g, n, n + rows, c, c + width, i, i + length, kind)
                i += length
            c += width
        n += rows


cdef inline void apply_box(const Job* job, const View* x, const View* dy, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1,
                           Py_ssize_t i0, Py_ssize_t i1, real* kind, applied* how) noexcept nogil:
    cdef int paired = paired_of(how)
    cdef Py_ssize_t n, rows, head = 0, width = c1 - c0, stride = coefficient_stride(job.columns), dy_stride = 0
    cdef const real* coefficients = <const real*>job.coefficients + c0
    cdef const real* x_at
    cdef const real* dy_at = NULL
    cdef real* y_at
    if job.inner == 1:
        x_at = element(x, n0, c0, 0, kind)
        y_at = <real*>element(&job.y, n0, c0, 0, kind)
        if paired:
            dy_at = element(dy, n0, c0, 0, kind)
            dy_stride = dy.outer_stride
        rows = n1 - n0
        if width == job.columns and width % LANES == 0 and x.outer_stride == width and job.y.outer_stride == width \
                and (not paired or dy_stride == width):
            # One stretch of memory: rows may begin anywhere, so let them begin on cache lines, the coefficients going round.
            head = to_cache_line(y_at)
        if head:
            transform_columns(job, x_at, 0, dy_at, 0, y_at, 0, 1, head, coefficients, stride, how, <Cached*>NULL)
            x_at += head
            y_at += head
            coefficients += head
            if paired:
                dy_at += head
            rows -= 1
        # Rows that don't all begin on a 16-byte boundary can't be streamed.
        if job.stream and (<size_t>y_at | <size_t>(job.y.outer_stride * sizeof(real)) | <size_t>(width * sizeof(real))) % 16 == 0:
            transform_columns(job, x_at, x.outer_stride, dy_at, dy_stride, y_at, job.y.outer_stride, rows, width, coefficients, stride, how,
                              <Streamed*>NULL)
        else:
            transform_columns(job, x_at, x.outer_stride, dy_at, dy_stride, y_at, job.y.outer_stride, rows, width, coefficients, stride, how,
                              <Cached*>NULL)
        if head:
            transform_columns(job, x_at + rows * width, 0, dy_at + rows * width if paired else dy_at, 0, y_at + rows * width, 0, 1, width - head,
                              coefficients, stride, how, <Cached*>NULL)
    elif paired <= PAIRED and n1 - n0 >= REGISTERED and job.inner == x.channel_stride == job.y.channel_stride \
            and (not paired or dy.channel_stride == job.inner):
        transform_planes(job, element(x, n0, c0, 0, kind), x.outer_stride, element(dy, n0, c0, 0, kind) if paired else NULL, dy.outer_stride,
                         <real*>element(&job.y, n0, c0, 0, kind), job.y.outer_stride, n1 - n0, width, coefficients, stride, how)
    else:
        for n in range(n0, n1):
            x_at = element(x, n, c0, i0, kind)
            y_at = <real*>element(&job.y, n, c0, i0, kind)
            if paired:
                dy_at = element(dy, n, c0, i0, kind)
                dy_stride = dy.channel_stride
            if job.stream and i1 - i0 >= STREAM_LENGTH:
                transform_channels(job, x_at, x.channel_stride, dy_at, dy_stride, y_at, job.y.channel_stride, width, i1 - i0, coefficients,
                                   stride, how, <Streamed*>NULL)
            else:
                transform_channels(job, x_at, x.channel_stride, dy_at, dy_stride, y_at, job.y.channel_stride, width, i1 - i0, coefficients,
                                   stride, how, <Cached*>NULL)


cdef inline void expect_coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t c1, bint to_write, const real* kind) noexcept nogil:
    """Fetch the columns' coefficients, all at once: other cores have them, from where they take 100 ns one after the other."""
    cdef Py_ssize_t array
    cdef const real* of_array = <const real*>job.coefficients + c0
    if job.threads == 1 or job.inner != 1:
        return
    for array in range(COEFFICIENTS if job.apply == BACKWARD else GATES):
        if to_write:
            prefetch_output(of_array, (c1 - c0) * sizeof(real))
        else:
            prefetch_input(of_array, (c1 - c0) * sizeof(real))
        of_array += coefficient_stride(job.columns)


cdef inline void before_apply(const Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """All but the apply pass for the channels c0 to c1, which are columns."""
    cdef Py_ssize_t k
    if job.reduction == GRADIENTS and job.fusion:
        prepare_gradients(job, c0, c1, kind)
    for k in range(job.chunks if job.reduction else 0):
        reduce(job, k, c0, c1 - c0, kind)
    conclude(job, c0, c1, kind)


cdef inline void channel_phase(const Job* job, int phase, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are groups of channels: all that is to be done for each, while it is in cache, or all but the apply pass."""
    cdef Py_ssize_t item, n, c0, c1
    for item in range(begin, end):
        c0 = group_begin(job, 0, job.columns, item)
        c1 = group_begin(job, 0, job.columns, item + 1)
        if phase == BEFORE_APPLY:
            expect_coefficients(job, c0, c1, True, kind)
        before_apply(job, c0, c1, kind)
        if phase == BEFORE_APPLY or not job.apply:
            continue
        if job.inner == 1 or job.inner < ALIGN_LENGTH and job.inner % LANES and job.rows >= REGISTERED:
            apply(job, 0, job.rows, c0, c1, 0, job.inner, kind)
        else:
            # From the end: what was read last is most likely still in cache.
            for n in range(job.rows - 1, -1, -1):
                apply(job, n, n + 1, c0, c1, 0, job.inner, kind)
    stream_fence()


cdef inline void reduce_phase(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are chunks x groups of the columns c0 to c1."""
    cdef Py_ssize_t item, c, groups = groups_of(job, c0, c1)
    for item in range(begin, end):
        c = group_begin(job, c0, c1, item % groups)
        reduce(job, item // groups, c, group_begin(job, c0, c1, item % groups + 1) - c, kind)


cdef inline void apply_phase(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    """Items are rows (column layout), or planes or pieces of planes (row layout), of the columns c0 to c1, in the order of memory.

    They are taken from the end: what a reduction has just read last is most likely still in cache.
    """
    cdef Py_ssize_t item = end, n, c, count, i0, width = c1 - c0
    if job.inner == 1:
        if job.tail and end == job.rows:
            apply(job, end, end + 1, 0, job.tail, 0, 1, kind)
        count = max(1, RECENT // job.columns) if job.far and job.reduction and not job.stream else end - begin
        while item > begin:
            n = max(begin, item - count)
            apply(job, n, item, c0, c1, 0, 1, kind)
            item = n
    while job.inner != 1 and item > begin:
        n = (item - 1) // (width * job.pieces)
        c = (item - 1) // job.pieces - n * width
        if job.pieces == 1:
            count = min(c + 1, item - begin)
            apply(job, n, n + 1, c0 + c + 1 - count, c0 + c + 1, 0, job.inner, kind)
            item -= count
        else:
            i0 = (item - 1) % job.pieces * job.piece
            apply(job, n, n + 1, c0 + c, c0 + c + 1, i0, min(i0 + job.piece, job.inner), kind)
            item -= 1
    stream_fence()


cdef inline void work(const Job* job, int phase, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t begin, Py_ssize_t end, real* kind) noexcept nogil:
    if phase == CHANNELS or phase == BEFORE_APPLY:
        channel_phase(job, phase, begin, end, kind)
    elif phase == PREPARE:
        prepare_gradients(job, c0 + begin, c0 + end, kind)
    elif phase == REDUCE:
        reduce_phase(job, c0, c1, begin, end, kind)
    elif phase == CONCLUDE:
        expect_coefficients(job, c0 + begin, c0 + end, True, kind)
        conclude(job, c0 + begin, c0 + end, kind)
    else:
        if phase == ALONE:
            conclude(job, 0, job.channels, kind)
        else:
            expect_coefficients(job, c0, c1, False, kind)
        apply_phase(job, c0, c1, begin, end, kind)


cdef void use_copies(Job* job, Py_ssize_t i) noexcept nogil:
    """Let share i have its part of the copies' memory, in which the distance from array to array is fixed."""
    cdef Py_ssize_t itemsize = 4 if job.dtype == FLOAT32 else 8
    job.copies = <char*>job.copies + i * ARRAYS * COPIED * itemsize
    if copied(job, OF_RESIDUAL):
        job.residual = (OF_RESIDUAL - OF_X) * COPIED * itemsize
    if copied(job, OF_RESIDUAL_GRAD):
        job.residual_grad = (OF_RESIDUAL_GRAD - OF_Y) * COPIED * itemsize


cdef void share(const Job* shared, int phase, Py_ssize_t window, Py_ssize_t i) noexcept nogil:
    """Share i of job.threads of a phase's items: each thread the same share every time."""
    cdef unsigned long caller_mode = default_float_mode()
    cdef Job job = shared[0]
    cdef bint timed = i == 0 and job.serial_seconds != NULL     # the calling thread takes the first share
    cdef double start = seconds() if timed else 0
    cdef Py_ssize_t items, begin, end, c0 = window * job.window, c1 = min(c0 + job.window, job.columns)
    if phase == CHANNELS or phase == BEFORE_APPLY:
        items = groups_of(&job, 0, job.columns)
    elif phase == REDUCE:
        items = job.chunks * groups_of(&job, c0, c1)
    elif phase == PREPARE or phase == CONCLUDE:
        items = min(c1, job.channels) - c0
    elif job.inner == 1:
        items = job.rows
    else:
        items = job.rows * (c1 - c0) * job.pieces
    begin = ceil_div(items * i, job.threads)       # the first share is never empty
    end = ceil_div(items * (i + 1), job.threads)
    if phase == ALONE or phase == CHANNELS:
        # Coefficients of its own for each thread: made twice sooner than fetched from another core, with which it shares no cache line.
        job.coefficients = <char*>job.coefficients + i * (COEFFICIENTS + GATES) * coefficient_stride(job.columns) * (4 if job.dtype == FLOAT32 else 8)
    if job.places != NULL:
        use_copies(&job, i)
    if begin < end and job.dtype == FLOAT32:
        work(&job, phase, c0, c1, begin, end, <float*>NULL)
    elif begin < end:
        work(&job, phase, c0, c1, begin, end, <double*>NULL)
    if timed and begin < end:
        job.serial_seconds[0] += (seconds() - start) * items / (end - begin)
    restore_float_mode(caller_mode)


cdef void walk_phases(const Job* job, Py_ssize_t thread) noexcept nogil:
    """What one thread of a team does of all the phases; the team waits for all its threads between them."""
    cdef Py_ssize_t window, i, windows = 1
    cdef int phase, first, last
    if job.by_channel or not job.reduction:
        first = last = CHANNELS if job.by_channel else ALONE
    else:
        windows = ceil_div(job.columns, job.window)
        first = PREPARE if job.reduction == GRADIENTS and job.fusion else REDUCE
        if job.chunks == 1 and job.fold == 1 and windows == 1:
            first = BEFORE_APPLY
        last = APPLY if job.apply else CONCLUDE
    for window in range(windows):
        phase = first
        while phase <= last:
            if job.threads > 1 and (window > 0 or phase > first):       # of one thread, it would be that of a region around the call
                team_barrier()
            i = thread
            while i < job.threads:
                share(job, phase, window, i)
                i += team_size()
            phase = APPLY if phase == BEFORE_APPLY else phase + 1


cdef void run(const Job* job) noexcept nogil:
    if job.threads == 1:
        walk_phases(job, 0)
    else:
        # No prange: the thread of the last iteration writes its variable to the caller's stack, and waiting for that line takes the caller 0.3 us.
        with parallel(num_threads=job.threads):
            walk_phases(job, threadid())


cdef Table table = Table(run=run)
capsule = PyCapsule_New(&table, "cbn.kernels.Table", NULL)
