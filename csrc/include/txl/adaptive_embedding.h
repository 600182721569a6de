// Adaptive embedding on the CPU: the lookups of one table, and the products of its projection.
#pragma once

#include <cstdint>

#include "txl/tensor.h"

namespace txl {

// Rows of operands are gathered in tiles; a product's columns are divided into panels, and one task
// packs the right-hand matrix of a panel and keeps it in its core's cache.
constexpr int64_t kRunTile = 32, kPanelColumns = 128;

// The lookups of one table, equal tokens as one run: a run's row is read and projected once, and
// its tokens' gradients are summed before any product.
struct EmbeddingRuns {
  int64_t n = 0;                   // runs
  const int64_t* row = nullptr;    // [n], ascending: the table's row
  const int64_t* begin = nullptr;  // [n + 1]: run r has tokens place[begin[r]] … place[begin[r+1]]
  const int64_t* place = nullptr;  // positions of the tokens in `out` or `dout`

  // In steps, because runs are an inner dimension: each size of it is a micro-kernel to compile.
  int64_t padded() const {
    const int64_t step = n <= 4 * kRunTile ? kRunTile : 4 * kRunTile;
    return (n + step - 1) / step * step;
  }
  int64_t tiles() const { return padded() / kRunTile; }
};

struct EmbeddingArgs {
  EmbeddingRuns runs;
  int64_t d = 0, width = 0;          // of an embedded token, of a row of the table
  const void* table = nullptr;       // [V, width]; every array is contiguous
  const void* projection = nullptr;  // [d, width]; null = none, and d = width
  double scale = 1;
};

// Null = not requested.
struct EmbeddingGrads {
  const void* dout = nullptr;   // [N, d]
  void* dtable = nullptr;       // [V, width] with zeros, or [n, width] where `by_run`
  bool by_run = false;          // run r's gradient is row r, not its table's row
  void* dprojection = nullptr;  // [d, width]
};

// How a product [rows, columns] is divided among tasks: each has one panel of columns and one share
// of the rows. Results do not depend on it.
struct PanelPlan {
  int64_t rows = 0, columns = 0;
  int64_t panel = 0, n_panels = 0, n_shares = 0;

  PanelPlan(int64_t rows, int64_t columns, int64_t threads);
  int64_t tasks() const { return n_panels * n_shares; }
};

// One dtype's kernels. `shared` and `slot` are memory of the sizes that the first two return,
// 64-byte aligned; calls that run at the same time have different slots. Without a projection:
// `copy` for tokens [first, last) of the runs, `sum` for runs [first, last). With one: `gather` for
// every tile of runs, then `project` for every task; `gather_gradients` for every tile, then
// `table_gradient` and `projection_gradient` for every task of their plans.
struct EmbeddingKernels {
  int64_t (*shared_bytes)(const EmbeddingArgs&, const EmbeddingGrads*);
  int64_t (*slot_bytes)(const EmbeddingArgs&, const EmbeddingGrads*);
  void (*copy)(const EmbeddingArgs&, void* out, int64_t first, int64_t last);
  void (*sum)(const EmbeddingArgs&, const EmbeddingGrads&, int64_t first, int64_t last);
  void (*gather)(const EmbeddingArgs&, int64_t tile, char* shared);
  void (*project)(const EmbeddingArgs&, const PanelPlan&, void* out, int64_t task, char* shared,
                  char* slot);
  void (*gather_gradients)(const EmbeddingArgs&, const EmbeddingGrads&, int64_t tile, char* shared,
                           char* slot);
  void (*table_gradient)(const EmbeddingArgs&, const EmbeddingGrads&, const PanelPlan&,
                         int64_t task, char* shared, char* slot);
  void (*projection_gradient)(const EmbeddingArgs&, const EmbeddingGrads&, const PanelPlan&,
                              int64_t task, char* shared, char* slot);
};

const EmbeddingKernels& adaptive_embedding_kernels(Scalar dtype);

}  // namespace txl
