// A fresh large buffer costs a page fault for every 4 KiB that is written; backward into one spends
// more time on those than on the gradient.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tdpo::cpu {

// Asks for pages of 2 MiB, as far as they lie wholly inside a buffer that is about to be written.
// A hint: it changes no content and no size, and where it is refused nothing is lost.
inline void wish_for_huge_pages(void* buffer, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(buffer);
  const uintptr_t first = (start + kPage - 1) & ~(kPage - 1), end = (start + bytes) & ~(kPage - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(buffer), static_cast<void>(bytes);
#endif
}

}  // namespace tdpo::cpu
