"""Other people's modules, computed by the kernels: same parameters, same calls."""

from transformer_xl.integrations.adaptive_log_softmax import (
    AdaptiveLogSoftmaxWithLoss,
    from_fairseq,
)
from transformer_xl.integrations.projected_adaptive_softmax import (
    ProjectedAdaptiveLogSoftmax,
    from_hugging_face,
    from_original,
)

__all__ = [
    "AdaptiveLogSoftmaxWithLoss",
    "ProjectedAdaptiveLogSoftmax",
    "from_fairseq",
    "from_hugging_face",
    "from_original",
]
