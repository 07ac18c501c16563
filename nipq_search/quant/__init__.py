"""NIPQ and other fake quantizers, and the conversion of any model to use them.

Start reading in `insertion/prepare.py`. Folders, from the bottom to the top: `numerics` (the
mathematics), `kernels` (the same, faster), `quantizers`, `tracing` (what a model computes),
`insertion` (where quantizers go), `tools`. Imports no other layer, and needs torch alone.
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
from nipq_search.quant.insertion.prepare import param_groups, prepare, quantizers, unwrap  # noqa: E402
from nipq_search.quant.tools.bit_config import apply_bit_config, bit_config  # noqa: E402
from nipq_search.quant.tools.norm import reestimate_norm_stats  # noqa: E402

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
