// What Python and the tests have to know of token_stats.h: its structs, constants and dtypes.
#pragma once

#include <cstdint>
#include <string>

#include "pair_loss.h"
#include "struct_fields.h"
#include "token_stats.h"

namespace tdpo {

template <class... Structs>
struct StructList {};

// A struct comes after those that it holds.
using AllStructs = StructList<RowLayout, Logits, Sequences, TokenStatsProblem, TokenStatsOutputs,
                              TokenStatsForward, TokenStatsTile, TokenStatsFinish, LossOptions,
                              TdpoLossForward, Upstream, TokenStatsBackward>;

struct Constant {
  const char* name;
  int64_t value;
};
constexpr Constant kConstants[] = {{"NORMALIZERS", kNormalizers},
                                   {"RECORD", kRecord},
                                   {"DIVERGENCE_NORMALIZERS", kDivergenceNormalizers},
                                   {"DIVERGENCE_RECORD", kDivergenceRecord},
                                   {"CUDA_BLOCK_WARPS", cuda::kBlockWarps},
                                   {"LARGEST_CUDA_VOCABULARY", cuda::kMaxVocabulary},
                                   {"MOST_LEADING_DIMENSIONS", RowLayout::kMaxDims},
                                   {"PAIR_QUANTITIES", kPairQuantities},
                                   {"ALL_LABELS_VALID", kAllLabelsValid},
                                   {"BOUNDS_NOT_USABLE", kBoundsNotUsable}};

inline std::string type_name(const int&) { return "int"; }
inline std::string type_name(const DType&) { return "int"; }
inline std::string type_name(const int64_t&) { return "int64"; }
inline std::string type_name(const double&) { return "double"; }
template <class T>
std::string type_name(T* const&) {
  return "pointer";
}
template <std::size_t kSize>
std::string type_name(const int64_t (&)[kSize]) {
  return "int64[" + std::to_string(kSize) + "]";
}
template <class Struct>
auto type_name(const Struct&) -> decltype(std::string(Struct::kName)) {
  return Struct::kName;
}

// Lines "field NAME TYPE OFFSET", then "struct NAME BYTES".
template <class Struct>
std::string description_of() {
  const Struct object = {};
  const auto names = field_names<Struct>();
  std::string text;
  for_each_field(object, [&](std::size_t i, const auto& field) {
    const auto offset =
        reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&object);
    text += "field " + names[i] + " " + type_name(field) + " " + std::to_string(offset) + "\n";
  });
  return text + "struct " + Struct::kName + " " + std::to_string(sizeof(Struct)) + "\n";
}

template <class... Structs>
std::string description_of(StructList<Structs...>) {
  return (description_of<Structs>() + ...);
}

// All of it as lines of text: the structs, then "constant NAME VALUE" and "dtype NAME CODE". The
// tests' stand-ins for the compiled core build their own structs from it.
inline std::string description() {
  std::string text = description_of(AllStructs{});
  for (const Constant& constant : kConstants) {
    text += std::string("constant ") + constant.name + " " + std::to_string(constant.value) + "\n";
  }
  for (const NamedDType& named : kDTypeNames) {
    text += std::string("dtype ") + named.name + " " +
            std::to_string(static_cast<int>(named.dtype)) + "\n";
  }
  return text;
}

}  // namespace tdpo
