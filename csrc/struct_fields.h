// Structs whose fields are known outside C++ by their names.
//
// TDPO_FIELDS in a struct gives its name and lists its fields, all of them and in their order. From
// this one list come the Python classes (python_structs.h) and the layouts that the tests read
// (description.h).
#pragma once

#include <cstddef>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// fields() are references to the fields. The last function is never called: its structured binding
// takes as many names as the struct has fields, so a field that is not listed does not compile.
#define TDPO_FIELDS(name, ...)                          \
  static constexpr char kName[] = name;                 \
  static constexpr char kFieldNames[] = #__VA_ARGS__;   \
  auto fields() { return std::tie(__VA_ARGS__); }       \
  auto fields() const { return std::tie(__VA_ARGS__); } \
  auto all_fields_are_listed() const {                  \
    const auto& [__VA_ARGS__] = *this;                  \
    return std::tie(__VA_ARGS__);                       \
  }

namespace tdpo {

template <class Struct>
std::vector<std::string> field_names() {
  std::vector<std::string> names(1);
  for (const char* at = Struct::kFieldNames; *at; ++at) {
    if (*at == ',') {
      names.emplace_back();
    } else if (*at != ' ') {
      names.back() += *at;
    }
  }
  return names;
}

// Calls visit(i, field) for each field of an object, i = 0, 1, ...
template <class Struct, class Visit>
void for_each_field(Struct& object, const Visit& visit) {
  const auto visit_all = [&](auto&... fields) {
    std::size_t i = 0;
    (visit(i++, fields), ...);
  };
  std::apply(visit_all, object.fields());
}

}  // namespace tdpo
