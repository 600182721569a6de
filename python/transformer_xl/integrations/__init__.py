"""Other people's modules, computed by the kernels: same parameters, same calls."""

from transformer_xl.integrations.adaptive_log_softmax import (
    AdaptiveLogSoftmaxWithLoss,
    from_fairseq,
)
from transformer_xl.integrations.patching import patch, patched, report, unpatch
from transformer_xl.integrations.projected_adaptive_softmax import (
    ProjectedAdaptiveLogSoftmax,
    from_hugging_face,
    from_original,
)
from transformer_xl.integrations.report import Entry, Report

__all__ = [
    "AdaptiveLogSoftmaxWithLoss",
    "Entry",
    "ProjectedAdaptiveLogSoftmax",
    "Report",
    "from_fairseq",
    "from_hugging_face",
    "from_original",
    "patch",
    "patched",
    "report",
    "unpatch",
]
