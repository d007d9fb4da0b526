# The kernels for the CPU level "baseline": see body.pxi.
include "body.pxi"
