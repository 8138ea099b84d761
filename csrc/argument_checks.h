// What the entries of the row kernels share: tensors as pointers, their dtype as a type, the checks
// of one call.
#pragma once

#include <optional>
#include <type_traits>

#include "kernel_params.h"
#include "torch_abi.h"

namespace {

using nitp::bfloat16;
using nitp::float16;
using nitp::torch_abi::Library;
using nitp::torch_abi::ScalarType;
using nitp::torch_abi::Tensor;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

template <class Function>
void with_dtype(const Tensor& t, Function function) {
  switch (t.scalar_type()) {
    case ScalarType::Double: function(double{}); break;
    case ScalarType::Float: function(float{}); break;
    case ScalarType::BFloat16: function(bfloat16{}); break;
    case ScalarType::Half: function(float16{}); break;
    default:
      NITP_CHECK(false, "nitp_ops row kernel: dtype must be float64, float32, bfloat16 or float16");
  }
}

template <class Function>
void with_working_dtype(const Tensor& t, Function function) {
  switch (t.scalar_type()) {
    case ScalarType::Double: function(double{}); break;
    case ScalarType::Float: function(float{}); break;
    default: NITP_CHECK(false, "nitp_ops row kernel: dtype must be float64 or float32");
  }
}

inline ScalarType working(ScalarType a, ScalarType b) {
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double
                                                            : ScalarType::Float;
}

template <class A>
using working_t = nitp::portable::working_t<A>;

// The argument checks of one call; `on` is its first tensor, whose device the others share.
template <class Backend>
struct ArgumentChecks {
  const Tensor& on;

  void rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) const {
    NITP_CHECK(Backend::holds(t, on) && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
                   (columns < 2 || t.stride(1) == 1),
               "nitp_ops row kernel: ", name, " must be a ", Backend::device, " tensor of ", rows,
               " rows with ", columns, " dense columns");
  }
  void list(const std::optional<Tensor>& t, const char* name, int64_t size, ScalarType type) const {
    NITP_CHECK(!t.has_value() || (Backend::holds(*t, on) && t->numel() == size &&
                                  t->is_contiguous() && t->scalar_type() == type),
               "nitp_ops row kernel: ", name, " must hold ", size, " dense ", Backend::device,
               " values of the right dtype");
  }
  void stats(const Tensor& t, int64_t fields, int64_t count, ScalarType type) const {
    rows(t, "stats", fields, count);
    NITP_CHECK(t.scalar_type() == type, "nitp_ops row kernel: stats has the wrong dtype");
  }
};

}  // namespace
