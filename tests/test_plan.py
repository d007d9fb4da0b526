"""The plan, as functional.plan_of tells it: from the shape alone where it fixes bits, and covering all that there is."""

import numpy as np
import pytest

from cbn.functional import plan_of

OF_BITS = "layout", "rows", "columns", "length", "copies", "fold", "tail", "chunks", "chunk_rows", "chunk_length"
SHAPES = [((2, 3, 5, 7), 1), ((1, 64, 15), 1), ((1, 64, 16), 1), ((4, 8, 3, 3), 1), ((40, 10), 1), ((70_000, 3), -1), ((1, 1, 200_000), 1), ((300, 2, 130), 1),
          ((2, 600, 600, 1), 1), ((5, 7, 9, 64), -1), ((32, 2048, 7, 7), 1)]  # fmt: skip


@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
@pytest.mark.parametrize("operation", ["inference", "training", "backward"])
def test_plan(shape, axis, operation):
    plans = [plan_of(shape, dtype, axis, threads, operation) for dtype in (np.float32, np.float64) for threads in (1, 2, 7)]
    for plan in plans:
        assert {name: plan[name] for name in OF_BITS} == {name: plans[0][name] for name in OF_BITS}
        assert plan["rows"] * plan["columns"] * plan["length"] + plan["tail"] == np.prod(shape)
        assert plan["columns"] == shape[axis] * plan["copies"]
        assert 1 <= plan["group"] <= 512 and plan["window"] >= 1
        assert (plan["pieces"] - 1) * plan["piece"] < plan["length"] or plan["pieces"] == 1
        along = max(1, plan["length"] // plan["chunk_length"])
        assert plan["chunks"] == -(-plan["rows"] // plan["chunk_rows"]) * along


def test_borders():
    assert plan_of((4, 5, 15))["layout"] == "columns" and plan_of((4, 5, 16))["layout"] == "rows"
    assert plan_of((511, 3))["fold"] == 1 and plan_of((512, 3))["fold"] == 64
    assert plan_of((1, 1, 16_384))["chunks"] == 1 and plan_of((1, 1, 40_000))["chunks"] > 1
