"""The schemas of the custom operators, without their names.

CMakeLists.txt writes a hash of this file into the build record: a library that was built for other
schemas would end the process when it is loaded, so it is not loaded.
"""

from __future__ import annotations

# Arguments that the schemas of several operators contain.
ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor r, Tensor[] optional, SymInt[] rules, float[] numbers"
)
LOSS = "Tensor hidden, Tensor target, Tensor[] clusters, int ignore_index"
EMBEDDING = "Tensor tokens, Tensor[] tables, Tensor[] projections, float scale, bool sparse"

SCHEMAS = {
    "rel_attention_fwd": f"({ATTENTION}) -> (Tensor out, Tensor lse)",
    "rel_attention_bwd": (
        f"(Tensor dout, Tensor dlse, {ATTENTION}, Tensor out, Tensor lse, bool[] needs_grad) "
        "-> Tensor[]"
    ),
    "rel_shift_fwd": "(Tensor x, SymInt n_keys, SymInt offset) -> Tensor",
    "rel_shift_bwd": "(Tensor dout, SymInt n_rows, SymInt offset) -> Tensor",
    "adaptive_nll_fwd": f"({LOSS}) -> (Tensor nll, Tensor lse)",
    "adaptive_nll_bwd": (
        f"(Tensor dnll, {LOSS}, Tensor lse, bool[] needs_grad) "
        "-> (Tensor dhidden, Tensor[] dclusters)"
    ),
    "adaptive_loss_fwd": (
        f"({LOSS}, bool mean, bool[] needs_grad) -> (Tensor loss, Tensor[] grads)"
    ),
    "adaptive_loss_bwd": "(Tensor dloss, Tensor(a!)[] grads) -> ()",
    "adaptive_embedding_fwd": f"({EMBEDDING}) -> Tensor",
    "adaptive_embedding_bwd": (
        f"(Tensor dout, {EMBEDDING}, bool[] needs_grad) "
        "-> (Tensor rows, Tensor[] dtables, Tensor[] dprojections)"
    ),
    "few_row_linear_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_scale) -> Tensor"
    ),
}
