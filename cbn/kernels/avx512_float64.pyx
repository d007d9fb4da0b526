# The kernels for float64 elements at the CPU level "avx512".
include "kernel.pxi"
