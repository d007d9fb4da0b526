# The kernels for float16 elements at the CPU level "avx2".
include "kernel.pxi"
