"""Documents of a tiny sweep, in the format of the search layer."""

from __future__ import annotations

POINT = {
    "trial": 3,
    "on_front": True,
    "budget": {"bops": 5.3e9},
    "budget_label": "bops: uniform 4",
    "cost": {
        "bops": 5.25e9,
        "weight_bytes": 24_000,
        "activation_sum_bytes": 9000,
        "activation_largest_bytes": 1000,
        "mean_weight_bits": 3.5,
        "mean_activation_bits": 4.25,
    },
    "validation": 0.91234,
    "test": None,
    "samples": 1000,
    "seconds": 12.5,
    "parent": None,
}
FRONT = {
    "schema": 1,
    "sweep": "tiny",
    "metric": {"name": "accuracy", "mode": "max"},
    "bops_convention": 1,
    "front_cost": "bops",
    "hypervolume": 0.5,
    "test_hypervolume": None,
    "reference": {},
    "total_samples": 12_000,
    "float": {"validation": 0.95, "test": 0.94, "cost": {"bops": 3e11}},
    "points": [POINT, {**POINT, "trial": 4, "on_front": False, "validation": 0.5}],
    "baselines": [{"bits": 4, "validation": 0.9, "test": None, "cost": {"bops": 5.3e9}}],
}
LAYER = {
    "name": "stem",
    "kind": "Conv2d",
    "macs": 1_000_000,
    "weight_bits": 4,
    "activation_bits": None,
    "bops": 4e6,
    "weight_bytes": 1200.5,
}
DIFFERENCE = {"name": "steps", "recorded": 99, "replayed": 100}
FREED = {"trial": 1, "path": "trials/1/model.pt", "bytes": 54_321}
