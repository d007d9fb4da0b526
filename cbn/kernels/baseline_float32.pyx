# The kernels for float32 elements at the CPU level "baseline".
include "kernel.pxi"
