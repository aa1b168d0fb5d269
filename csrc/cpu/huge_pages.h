// Huge pages for a fresh gradient. Memory that was never written costs a page fault for every
// 4 KiB; without huge pages backward spends more time on page faults than on the gradient.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tdpo::cpu {

// Asks the kernel for pages of 2 MiB where they lie wholly inside the buffer. This is a hint: it
// changes neither content nor size, and may be refused.
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
