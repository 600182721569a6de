// adaptive_embedding on the CPU: tokens to clusters by one counting sort, then rows of each table.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>

#include "product.h"
#include "workspace.h"

namespace txl {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 16;  // rows that are worth a thread

// The tokens of each table: their places, in token order, and their rows.
struct Lookups {
  std::vector<int64_t> first;  // where each table's begin; one more for the end
  Tensor places, rows;         // int64 [N]

  Lookups(const Tensor& tokens, at::TensorList tables) : first(tables.size() + 1, 0) {
    std::vector<int64_t> edges;
    for (const Tensor& table : tables)
      edges.push_back((edges.empty() ? 0 : edges.back()) + table.size(0));
    const Tensor given = tokens.contiguous();
    const auto* token = given.const_data_ptr<int64_t>();
    const int64_t N = tokens.numel();
    auto table_of = [&](int64_t t) {
      return static_cast<size_t>(std::upper_bound(edges.begin(), edges.end(), t) - edges.begin());
    };
    for (int64_t i = 0; i < N; ++i) {
      TORCH_CHECK_INDEX(token[i] >= 0 && token[i] < edges.back(),
                        "adaptive_embedding: tokens must be in [0, ", edges.back(), "), got ",
                        token[i]);
      ++first[table_of(token[i]) + 1];
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    places = at::empty({N}, given.options());
    rows = at::empty({N}, given.options());
    std::vector<int64_t> next(first);
    for (int64_t i = 0; i < N; ++i) {
      const size_t k = table_of(token[i]);
      places.data_ptr<int64_t>()[next[k]] = i;
      rows.data_ptr<int64_t>()[next[k]++] = token[i] - (k > 0 ? edges[k - 1] : 0);
    }
  }

  int64_t size(size_t k) const { return first[k + 1] - first[k]; }
  Tensor places_of(size_t k) const { return places.slice(0, first[k], first[k + 1]); }
  Tensor rows_of(size_t k) const { return rows.slice(0, first[k], first[k + 1]); }
};

// to[to_row[i]] = scale · from[from_row[i]]; null = row i.
void copy_rows(const Tensor& from, const int64_t* from_row, const Tensor& to, const int64_t* to_row,
               int64_t n, double scale) {
  const int64_t d = to.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, to.scalar_type(), "copy_rows", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* source = from.const_data_ptr<scalar_t>();
    auto* target = to.data_ptr<scalar_t>();
    const auto factor = static_cast<acc_t>(scale);
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* src = source + (from_row != nullptr ? from_row[i] : i) * d;
        scalar_t* dst = target + (to_row != nullptr ? to_row[i] : i) * d;
        for (int64_t k = 0; k < d; ++k)
          dst[k] = static_cast<scalar_t>(factor * static_cast<acc_t>(src[k]));
      }
    });
  });
}

int64_t width(at::TensorList tables, at::TensorList projections) {
  return present(projections[0]) ? projections[0].size(0) : tables[0].size(1);
}

Tensor adaptive_embedding_fwd(const Tensor& tokens, at::TensorList tables,
                              at::TensorList projections, double scale, bool /*sparse*/) {
  const Lookups lookups(tokens, tables);
  std::vector<int64_t> shape = tokens.sizes().vec();
  shape.push_back(width(tables, projections));
  const Tensor out = at::empty(shape, tables[0].options());
  const Tensor rows = out.view({-1, shape.back()});
  for (size_t k = 0; k < tables.size(); ++k) {
    const int64_t n = lookups.size(k);
    if (n == 0) continue;
    const Tensor places = lookups.places_of(k), row = lookups.rows_of(k);
    const auto* place = places.const_data_ptr<int64_t>();
    if (present(projections[k])) {
      const Tensor found = tables[k].index_select(0, row);
      const Tensor projected = product(found, projections[k].t()).to(out.scalar_type());
      copy_rows(projected, nullptr, rows, place, n, scale);
    } else {
      copy_rows(tables[k].contiguous(), row.const_data_ptr<int64_t>(), rows, place, n, scale);
    }
  }
  return out;
}

// One table's lookups in order of row, equal rows in token order: runs of what one row's gradient
// sums.
struct Runs {
  std::vector<int64_t> order, begin;  // order[begin[r] … begin[r + 1]) are run r's

  Runs(const int64_t* row, int64_t n) : order(static_cast<size_t>(n)) {
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return row[a] < row[b]; });
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(i);
      if (i == 0 || row[order[at]] != row[order[at - 1]]) begin.push_back(i);
    }
    begin.push_back(n);
  }
  int64_t size() const { return static_cast<int64_t>(begin.size()) - 1; }
};

// to[place(r)] = scale · Σ of run r's rows of `from`; from_row null = row i.
template <typename F>
void sum_runs(const Runs& runs, const Tensor& from, const int64_t* from_row, const Tensor& to,
              double scale, F&& place) {
  const int64_t d = to.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, to.scalar_type(), "sum_runs", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* source = from.const_data_ptr<scalar_t>();
    auto* target = to.data_ptr<scalar_t>();
    const auto factor = static_cast<acc_t>(scale);
    at::parallel_for(0, runs.size(), kGrain, [&](int64_t first, int64_t last) {
      std::vector<acc_t> sum(static_cast<size_t>(d));
      for (int64_t r = first; r < last; ++r) {
        std::fill(sum.begin(), sum.end(), acc_t(0));
        const auto at = static_cast<size_t>(r);
        for (int64_t i = runs.begin[at]; i < runs.begin[at + 1]; ++i) {
          const int64_t lookup = runs.order[static_cast<size_t>(i)];
          const scalar_t* src = source + (from_row != nullptr ? from_row[lookup] : lookup) * d;
          for (int64_t k = 0; k < d; ++k) sum[static_cast<size_t>(k)] += static_cast<acc_t>(src[k]);
        }
        scalar_t* dst = target + place(r) * d;
        for (int64_t k = 0; k < d; ++k)
          dst[k] = static_cast<scalar_t>(factor * sum[static_cast<size_t>(k)]);
      }
    });
  });
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> adaptive_embedding_bwd(
    const Tensor& dout, const Tensor& tokens, at::TensorList tables, at::TensorList projections,
    double scale, bool sparse, const c10::List<bool>& needs_grad) {
  const Lookups lookups(tokens, tables);
  const int64_t N = tokens.numel();
  const Tensor d_rows = dout.reshape({N, width(tables, projections)}).contiguous();
  const auto n_tables = static_cast<int64_t>(tables.size());
  const Tensor named = at::full({sparse ? n_tables : 0, sparse ? N : 0}, -1, tokens.options());
  std::vector<Tensor> dtables, dprojections;
  for (size_t k = 0; k < tables.size(); ++k) {
    const int64_t n = lookups.size(k);
    const Tensor places = lookups.places_of(k), row = lookups.rows_of(k);
    const auto* row_of = row.const_data_ptr<int64_t>();
    const bool projected = present(projections[k]);
    Tensor dtable = at::empty({0}, tables[k].options());
    Tensor dprojection = at::empty({0}, tables[k].options());
    // The gradients of this table's tokens, before the table's own row is found.
    const Tensor own = projected && n > 0 ? d_rows.index_select(0, places) : Tensor();
    if (needs_grad.get(k)) {
      const std::vector<int64_t> shape{sparse ? N : tables[k].size(0), tables[k].size(1)};
      dtable = at::empty(shape, tables[k].options());
      advise_huge_pages(dtable.data_ptr(), static_cast<int64_t>(dtable.nbytes()));
      dtable.zero_();
      const Runs runs(row_of, n);
      auto first_row = [&](int64_t r) {
        return row_of[runs.order[static_cast<size_t>(runs.begin[static_cast<size_t>(r)])]];
      };
      const Tensor from =
          own.defined() ? product(own, projections[k]).to(dtable.scalar_type()) : d_rows;
      const auto* from_row = own.defined() ? nullptr : places.const_data_ptr<int64_t>();
      if (sparse) {
        auto* name = named.data_ptr<int64_t>() + static_cast<int64_t>(k) * N;
        for (int64_t r = 0; r < runs.size(); ++r) name[r] = first_row(r);
        sum_runs(runs, from, from_row, dtable, scale, [](int64_t r) { return r; });
      } else {
        sum_runs(runs, from, from_row, dtable, scale, first_row);
      }
    }
    if (projected && needs_grad.get(tables.size() + k)) {
      dprojection = n == 0 ? at::zeros_like(projections[k])
                           : product(own.t(), tables[k].index_select(0, row))
                                 .mul_(scale)
                                 .to(projections[k].scalar_type());
    }
    dtables.push_back(dtable);
    dprojections.push_back(dprojection);
  }
  return {sparse ? named : at::empty({0}, tokens.options()), dtables, dprojections};
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("adaptive_embedding_fwd", &adaptive_embedding_fwd);
  m.impl("adaptive_embedding_bwd", &adaptive_embedding_bwd);
}

}  // namespace txl
