// Threads that call the CPU kernels at once, on neighbouring rows of the same tensors: for the
// thread sanitizer. A store or a load that leaves its rows is a race with the neighbour.
//
// It stands in for the OpenMP loop of csrc/cpu/token_stats.cpp, which hands rows to threads in the
// same way: GCC's OpenMP runtime is not instrumented, so the sanitizer would take each of its
// barriers for none and report races that are not there. Build without -fopenmp.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/row_kernels.h"
#include "token_stats.h"

namespace {

using tdpo::DType;

constexpr int kThreads = 4;
constexpr int64_t kRowsOfAThread = 3, kRows = kThreads * kRowsOfAThread;

template <class T>
T number(double value);
template <>
float number<float>(double value) {
  return static_cast<float>(value);
}
template <>
double number<double>(double value) {
  return value;
}
template <>
uint16_t number<uint16_t>(double value) {  // bfloat16, by truncation
  const float wide = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// Storage: what the logits are stored as; Real: what is accumulated in.
template <class Storage, class Real>
struct Tensors {
  int64_t vocabulary;
  std::vector<Storage> policy, reference;
  std::vector<int64_t> labels;
  std::vector<Real> logps, reference_logps, kl, normalizers, records;

  explicit Tensors(int64_t vocabulary)
      : vocabulary(vocabulary),
        policy(kRows * vocabulary),
        reference(kRows * vocabulary),
        labels(kRows),
        logps(kRows),
        reference_logps(kRows),
        kl(kRows),
        normalizers(kRows * tdpo::kNormalizers),
        records(kRows * tdpo::kRecord) {
    for (int64_t at = 0; at < kRows * vocabulary; ++at) {
      policy[at] = number<Storage>(std::sin(0.37 * at));
      reference[at] = number<Storage>(std::cos(0.11 * at));
    }
    for (int64_t row = 0; row < kRows; ++row) labels[row] = row % vocabulary;
    labels[1] = -100;
    for (int64_t at = 0; at < kRows * tdpo::kRecord; ++at)
      records[at] = Real(at % tdpo::kRecord < 2 || at % tdpo::kRecord > 6 ? -INFINITY : 0);
  }

  tdpo::RowLayout rows() const {
    tdpo::RowLayout layout;
    layout.dims = 1;
    layout.sizes[0] = kRowsOfAThread;
    layout.strides[0] = vocabulary;
    return layout;
  }

  tdpo::TokenStatsProblem problem(DType dtype, int64_t first) {
    return {dtype,
            kRowsOfAThread,
            vocabulary,
            -100,
            {policy.data() + first * vocabulary, rows()},
            {reference.data() + first * vocabulary, rows()},
            labels.data() + first};
  }

  tdpo::TokenStatsOutputs outputs(int64_t first) {
    return {logps.data() + first, reference_logps.data() + first, kl.data() + first,
            normalizers.data() + tdpo::kNormalizers * first};
  }

  // All passes over one thread's rows; the gradient overwrites the policy's logits.
  void work(DType dtype, const tdpo::cpu::RowKernels& kernels, int64_t first) {
    const tdpo::TokenStatsProblem mine = problem(dtype, first);
    tdpo::cpu::token_stats_tile({mine, records.data() + tdpo::kRecord * first}, kernels, 1);
    tdpo::cpu::token_stats_finish({dtype, kRowsOfAThread, vocabulary, -100, mine.labels, 1,
                                   records.data() + tdpo::kRecord * first, outputs(first)},
                                  1);
    tdpo::cpu::token_stats_forward({mine, outputs(first)}, kernels, 1);
    const std::vector<Real> g_m = {Real(1), Real(1), Real(0.5)},
                            g_k = {Real(0.5), Real(1), Real(0)};
    const tdpo::Upstream upstream = {g_m.data(), g_k.data(), nullptr, nullptr, 0, 0, 0};
    tdpo::cpu::token_stats_backward({mine, normalizers.data() + tdpo::kNormalizers * first,
                                     upstream, dtype, policy.data() + first * vocabulary, rows()},
                                    kernels, 1);
  }
};

template <class Storage, class Real>
void run(DType dtype, int64_t vocabulary) {
  for (const tdpo::cpu::RowKernels* kernels : tdpo::cpu::available_kernels()) {
    Tensors<Storage, Real> tensors(vocabulary);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] { tensors.work(dtype, *kernels, thread * kRowsOfAThread); });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace

int main() {
  // One below, at and above a vector of each width; several blocks.
  for (const int64_t vocabulary : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 127, 1025, 4099}) {
    run<float, float>(DType::kFloat32, vocabulary);
    run<double, double>(DType::kFloat64, vocabulary);
    run<uint16_t, float>(DType::kBFloat16, vocabulary);
    run<uint16_t, float>(DType::kFloat16, vocabulary);
  }
  std::puts("done");
  return 0;
}
