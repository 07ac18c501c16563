"""Fake quantizers, primarily NIPQ, and the conversion of a float model into one that uses them.

Start reading in `insertion/prepare.py`. The packages, from the lowest to the highest, are
`numerics` (pure functions), `kernels` (fast implementations of these functions), `quantizers`
(modules), `tracing` (finding every multiplication in a model), `insertion` (placing quantizers in
a model) and `tools` (operations on a prepared model). From the rest of the project, this layer
imports only `errors` and `registry`; it requires only torch and numpy.
"""

from nipq_search.quant.quantizers.base import QUANTIZERS, FakeQuantizer
from nipq_search.quant.quantizers.diffq import DiffQ
from nipq_search.quant.quantizers.lsq import LSQ
from nipq_search.quant.quantizers.nipq import NIPQ

QUANTIZERS.register("nipq", NIPQ)
QUANTIZERS.register("lsq", LSQ)
QUANTIZERS.register("diffq", DiffQ)

from nipq_search.quant.config import (  # noqa: E402
    ActivationConfig,
    ActivationStart,
    Granularity,
    Proxy,
    QuantConfig,
    Start,
    WeightConfig,
)
from nipq_search.quant.insertion.prepare import prepare, quantizers, unwrap  # noqa: E402
from nipq_search.quant.tools.bit_config import apply_bit_config, bit_config  # noqa: E402
from nipq_search.quant.tools.norm import reestimate_norm_stats  # noqa: E402
from nipq_search.quant.tools.param_groups import param_groups  # noqa: E402

__all__ = [
    "DiffQ",
    "LSQ",
    "NIPQ",
    "QUANTIZERS",
    "ActivationConfig",
    "ActivationStart",
    "FakeQuantizer",
    "Granularity",
    "Proxy",
    "QuantConfig",
    "Start",
    "WeightConfig",
    "apply_bit_config",
    "bit_config",
    "param_groups",
    "prepare",
    "quantizers",
    "reestimate_norm_stats",
    "unwrap",
]
