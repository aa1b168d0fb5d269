// Asks the CUDA runtime for its versions, for the devices of this machine, and whether this build
// can run on them.
#include <cuda_runtime.h>

#include "launch.cuh"

#if !defined(TDPO_CUDA_ARCHITECTURES)
#define TDPO_CUDA_ARCHITECTURES "unknown"
#endif

namespace tdpo::cuda {
namespace {

// An empty kernel, built for the same architectures as the others.
__global__ void probe_kernel() {}

}  // namespace

Runtime runtime() {
  Runtime found = {0, 0, 0, TDPO_CUDA_ARCHITECTURES, ""};
  cudaRuntimeGetVersion(&found.runtime_version);
  cudaDriverGetVersion(&found.driver_version);  // 0 where no driver is installed
  const cudaError_t status = cudaGetDeviceCount(&found.devices);
  if (status != cudaSuccess) {
    found.devices = 0;
    found.error = cudaGetErrorString(status);
    cudaGetLastError();
  }
  return found;
}

std::string cannot_run_because(int device) {
  const OnDevice guard(device);
  cudaFuncAttributes attributes = {};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace tdpo::cuda
