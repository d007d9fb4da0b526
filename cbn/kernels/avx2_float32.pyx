# The kernels for float32 elements at the CPU level "avx2".
include "kernel.pxi"
