// ATen bindings of the adaptive embedding on the CPU: tokens to runs, outputs, threads.
#include "txl/adaptive_embedding.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <bit>
#include <optional>

#include "arguments.h"
#include "fresh_zeros.h"
#include "product.h"
#include "workspace.h"

namespace txl {
namespace {

using at::Tensor;

struct Lookup {
  int64_t token, place;
};

// Stable radix sort by token, least significant digit first.
void sort_by_token(std::vector<Lookup>& lookups, int64_t n_tokens) {
  constexpr int kMostBits = 11;
  const int bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(n_tokens - 1, 1)));
  const int passes = (bits + kMostBits - 1) / kMostBits, digit = (bits + passes - 1) / passes;
  const int64_t mask = (int64_t{1} << digit) - 1;
  std::vector<Lookup> other(lookups.size());
  for (int pass = 0; pass < passes; ++pass) {
    auto digit_of = [&](const Lookup& x) {
      return static_cast<size_t>(x.token >> (pass * digit) & mask);
    };
    std::vector<int64_t> next(static_cast<size_t>(mask) + 2, 0);
    for (const Lookup& x : lookups) ++next[digit_of(x) + 1];
    for (size_t value = 1; value < next.size(); ++value) next[value] += next[value - 1];
    for (const Lookup& x : lookups) other[static_cast<size_t>(next[digit_of(x)]++)] = x;
    lookups.swap(other);
  }
}

// The lookups of all tables, in ascending order of token; equal tokens keep their order.
class Lookups {
 public:
  Lookups(const Tensor& tokens, at::TensorList tables) : first_run_{0} {
    std::vector<int64_t> end;
    for (const Tensor& table : tables)
      end.push_back((end.empty() ? 0 : end.back()) + table.size(0));
    const Tensor given = tokens.contiguous();
    const auto* token = given.const_data_ptr<int64_t>();
    const int64_t N = tokens.numel();
    std::vector<Lookup> lookups(static_cast<size_t>(N));
    for (int64_t i = 0; i < N; ++i) {
      TORCH_CHECK_INDEX(token[i] >= 0 && token[i] < end.back(),
                        "adaptive_embedding: tokens must be in [0, ", end.back(), "), got ",
                        token[i]);
      lookups[static_cast<size_t>(i)] = {token[i], i};
    }
    sort_by_token(lookups, end.back());
    place_.reserve(lookups.size());
    size_t k = 0;
    int64_t before = -1;
    for (const Lookup& x : lookups) {
      if (x.token != before) {
        for (; x.token >= end[k]; ++k) first_run_.push_back(n_runs());
        begin_.push_back(static_cast<int64_t>(place_.size()));
        row_.push_back(x.token - (k > 0 ? end[k - 1] : 0));
        before = x.token;
      }
      place_.push_back(x.place);
    }
    first_run_.resize(tables.size() + 1, n_runs());
    begin_.push_back(N);
  }

  EmbeddingRuns of(size_t k) const {
    const auto first = static_cast<size_t>(first_run_[k]);
    return {first_run_[k + 1] - first_run_[k], row_.data() + first, begin_.data() + first,
            place_.data()};
  }

 private:
  int64_t n_runs() const { return static_cast<int64_t>(row_.size()); }

  std::vector<int64_t> first_run_, row_, begin_, place_;
};

// Calls f(task, slot) for every task; calls with the same slot never run at the same time.
template <typename F>
void over(int64_t tasks, int64_t threads, F&& f) {
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, 0);
  } else {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task, at::get_thread_num());
    });
  }
}

int64_t embedded_width(at::TensorList tables, at::TensorList projections) {
  return present(projections[0]) ? projections[0].size(0) : tables[0].size(1);
}

// One table's call: contiguous tensors and the arguments of its kernels.
struct TableCall {
  const EmbeddingKernels& kernels;
  Tensor table, projection;  // the latter undefined where absent
  EmbeddingArgs args;
  int64_t threads;

  TableCall(const Tensor& table_, const Tensor& projection_, const EmbeddingRuns& runs, int64_t d,
            double scale)
      : kernels(adaptive_embedding_kernels(scalar_of("adaptive_embedding", "tables", table_))),
        table(table_.contiguous()) {
    TORCH_CHECK_TYPE(!present(projection_) || projection_.scalar_type() == table.scalar_type(),
                     "adaptive_embedding: tables and projections must share a dtype, got ",
                     table.scalar_type(), " and ", projection_.scalar_type());
    if (present(projection_)) projection = projection_.contiguous();
    args = {runs, d, table.size(1), table.const_data_ptr(), nullptr, scale};
    if (projection.defined()) args.projection = projection.const_data_ptr();
    const double rows = projection.defined() ? static_cast<double>(runs.n * args.width)
                                             : static_cast<double>(n_tokens());
    const bool small = rows * static_cast<double>(d) < 5e4;
    threads = at::in_parallel_region() || small ? 1 : at::get_num_threads();
  }

  // Nothing to look up, or rows without columns, whose output and gradients are zeros.
  bool is_empty() const { return args.runs.n == 0 || args.d == 0 || args.width == 0; }

  int64_t n_tokens() const { return args.runs.begin[args.runs.n] - args.runs.begin[0]; }

  int64_t shared_bytes(const EmbeddingGrads* grads) const {
    return round_to_page(kernels.shared_bytes(args, grads));
  }
  int64_t slot_bytes(const EmbeddingGrads* grads) const {
    return round_to_page(kernels.slot_bytes(args, grads));
  }
  int64_t bytes(const EmbeddingGrads* grads) const {
    if (!projection.defined() || is_empty()) return 0;
    return shared_bytes(grads) + threads * slot_bytes(grads);
  }

  // The first run at or after this share of the tokens.
  int64_t run_of_share(int64_t share) const {
    const int64_t *begin = args.runs.begin, *end = begin + args.runs.n;
    return std::lower_bound(begin, end, begin[0] + n_tokens() * share / threads) - begin;
  }

  void embed(void* out, char* memory) const {
    if (!projection.defined()) {
      const int64_t first = args.runs.begin[0], n = n_tokens();
      over(threads, threads, [&](int64_t share, int64_t) {
        kernels.copy(args, out, first + n * share / threads, first + n * (share + 1) / threads);
      });
      return;
    }
    const PanelPlan plan(args.runs.n, args.d, threads);
    char* slots = memory + shared_bytes(nullptr);
    over(args.runs.tiles(), threads,
         [&](int64_t tile, int64_t) { kernels.gather(args, tile, memory); });
    over(plan.tasks(), threads, [&](int64_t task, int64_t slot) {
      kernels.project(args, plan, out, task, memory, slots + slot * slot_bytes(nullptr));
    });
  }

  void gradients(const EmbeddingGrads& grads, char* memory) const {
    if (!projection.defined()) {
      over(threads, threads, [&](int64_t share, int64_t) {
        kernels.sum(args, grads, run_of_share(share), run_of_share(share + 1));
      });
      return;
    }
    char* slots = memory + shared_bytes(&grads);
    auto slot_of = [&](int64_t slot) { return slots + slot * slot_bytes(&grads); };
    over(args.runs.tiles(), threads, [&](int64_t tile, int64_t slot) {
      kernels.gather_gradients(args, grads, tile, memory, slot_of(slot));
    });
    if (grads.dtable != nullptr) {
      const PanelPlan plan(args.runs.n, args.width, threads);
      over(plan.tasks(), threads, [&](int64_t task, int64_t slot) {
        kernels.table_gradient(args, grads, plan, task, memory, slot_of(slot));
      });
    }
    if (grads.dprojection != nullptr) {
      const PanelPlan plan(args.d, args.width, threads);
      over(plan.tasks(), threads, [&](int64_t task, int64_t slot) {
        kernels.projection_gradient(args, grads, plan, task, memory, slot_of(slot));
      });
    }
  }
};

std::vector<TableCall> calls_of(const Lookups& lookups, at::TensorList tables,
                                at::TensorList projections, double scale) {
  const char* missing = gemm_unavailable_reason();
  TORCH_CHECK(missing == nullptr,
              "adaptive_embedding: the native backend cannot run here: ", missing);
  const int64_t d = embedded_width(tables, projections);
  std::vector<TableCall> calls;
  for (size_t k = 0; k < tables.size(); ++k)
    calls.emplace_back(tables[k], projections[k], lookups.of(k), d, scale);
  return calls;
}

Tensor adaptive_embedding_fwd(const Tensor& tokens, at::TensorList tables,
                              at::TensorList projections, double scale, bool /*sparse*/) {
  const Lookups lookups(tokens, tables);
  const std::vector<TableCall> calls = calls_of(lookups, tables, projections, scale);
  std::vector<int64_t> shape = tokens.sizes().vec();
  shape.push_back(embedded_width(tables, projections));
  const bool no_width = std::any_of(calls.begin(), calls.end(),
                                    [](const TableCall& call) { return call.args.width == 0; });
  const Tensor out =
      no_width ? at::zeros(shape, tables[0].options()) : at::empty(shape, tables[0].options());
  int64_t bytes = 0;
  for (const TableCall& call : calls) bytes = std::max(bytes, call.bytes(nullptr));
  const Workspace memory(1, bytes);
  for (const TableCall& call : calls)
    if (!call.is_empty()) call.embed(out.data_ptr(), memory.of(0));
  return out;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> adaptive_embedding_bwd(
    const Tensor& dout, const Tensor& tokens, at::TensorList tables, at::TensorList projections,
    double scale, bool sparse, const c10::List<bool>& needs_grad) {
  const Lookups lookups(tokens, tables);
  const std::vector<TableCall> calls = calls_of(lookups, tables, projections, scale);
  const int64_t N = tokens.numel();
  const Tensor dout_rows = dout.to(tables[0].scalar_type()).contiguous();
  const auto n_tables = static_cast<int64_t>(tables.size());
  const Tensor named = at::full({sparse ? n_tables : 0, sparse ? N : 0}, -1, tokens.options());
  std::vector<Tensor> dtables, dprojections;
  std::vector<EmbeddingGrads> grads(tables.size());
  int64_t bytes = 0;
  for (size_t k = 0; k < tables.size(); ++k) {
    const EmbeddingRuns& runs = calls[k].args.runs;
    dtables.push_back(at::empty({0}, tables[k].options()));
    dprojections.push_back(at::empty({0}, tables[k].options()));
    grads[k].dout = dout_rows.const_data_ptr();
    grads[k].by_run = sparse;
    if (needs_grad.get(k)) {
      if (sparse) {
        dtables[k] = at::zeros({runs.n, tables[k].size(1)}, tables[k].options());
        std::copy_n(runs.row, runs.n, named.data_ptr<int64_t>() + static_cast<int64_t>(k) * N);
      } else {
        dtables[k] = fresh_zeros(tables[k].sizes(), tables[k].options());
      }
      grads[k].dtable = dtables[k].data_ptr();
    }
    if (present(projections[k]) && needs_grad.get(tables.size() + k)) {
      dprojections[k] = calls[k].is_empty()
                            ? at::zeros_like(projections[k])
                            : at::empty_like(projections[k], at::MemoryFormat::Contiguous);
      grads[k].dprojection = dprojections[k].data_ptr();
    }
    bytes = std::max(bytes, calls[k].bytes(&grads[k]));
  }
  const Workspace memory(1, bytes);
  for (size_t k = 0; k < tables.size(); ++k) {
    if (calls[k].is_empty()) continue;
    if (grads[k].dtable != nullptr || grads[k].dprojection != nullptr)
      calls[k].gradients(grads[k], memory.of(0));
  }
  return {sparse ? named : at::empty({0}, tokens.options()), dtables, dprojections};
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("adaptive_embedding_fwd", &adaptive_embedding_fwd);
  m.impl("adaptive_embedding_bwd", &adaptive_embedding_bwd);
}

}  // namespace txl
