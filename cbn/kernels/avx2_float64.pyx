# The kernels for float64 elements at the CPU level "avx2".
include "kernel.pxi"
