// A row of logits as vectors of 16 bytes.
//
// Vector i covers the entries [start(i), start(i) + kPerVector). Vectors are aligned in memory
// wherever the row begins, so the first may begin before the row and the last may end after it. The
// inner vectors, [inner_begin, inner_end), are read and written whole; the few outer ones entry by
// entry.
//
// Policy and reference are read side by side, and the vectors can be aligned to one side only. If
// the other side is aligned differently, a vector of it is put together from the two aligned ones
// that it straddles. Both must lie inside the row, so there is one inner vector less at each end.
#pragma once

#include "../token_stats.h"
#include "numbers.cuh"

namespace tdpo::cuda {

struct Words {
  uint32_t word[4];
};

// 16 bytes of global memory through the L1 cache. PTX says that the address is global, which the
// compiler does not know of a plain load.
__device__ __forceinline__ uint4 load_through_l1(const uint4* address) {
#if TDPO_INLINE_PTX
  uint4 x;
  const uint64_t global = __cvta_generic_to_global(address);
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(global));
  return x;
#else
  return *address;
#endif
}

// One side of a row: the policy's or the reference's logits.
template <class T>
struct Side {
  const uint4* first;  // the aligned address at or below the start of vector 0
  int shift;           // bytes from there to the start of vector 0; 0 where it is aligned

  // `before`: how many entries of vector 0 lie before the row.
  __device__ __forceinline__ Side(const T* row, int before) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(row) - before * sizeof(T);
    shift = static_cast<int>(start % 16);
    first = reinterpret_cast<const uint4*>(start - shift);
  }
  // The side that the vectors are aligned to.
  explicit __device__ __forceinline__ Side(const T* row)
      : first(reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(row) & ~uintptr_t(15))),
        shift(0) {}

  // An inner vector. load_16(address) loads the 16 bytes there.
  template <class Load>
  __device__ __forceinline__ Words load(int index, const Load& load_16) const {
    const uint4 a = load_16(first + index);
    if (shift == 0) return {{a.x, a.y, a.z, a.w}};
    const uint4 b = load_16(first + index + 1);
    uint32_t word[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    for (int i = 0; i < 6; ++i) word[i] = shift & 8 ? word[i + 2] : word[i];
    for (int i = 0; i < 5; ++i) word[i] = shift & 4 ? word[i + 1] : word[i];
    Words words;
    for (int i = 0; i < 4; ++i) {
      words.word[i] = __funnelshift_r(word[i], word[i + 1], 8 * (shift % 4));
    }
    return words;
  }

  // One entry of a vector, inner or not.
  __device__ __forceinline__ T entry(int index, int place) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first + index) + shift)[place];
  }

  // A vector that begins at entry `start` of a row of `end` entries, and may lie partly or wholly
  // outside of it. The entries outside are 0.
  __device__ __forceinline__ Words load_some(int index, int start, int end) const {
    Words words = {};
    for (int i = 0; i < Storage<T>::kPerVector; ++i) {
      const bool inside = start + i >= 0 && start + i < end;
      if (inside) Storage<T>::set(words.word, i, entry(index, i));
    }
    return words;
  }

  // A vector of -inf, which has no mass.
  static __device__ __forceinline__ Words without_mass() {
    Words words = {};
    for (int i = 0; i < Storage<T>::kPerVector; ++i) {
      Storage<T>::set(words.word, i, T(Storage<T>::kNegativeInfinity));
    }
    return words;
  }
};

template <class T>
__device__ const T* start_of_row(const Logits& logits, uint32_t row) {
  return static_cast<const T*>(logits.data) + row_offset(logits.rows, row);
}

// How many entries lie between the last multiple of 16 bytes and the row's start.
template <class T>
__device__ __forceinline__ int entries_before(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Where the vectors of a row lie. Entries and vectors are counted in 32 bits, which kMaxVocabulary
// keeps from overflow; row offsets have 64 bits.
template <class T>
struct RowVectors {
  static constexpr int kPerVector = Storage<T>::kPerVector;
  int before, count, inner_begin, inner_end;

  __device__ __forceinline__ RowVectors(int before, int vocabulary, bool all_sides_aligned)
      : before(before), count((vocabulary + before + kPerVector - 1) / kPerVector) {
    const int margin = all_sides_aligned ? 0 : 1;  // vectors
    inner_begin = min((before > 0) + margin, count);
    inner_end = max((vocabulary + before) / kPerVector - margin, inner_begin);
  }

  __device__ __forceinline__ int start(int index) const { return index * kPerVector - before; }
  // The vector that holds an entry.
  __device__ __forceinline__ int of_entry(int entry) const { return (entry + before) / kPerVector; }

  __device__ __forceinline__ bool is_inner(int index) const {
    return index >= inner_begin && index < inner_end;
  }

  // The n-th outer vector, of at most four; `count` if there are fewer.
  __device__ __forceinline__ int outer(int n) const {
    return n < 4 ? min(n < inner_begin ? n : inner_end + (n - inner_begin), count) : count;
  }
  // The outer vectors, then `extra` if that is an inner one. A warp that takes one entry a lane
  // needs kOuterRounds rounds for these.
  static constexpr int kOuterRounds = (5 * kPerVector + 31) / 32;
  __device__ __forceinline__ int outer(int n, int extra) const {
    return n == 4 && is_inner(extra) ? extra : outer(n);
  }

  // How many vectors lie between the last multiple of 64 bytes and this address. Memory moves in
  // sectors of 32 bytes, and warps that begin at such multiples share no sector.
  static __device__ __forceinline__ int past_sectors(const void* address, int vector_bytes = 16) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 64) / vector_bytes;
  }

  // The inner vector at which a part of the row begins, which is where the part before it ends.
  __device__ __forceinline__ int part_begin(unsigned part, unsigned parts) const {
    const unsigned inner = inner_end - inner_begin, of_part = (inner + parts - 1) / parts;
    return inner_begin + static_cast<int>(min(part * of_part, inner));
  }
};

}  // namespace tdpo::cuda
