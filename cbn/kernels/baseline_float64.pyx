# The kernels for float64 elements at the CPU level "baseline".
include "kernel.pxi"
