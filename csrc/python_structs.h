// Python classes of the structs of token_stats.h: all fields are given by name, then read-only.
//
//   core.Logits(data=logits.data_ptr(), rows=core.RowLayout(dims=1, sizes=[2], strides=[32]))
//
// An address is an integer, an array a list or a tuple. A field that is missing, unknown or of a
// wrong type raises TypeError.
//
// The classes are written on CPython's interface, since a call makes seven such objects: with
// py::class_ they take 3.8 us, as long as the whole rest of a small call's way through the core,
// and with these 0.3 us (two rows with V = 32).
#pragma once

#include <pybind11/pybind11.h>

#include <climits>
#include <string>
#include <type_traits>
#include <vector>

#include "description.h"

namespace tdpo::python {

namespace py = pybind11;

template <class Struct>
struct Instance {
  PyObject_HEAD Struct value;
};

// The class of a struct, once `bind` has made it. It lives as long as the process.
template <class Struct>
struct Class {
  static inline PyTypeObject* type = nullptr;
  static inline std::vector<PyObject*> names;  // of the fields, interned
};

// ---- to Python ----

inline PyObject* to_python(int x) { return PyLong_FromLong(x); }
inline PyObject* to_python(int64_t x) { return PyLong_FromLongLong(x); }
inline PyObject* to_python(double x) { return PyFloat_FromDouble(x); }
inline PyObject* to_python(DType x) { return PyLong_FromLong(static_cast<int>(x)); }
inline PyObject* to_python(const void* x) { return PyLong_FromVoidPtr(const_cast<void*>(x)); }
template <std::size_t kSize>
PyObject* to_python(const int64_t (&x)[kSize]) {
  py::tuple all(kSize);
  for (std::size_t i = 0; i < kSize; ++i) all[i] = x[i];
  return all.release().ptr();
}
template <class Struct>
auto to_python(const Struct& x) -> decltype(x.fields(), static_cast<PyObject*>(nullptr)) {
  PyTypeObject* type = Class<Struct>::type;
  PyObject* made = type->tp_alloc(type, 0);
  if (made) reinterpret_cast<Instance<Struct>*>(made)->value = x;
  return made;
}

// ---- from Python: false where that cannot be; a Python error may be set then ----

inline bool from_python(PyObject* given, int64_t& field) {
  field = PyLong_AsLongLong(given);
  return field != -1 || !PyErr_Occurred();
}
inline bool from_python(PyObject* given, int& field) {
  int64_t x = 0;
  if (!from_python(given, x) || x < INT_MIN || x > INT_MAX) return false;
  field = static_cast<int>(x);
  return true;
}
inline bool from_python(PyObject* given, double& field) {
  field = PyFloat_AsDouble(given);
  return field != -1 || !PyErr_Occurred();
}
inline bool from_python(PyObject* given, DType& field) {
  int64_t code = 0;
  if (!from_python(given, code)) return false;
  for (const NamedDType& named : kDTypeNames) {
    if (code == static_cast<int>(named.dtype)) {
      field = named.dtype;
      return true;
    }
  }
  return false;
}
template <class T>
bool from_python(PyObject* given, T*& field) {
  field = static_cast<T*>(PyLong_AsVoidPtr(given));
  return field || !PyErr_Occurred();
}
template <std::size_t kSize>
bool from_python(PyObject* given, int64_t (&field)[kSize]) {
  if (!PyList_Check(given) && !PyTuple_Check(given)) return false;
  const auto size = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(given));
  if (size > kSize) return false;
  for (std::size_t i = 0; i < size; ++i) {
    if (!from_python(PySequence_Fast_ITEMS(given)[i], field[i])) return false;
  }
  return true;
}
template <class Struct>
auto from_python(PyObject* given, Struct& field) -> decltype(field.fields(), bool()) {
  if (Py_TYPE(given) != Class<Struct>::type) return false;
  field = reinterpret_cast<Instance<Struct>*>(given)->value;
  return true;
}

// ---- the classes ----

// Where a keyword stands among those of a call; -1 if it is not there. Mostly at its own place.
inline Py_ssize_t position_of(PyObject* name, PyObject* keywords, Py_ssize_t own_place) {
  if (PyTuple_GET_ITEM(keywords, own_place) == name) return own_place;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keywords); ++i) {
    if (PyUnicode_Compare(PyTuple_GET_ITEM(keywords, i), name) == 0) return i;
  }
  return -1;
}

template <class Struct>
[[noreturn]] void refuse_fields() {
  throw py::type_error(std::string(Struct::kName) +
                       " takes all of its fields, by name: " + Struct::kFieldNames);
}

template <class Struct, class Field>
[[noreturn]] void refuse_value(std::size_t i, PyObject* given, const Field& field) {
  PyErr_Clear();
  throw py::type_error(std::string(Struct::kName) + "." + field_names<Struct>()[i] + " must be " +
                       (std::is_same_v<Field, DType> ? "one of DTYPES" : type_name(field)) +
                       ", got " + std::string(py::repr(given)));
}

// Struct(name=value, ...) by the protocol "vectorcall": the values, then the names in a tuple.
template <class Struct>
PyObject* construct(PyObject*, PyObject* const* values, std::size_t positional,
                    PyObject* keywords) {
  try {
    const std::vector<PyObject*>& names = Class<Struct>::names;
    const std::size_t given = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    if (PyVectorcall_NARGS(positional) != 0 || given != names.size()) refuse_fields<Struct>();
    Struct object = {};
    for_each_field(object, [&](std::size_t i, auto& field) {
      const Py_ssize_t at = position_of(names[i], keywords, static_cast<Py_ssize_t>(i));
      if (at < 0) refuse_fields<Struct>();
      if (!from_python(values[at], field)) refuse_value<Struct>(i, values[at], field);
    });
    return to_python(object);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  }
  return nullptr;
}

template <class Struct>
PyObject* field_of(PyObject* self, void* number) {
  PyObject* found = nullptr;
  const auto wanted = reinterpret_cast<std::size_t>(number);
  const Struct& object = reinterpret_cast<Instance<Struct>*>(self)->value;
  for_each_field(object, [&](std::size_t i, const auto& field) {
    if (i == wanted) found = to_python(field);
  });
  return found;
}

template <class Struct>
void bind(py::module_& module) {
  using OfStruct = Class<Struct>;
  static const std::string name = std::string("tdpo_ext._core.") + Struct::kName;
  static std::vector<PyGetSetDef> getters;
  for (const std::string& field : field_names<Struct>()) {
    PyObject* interned = PyUnicode_InternFromString(field.c_str());
    void* number = reinterpret_cast<void*>(OfStruct::names.size());
    getters.push_back({PyUnicode_AsUTF8(interned), &field_of<Struct>, nullptr, nullptr, number});
    OfStruct::names.push_back(interned);
  }
  getters.push_back({});
  PyType_Slot slots[] = {{Py_tp_getset, getters.data()}, {0, nullptr}};
  PyType_Spec spec = {name.c_str(), sizeof(Instance<Struct>), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (!type) throw py::error_already_set();
  OfStruct::type = reinterpret_cast<PyTypeObject*>(type);
  OfStruct::type->tp_vectorcall = &construct<Struct>;
  module.attr(Struct::kName) = py::handle(type);
}

template <class... Structs>
void bind_all(py::module_& module, StructList<Structs...>) {
  (bind<Structs>(module), ...);
}

}  // namespace tdpo::python

// A function of the module that takes a struct takes an object of its class.
namespace pybind11::detail {

template <class Struct>
struct type_caster<Struct, std::void_t<decltype(Struct::kFieldNames)>> {
  PYBIND11_TYPE_CASTER(Struct, const_name(Struct::kName));
  bool load(handle given, bool) { return tdpo::python::from_python(given.ptr(), value); }
};

}  // namespace pybind11::detail
