// How a product of the adaptive embedding is divided into panels of columns and shares of rows.
#include <algorithm>

#include "txl/adaptive_embedding.h"

namespace txl {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

PanelPlan::PanelPlan(int64_t rows, int64_t columns, int64_t threads)
    : rows(rows), columns(columns) {
  panel = ceil_div(ceil_div(columns, ceil_div(columns, kPanelColumns)), 16) * 16;
  n_panels = ceil_div(columns, panel);
  // Rows are shared if panels are fewer than threads, or not a multiple of them.
  n_shares =
      n_panels % threads == 0 ? 1 : std::clamp<int64_t>(ceil_div(rows, kRunTile), 1, threads);
}

}  // namespace txl
