from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

class BatchStats(NamedTuple):
    count: int  # type: ignore[assignment]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    def merge(self, other: BatchStats) -> BatchStats: ...
    @property
    def unbiased_var(self) -> NDArray[np.float64]: ...

def merged(counts: NDArray[np.float64], means: NDArray[np.float64], variances: NDArray[np.float64]) -> BatchStats: ...

class GradientSums(NamedTuple):
    dy: NDArray[np.float64]
    dy_xhat: NDArray[np.float64]
    def merge(self, other: GradientSums) -> GradientSums: ...
