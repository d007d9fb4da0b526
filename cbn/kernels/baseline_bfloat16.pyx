# The kernels for bfloat16 elements at the CPU level "baseline".
include "kernel.pxi"
