// Runs one op on a problem file and writes the results' bytes: `run problem results`. The file is
// lines "number NAME VALUE" and "tensor NAME BYTES STRIDE*3" (in elements), each tensor's bytes
// behind its line. Every tensor lies in an allocation of exactly its size; results start as NaN.
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "txl/rel_attention_decode.h"
#include "txl/rel_shift_cuda.h"

struct Problem {
  std::map<std::string, double> numbers;
  std::map<std::string, txl::Tensor4> tensors;
  std::vector<std::unique_ptr<char[]>> memory;

  char* allocate(size_t bytes) {
    memory.push_back(std::make_unique<char[]>(bytes));
    return static_cast<char*>(std::memset(memory.back().get(), 0xff, bytes));
  }
  explicit Problem(std::istream& file) {
    for (std::string kind, name; file >> kind >> name;) {
      if (kind == "number" && file >> numbers[name]) continue;
      size_t bytes;
      txl::Tensor4& x = tensors[name];
      file >> bytes >> x.stride_b >> x.stride_h >> x.stride_t;
      file.ignore();
      x.data = allocate(bytes);
      file.read(static_cast<char*>(x.data), bytes);
    }
  }
  void set(auto& field, const char* name) const {  // where the file names it
    using T = std::decay_t<decltype(field)>;
    if (numbers.contains(name)) field = static_cast<T>(numbers.at(name));
  }
};

static const char* attend(Problem& p, std::ofstream& results) {
  txl::DecodeArgs a;
  p.set(a.B, "B"), p.set(a.H, "H"), p.set(a.Tq, "Tq"), p.set(a.Tm, "Tm"), p.set(a.Ts, "Ts");
  p.set(a.D, "D"), p.set(a.Dv, "Dv"), p.set(a.R, "R"), p.set(a.offset, "offset");
  p.set(a.clamp, "clamp"), p.set(a.scale, "scale"), p.set(a.softcap, "softcap");
  p.set(a.rule.causal, "causal"), p.set(a.rule.window_left, "window_left");
  p.set(a.rule.window_right, "window_right"), p.set(a.rule.chunk_size, "chunk_size");
  p.set(a.rule.chunk_left, "chunk_left"), p.set(a.rule.chunk_phase, "chunk_phase");
  a.q = p.tensors["q"], a.k = p.tensors["k"], a.v = p.tensors["v"], a.r = p.tensors["r"];
  a.mem_k = p.tensors["mem_k"], a.mem_v = p.tensors["mem_v"], a.mask = p.tensors["mask"];
  p.set(a.mask_stride_key, "mask_stride_key");
  a.r_w_bias = {p.tensors["r_w_bias"].data, p.numbers["float_biases"] != 0};
  a.r_r_bias = {p.tensors["r_r_bias"].data, p.numbers["float_biases"] != 0};
  a.key_start = {p.tensors["key_start"].data, p.numbers["wide_lengths"] != 0};
  a.key_lens = {p.tensors["key_lens"].data, p.numbers["wide_lengths"] != 0};
  a.plan = txl::plan_decode(a);
  const size_t rows = size_t(a.B) * a.H * a.Tq, bytes = rows * a.Dv * size_t(p.numbers["bytes"]);
  auto floats = [&](size_t n) { return reinterpret_cast<float*>(p.allocate(4 * n)); };
  a.out = p.allocate(bytes), a.lse = floats(rows);
  a.positions = floats(rows * a.plan.n_rows);
  a.split_out = floats(a.plan.n_splits == 1 ? 0 : rows * a.plan.n_splits * a.Dv);
  a.split_stats = floats(a.plan.n_splits == 1 ? 0 : rows * a.plan.n_splits * 2);
  const char* error = txl::rel_attention_decode(txl::Scalar(int(p.numbers["dtype"])), a, nullptr);
  results.write(static_cast<char*>(a.out), bytes);
  results.write(reinterpret_cast<char*>(a.lse), rows * 4);
  return error;
}

static const char* shift(Problem& p, std::ofstream& results) {
  txl::ShiftArgs a;
  const auto size = size_t(p.numbers["bytes"]), into = size_t(p.numbers["bytes_into_dst"]);
  p.set(a.n, "n"), p.set(a.Tq, "Tq"), p.set(a.n_src, "n_src"), p.set(a.n_dst, "n_dst");
  p.set(a.step, "step"), p.set(a.base, "base");
  a.src = static_cast<char*>(p.tensors["src"].data) + size_t(p.numbers["bytes_into_src"]);
  a.dst = p.allocate(into + a.n * a.n_dst * size) + into;
  const char* error = txl::rel_shift_cuda(size, a, nullptr);
  return results.write(static_cast<char*>(a.dst), a.n * a.n_dst * size), error;
}

int main(int, char** files) {
  std::ifstream file(files[1], std::ios::binary);
  std::ofstream results(files[2], std::ios::binary);
  Problem problem(file);
  return (problem.numbers.contains("step") ? shift : attend)(problem, results) != nullptr;
}
