// What the CUDA runtime says about itself and about this machine.
#include <cuda_runtime.h>

#include "../token_stats.h"

#if !defined(TDPO_CUDA_ARCHITECTURES)
#define TDPO_CUDA_ARCHITECTURES "unknown"
#endif

namespace tdpo::cuda {

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

}  // namespace tdpo::cuda
