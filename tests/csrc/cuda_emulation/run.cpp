// Runs one op on a problem file and writes the results' bytes: `run problem results`. The file is
// lines "number NAME VALUE" and "tensor NAME BYTES STRIDE*3" (in elements), each tensor's bytes
// after its line. Every tensor has an allocation of exactly its size; results start as NaN.
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
#define NUMBER(name) p.set(a.name, #name)
#define TENSOR(name) a.name = p.tensors[#name]
#define ROW_NUMBERS(name) a.name = {p.tensors[#name].data, p.numbers["is_wide"] != 0, \
                                    p.tensors[#name].stride_b, p.tensors[#name].stride_h}
  NUMBER(B), NUMBER(H), NUMBER(Hk), NUMBER(Tq), NUMBER(Tm), NUMBER(Ts), NUMBER(D), NUMBER(Dv);
  NUMBER(Dp), NUMBER(R), NUMBER(offset), NUMBER(clamp), NUMBER(scale), NUMBER(pos_scale);
  NUMBER(softcap), NUMBER(mask_stride_key), NUMBER(rule.window_left), NUMBER(rule.window_right);
  NUMBER(rule.chunk_size), NUMBER(rule.chunk_left), NUMBER(rule.chunk_phase);
  TENSOR(q), TENSOR(k), TENSOR(v), TENSOR(mem_k), TENSOR(mem_v), TENSOR(q_pos), TENSOR(r);
  TENSOR(mask), ROW_NUMBERS(q_start), ROW_NUMBERS(key_start), ROW_NUMBERS(key_lens);
  a.r_w_bias = {p.tensors["r_w_bias"].data, p.numbers["float_biases"] != 0};
  a.r_r_bias = {p.tensors["r_r_bias"].data, p.numbers["float_biases"] != 0};
  a.plan = txl::plan_decode(a);
  const size_t rows = size_t(a.B) * a.H * a.Tq, bytes = rows * a.Dv * size_t(p.numbers["bytes"]);
  const size_t runs = a.plan.n_splits == 1 ? 0 : rows * a.plan.n_splits;
  auto floats = [&](size_t n) { return reinterpret_cast<float*>(p.allocate(4 * n)); };
  a.out = p.allocate(bytes), a.lse = floats(rows), a.positions = floats(rows * a.plan.n_rows);
  a.split_out = floats(runs * a.Dv), a.split_stats = floats(runs * 2);
  const char* error = txl::rel_attention_decode(txl::Scalar(int(p.numbers["dtype"])), a, nullptr);
  results.write(static_cast<char*>(a.out), bytes);
  return results.write(reinterpret_cast<char*>(a.lse), rows * 4), error;
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
