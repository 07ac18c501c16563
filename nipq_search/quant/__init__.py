"""NIPQ and its rivals as fake quantizers, and the conversion of models. Needs torch alone."""

from nipq_search.quant.diffq import DiffQ
from nipq_search.quant.lsq import LSQ
from nipq_search.quant.nipq import NIPQ
from nipq_search.quant.quantizer import QUANTIZERS, FakeQuantizer, register

register("nipq", NIPQ)
register("lsq", LSQ)
register("diffq", DiffQ)

from nipq_search.quant.bit_config import apply_bit_config, bit_config  # noqa: E402
from nipq_search.quant.config import (  # noqa: E402
    ActivationConfig,
    ActivationStart,
    Granularity,
    Proxy,
    QuantConfig,
    Start,
    WeightConfig,
)
from nipq_search.quant.norm import reestimate_norm_stats  # noqa: E402
from nipq_search.quant.prepare import param_groups, prepare, quantizers, unwrap  # noqa: E402

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
    "register",
    "reestimate_norm_stats",
    "unwrap",
]
