"""Loads the kernel where txl_kernels cannot be imported, and compares it with the formula.

Arguments: the folder of the kernel; "kernels" to load it with that package.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.abc import MetaPathFinder
from pathlib import Path

import torch
from loader import formula, inputs, load_variant, load_with_kernels, outputs_and_gradients


class _Blocked(MetaPathFinder):
    def find_spec(self, fullname, *_):
        if fullname.partition(".")[0] in ("txl_kernels", "transformer_xl", "tools"):
            raise ImportError(f"{fullname} is blocked")


sys.meta_path.insert(0, _Blocked())
root = Path(sys.argv[1])
if sys.argv[2:] == ["kernels"]:
    kernel = load_with_kernels(root)
else:
    kernel = load_variant(root / "build" / "torch-cpu")

tensors = inputs(torch.float64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    actual = outputs_and_gradients(kernel.rel_attention, tensors, causal=True)
expected = outputs_and_gradients(formula, tensors)
torch.testing.assert_close(actual, expected)

layer = torch.nn.AdaptiveLogSoftmaxWithLoss(16, 100, [10, 40])
hidden, target = torch.randn(30, 16), torch.randint(0, 100, (30,))
for x, y in ((hidden, target), (hidden[0], target[0])):
    own = kernel.layers.AdaptiveLogSoftmaxWithLoss.forward(layer, x, y)
    torch.testing.assert_close(own, layer(x, y))

print(
    json.dumps(
        {
            "name": kernel.__name__,
            "names": kernel.__all__,
            "warnings": [str(x.message) for x in caught],
            "origins": [Path(x.filename).name for x in caught],
            "native": kernel.resolve("rel_attention", backend="native", device="cpu").reason,
            "operators": [x for x in torch._C._dispatch_get_all_op_names() if "txl_" in x],
        }
    )
)
