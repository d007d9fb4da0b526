# The kernels for bfloat16 elements at the CPU level "avx2".
include "kernel.pxi"
