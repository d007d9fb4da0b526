# The kernels for bfloat16 elements at the CPU level "avx512".
include "kernel.pxi"
