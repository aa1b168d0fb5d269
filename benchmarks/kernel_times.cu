// The times of the CUDA kernels, as shares of the bandwidth of a device copy in the same run, with
// neither Python nor torch. Builds in seconds:
//
//   nvcc -O3 -std=c++17 -arch=native -Icsrc benchmarks/kernel_times.cu -o kernel_times
//   ./kernel_times [NAME]     (of this build, in the first column; then without the headings)
//
// Reference logits are N(0, 1), the policy's are those + gap N(0, 1). Bytes are those that the
// algebra needs: forward reads both tensors; backward writes one and reads 0 to 2 of them. A line
// for each dtype and shape: forward by gap, backward by the upstream gradients that a method sends,
// with divergences forward by gap and backward by kind of gradient, and the means of what forward
// computed without them, summed over the gaps, to compare builds by.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/token_stats_backward.cu"
#include "cuda/token_stats_forward.cu"

namespace {

using namespace tdpo;

constexpr float kGaps[] = {0.05f, 0.3f, 0.5f, 1.0f, 3.0f};
constexpr int kRounds = 11, kWarmUp = 3;

enum class Method { kAny, kTdpo1, kTdpo2, kDpo, kRejected };

struct Backward {
  Method method;
  const char* name;
  double tensors_read;
};
constexpr Backward kBackward[] = {
    {Method::kAny, "any", 2},           // log p(y) and KL, unrelated
    {Method::kTdpo1, "TDPO1", 1},       // equal: the policy cancels
    {Method::kTdpo2, "TDPO2", 1.5},     // half of the rows chosen: no KL
    {Method::kDpo, "DPO", 1},           // no KL
    {Method::kRejected, "rejected", 2}  // rejected rows of TDPO2, alpha = 1/2
};

constexpr float kDivergenceGaps[] = {0.3f, 3.0f};

// Backward with divergences: which upstream gradients are not 0.
struct DivergenceBackward {
  const char* name;
  bool of_kl, of_reverse_kl;
  double tensors_read;
};
constexpr DivergenceBackward kDivergenceBackward[] = {
    {"entropy", false, false, 1}, {"reverse", false, true, 2}, {"both KLs", true, true, 2}};

void check(cudaError_t status, int line) {
  if (status == cudaSuccess) return;
  std::printf("CUDA: %s (line %d)\n", cudaGetErrorString(status), line);
  std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

__device__ uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ULL;
  return x ^ x >> 33;
}

// The i-th number of N(0, 1).
__device__ float normal(uint64_t i) {
  const uint64_t bits = mixed(2 * i + 12345);
  const float u = (uint32_t(bits) + 1.0f) * 0x1p-32f, v = uint32_t(bits >> 32) * 0x1p-32f;
  return sqrtf(-2 * logf(u)) * cospif(2 * v);
}

__device__ float stored(float* to, float x) { return *to = x; }
__device__ float stored(BFloat16* to, float x) {
  to->bits = cuda::bfloat16_bits_of_float(x);
  return __uint_as_float(uint32_t(to->bits) << 16);
}

template <class T>
__global__ void fill_logits(T* policy, T* reference, int64_t count, float gap) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const float r = stored(reference + i, normal(i));
    stored(policy + i, r + gap * normal(i + (int64_t(1) << 40)));
  }
}

__global__ void fill_labels(int64_t* labels, int rows, int vocabulary) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < rows) labels[row] = int64_t(mixed(row + 99) % vocabulary);
}

__global__ void fill_upstream(float* of_logps, float* of_kl, int rows, Method method) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const float g = normal(row + (int64_t(1) << 50)), other = normal(row + (int64_t(1) << 51));
  const bool chosen = row < rows / 2;
  of_logps[row] = g;
  of_kl[row] = method == Method::kAny               ? other
               : method == Method::kTdpo1           ? g
               : method == Method::kDpo             ? 0
               : method == Method::kTdpo2 && chosen ? 0
                                                    : g / 2;
}

// The median of several runs, in milliseconds.
template <class Body>
float milliseconds(const Body& body) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> times(kRounds);
  for (int round = -kWarmUp; round < kRounds; ++round) {
    CHECK(cudaEventRecord(start));
    body();
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    if (round >= 0) CHECK(cudaEventElapsedTime(&times[round], start, stop));
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

// Device memory that goes with its owner.
template <class T>
class Array {
 public:
  explicit Array(int64_t count) { CHECK(cudaMalloc(&data, count * sizeof(T))); }
  ~Array() { cudaFree(data); }
  Array(const Array&) = delete;
  operator T*() const { return data; }

 private:
  T* data = nullptr;
};

double mean(const float* values, int count) {
  std::vector<float> host(count);
  CHECK(cudaMemcpy(host.data(), values, count * sizeof(float), cudaMemcpyDeviceToHost));
  double sum = 0;
  for (float value : host) sum += value;
  return sum / count;
}

// The part of a line with divergences. `share` and `fill` are those of time_shape.
template <class T, class Share, class Fill>
void time_divergences(const TokenStatsProblem& problem, T* gradient, const Share& share,
                      const Fill& fill) {
  const int rows = int(problem.rows), threads = 256, blocks = (rows + threads - 1) / threads;
  Array<float> of_rows(6 * rows), normalizers(12 * rows), upstream(2 * rows), zeros(rows);
  CHECK(cudaMemset(zeros, 0, rows * sizeof(float)));
  fill_upstream<<<blocks, threads>>>(upstream, upstream + rows, rows, Method::kAny);
  float* const out = of_rows;
  const TokenStatsForward forward = {problem,
                                     {out, out + rows, out + 2 * rows, normalizers, out + 3 * rows,
                                      out + 4 * rows, out + 5 * rows}};
  Array<char> workspace(cuda::divergences_workspace_bytes(problem));
  const cuda::Launch launch = {0, nullptr};
  for (float gap : kDivergenceGaps) {
    fill(gap);
    const float ms = milliseconds([&] { cuda::token_stats_forward(forward, workspace, launch); });
    std::printf(" %8.3f", share(2, ms));
  }
  fill(0.3f);
  cuda::token_stats_forward(forward, workspace, launch);
  for (const DivergenceBackward& kind : kDivergenceBackward) {
    const float *given = upstream, *none = zeros;
    const float* of_kl = kind.of_kl ? given + rows : none;
    const float* of_reverse_kl = kind.of_reverse_kl ? given + rows : none;
    const Upstream of_kind = {given, of_kl, nullptr, nullptr, 0, 0, 0, of_reverse_kl, given};
    const TokenStatsBackward backward = {problem,       normalizers, of_kind,
                                         problem.dtype, gradient,    problem.policy.rows};
    const float ms = milliseconds([&] { cuda::token_stats_backward(backward, launch); });
    std::printf(" %8.3f", share(1 + kind.tensors_read, ms));
  }
}

template <class T>
void time_shape(const char* build, DType dtype, const char* name, int rows, int vocabulary) {
  const int64_t count = int64_t(rows) * vocabulary;
  const double gigabytes = count * sizeof(T) / 1e9;
  const int threads = 256, blocks = (rows + threads - 1) / threads;
  Array<T> policy(count), reference(count), gradient(count);
  Array<int64_t> labels(rows);
  Array<float> logps(rows), reference_logps(rows), kl(rows), normalizers(8 * rows);
  Array<float> of_logps(rows), of_kl(rows);
  fill_labels<<<blocks, threads>>>(labels, rows, vocabulary);
  RowLayout layout;
  layout.dims = 1, layout.sizes[0] = rows, layout.strides[0] = vocabulary;
  const Logits z = {policy, layout}, r = {reference, layout};
  const TokenStatsProblem problem = {dtype, rows, vocabulary, -100, z, r, labels, 0, {}};
  const TokenStatsForward forward = {problem, {logps, reference_logps, kl, normalizers}};
  Array<char> workspace(cuda::forward_workspace_bytes(problem));
  const cuda::Launch launch = {0, nullptr};
  const auto fill = [&](float gap) {
    fill_logits<T><<<2048, threads>>>(policy, reference, count, gap);
    CHECK(cudaDeviceSynchronize());
  };

  fill(0.3f);
  const float copy = milliseconds([&] {
    CHECK(cudaMemcpyAsync(gradient, policy, count * sizeof(T), cudaMemcpyDeviceToDevice));
  });
  const double bandwidth = 2 * gigabytes / copy;  // GB a millisecond
  const auto share = [&](double tensors, float ms) { return tensors * gigabytes / ms / bandwidth; };
  std::printf("%-24s %-8s %5d x %6d %6.0f  ", build, name, rows, vocabulary, 1e3 * bandwidth);
  double mean_kl = 0, mean_logp = 0;
  for (float gap : kGaps) {
    fill(gap);
    const float ms = milliseconds([&] { cuda::token_stats_forward(forward, workspace, launch); });
    mean_kl += mean(kl, rows), mean_logp += mean(logps, rows);
    std::printf(" %8.3f", share(2, ms));
  }
  std::printf("  ");
  fill(0.3f);
  cuda::token_stats_forward(forward, workspace, launch);
  for (const Backward& kind : kBackward) {
    fill_upstream<<<blocks, threads>>>(of_logps, of_kl, rows, kind.method);
    const Upstream upstream = {of_logps, of_kl, nullptr, nullptr, 0, 0, 0};
    const TokenStatsBackward backward = {problem, normalizers, upstream, dtype, gradient, layout};
    const float ms = milliseconds([&] { cuda::token_stats_backward(backward, launch); });
    std::printf(" %8.3f", share(1 + kind.tensors_read, ms));
  }
  std::printf("  ");
  time_divergences<T>(problem, gradient, share, fill);
  std::printf("   %.9g %.9g\n", mean_kl, mean_logp);
  std::fflush(stdout);
}

void print_headings() {
  cudaDeviceProp card;
  CHECK(cudaGetDeviceProperties(&card, 0));
  std::printf("%s, %d multiprocessors; a copy's GB/s, and shares of it\n", card.name,
              card.multiProcessorCount);
  std::printf("%-24s %-8s %5s   %6s %6s  ", "build", "dtype", "rows", "V", "copy");
  for (float gap : kGaps) std::printf(" fwd %4g", gap);
  std::printf("  ");
  for (const Backward& kind : kBackward) std::printf(" %8s", kind.name);
  std::printf("  ");
  for (float gap : kDivergenceGaps) std::printf(" div %4g", gap);
  for (const DivergenceBackward& kind : kDivergenceBackward) std::printf(" %8s", kind.name);
  std::printf("   mean KL, log p\n");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) print_headings();
  const char* build = count < 2 ? "as it stands" : arguments[1];
  for (int vocabulary : {128256, 32000, 50257})
    time_shape<BFloat16>(build, DType::kBFloat16, "bfloat16", 8192, vocabulary);
  time_shape<float>(build, DType::kFloat32, "float32", 4096, 128256);
  time_shape<float>(build, DType::kFloat32, "float32", 8192, 4096);  // a tile of the fused head
}
