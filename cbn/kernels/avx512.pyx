# The kernels for the CPU level "avx512": see body.pxi.
include "body.pxi"
