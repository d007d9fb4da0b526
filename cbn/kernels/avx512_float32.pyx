# The kernels for float32 elements at the CPU level "avx512".
include "kernel.pxi"
