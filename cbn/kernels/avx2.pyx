# The kernels for the CPU level "avx2": see body.pxi.
include "body.pxi"
