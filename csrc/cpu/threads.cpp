#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>

#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

namespace tdpo::cpu {
namespace {

// The entry of a parallel region. GCC's runtime has it, and LLVM's and Intel's for its sake: it
// calls task(data) on each thread of a team.
using Parallel = void (*)(void (*task)(void*), void* data, unsigned threads, unsigned flags);
constexpr const char* kParallel = "GOMP_parallel";

bool is_torch(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return std::strncmp(slash ? slash + 1 : path, "libtorch_cpu.", 13) == 0;
}

// The path of torch's library, if this process has loaded it.
#if defined(__APPLE__)
std::string path_of_torch() {
  for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
    const char* path = _dyld_get_image_name(i);
    if (path && is_torch(path)) return path;
  }
  return "";
}
#else
std::string path_of_torch() {
  std::string found;
  const auto look = [](dl_phdr_info* info, size_t, void* found) {
    if (!info->dlpi_name || !is_torch(info->dlpi_name)) return 0;
    *static_cast<std::string*>(found) = info->dlpi_name;
    return 1;
  };
  dl_iterate_phdr(look, &found);
  return found;
}
#endif

// What torch's own calls of the runtime reach.
Parallel parallel_of_torch() {
#if !defined(__APPLE__)
  // The global scope comes first on Linux, so that a preloaded runtime serves torch and the core.
  if (void* found = dlsym(RTLD_DEFAULT, kParallel)) return reinterpret_cast<Parallel>(found);
#endif
  const std::string path = path_of_torch();
  if (path.empty()) return nullptr;
  void* torch = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return nullptr;
  void* found = dlsym(torch, kParallel);  // searches what torch links to as well
  dlclose(torch);                         // the count of its users only
  return reinterpret_cast<Parallel>(found);
}

Parallel parallel() {
  static const Parallel found = parallel_of_torch();
  return found;
}

struct Loop {
  std::atomic<int64_t> next;
  int64_t count;
  LoopBody body;
  const void* context;
};

void take_indices(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (;;) {
    const int64_t index = loop.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= loop.count) return;
    loop.body(loop.context, index);
  }
}

}  // namespace

std::string openmp_runtime() {
  Dl_info info;
  if (!parallel() || !dladdr(reinterpret_cast<void*>(parallel()), &info)) return "";
  return info.dli_fname;
}

void run_on_threads(int64_t count, int threads, LoopBody body, const void* context) {
  Loop loop{{0}, count, body, context};
  if (threads > 1 && parallel()) {
    parallel()(take_indices, &loop, static_cast<unsigned>(threads), 0);
  } else {
    take_indices(&loop);
  }
}

}  // namespace tdpo::cpu
