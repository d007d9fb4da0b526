# The kernels for float16 elements at the CPU level "baseline".
include "kernel.pxi"
