// From tensors to row kernels: checks dtypes and shapes, picks the instruction set, splits the rows over threads.
// A row is computed by one thread whatever the thread count, so results are bitwise reproducible.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "rows.h"

namespace {

using nitp::bfloat16;
using nitp::float16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 16384;  // about 10 us of work: below it threads cost more than they give

#define NITP_CALL(function, args, begin, end)                                                \
  switch (nitp_instruction_set()) {                                                          \
    case nitp::InstructionSet::avx512: nitp::NITP_AVX512::function(args, begin, end); break; \
    case nitp::InstructionSet::avx2: nitp::NITP_AVX2::function(args, begin, end); break;     \
    case nitp::InstructionSet::portable: nitp::portable::function(args, begin, end); break;  \
  }
#ifdef NITP_X86
#define NITP_AVX512 avx512
#define NITP_AVX2 avx2
#else
#define NITP_AVX512 portable
#define NITP_AVX2 portable
#endif

template <class Function>
void over_rows(int64_t rows, int64_t columns, Function function) {
  const int64_t grain = columns > 0 ? 1 + (kElementsPerTask - 1) / columns : 1;
  if (rows > 0) torch::stable::parallel_for(0, rows, grain, function);
}

void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns < 2 || t.stride(1) == 1),
      "nitp_ops row kernel: ", name, " must be a CPU tensor of ", rows, " rows with ", columns, " dense columns");
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

void check_list(const std::optional<Tensor>& t, const char* name, int64_t size, ScalarType type) {
  STD_TORCH_CHECK(
      !t.has_value() || (t->is_cpu() && t->numel() == size && t->is_contiguous() && t->scalar_type() == type),
      "nitp_ops row kernel: ", name, " must hold ", size, " dense CPU values of the right dtype");
}

void check_stats(const Tensor& t, int64_t fields, int64_t rows, ScalarType type) {
  check_rows(t, "stats", fields, rows);
  STD_TORCH_CHECK(t.scalar_type() == type, "nitp_ops row kernel: stats has the wrong dtype");
}

template <class Function>
void with_dtype(const Tensor& t, Function function) {
  switch (t.scalar_type()) {
    case ScalarType::Double: function(double{}); break;
    case ScalarType::Float: function(float{}); break;
    case ScalarType::BFloat16: function(bfloat16{}); break;
    case ScalarType::Half: function(float16{}); break;
    default: STD_TORCH_CHECK(false, "nitp_ops row kernel: dtype must be float64, float32, bfloat16 or float16");
  }
}

ScalarType working(ScalarType a, ScalarType b) {
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class A>
using working_t = nitp::portable::working_t<A>;

void swiglu_rows(Tensor gate, Tensor up, Tensor out) {
  const int64_t rows = gate.size(0), columns = gate.size(1);
  check_rows(gate, "gate", rows, columns);
  check_rows(up, "up", rows, columns);
  check_rows(out, "out", rows, columns);
  STD_TORCH_CHECK(up.scalar_type() == gate.scalar_type() && out.scalar_type() == gate.scalar_type(),
                  "nitp_ops row kernel: gate, up and out must share one dtype");
  with_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    const nitp::SwigluRows<T> args{data<T>(gate),  data<T>(up),  data<T>(out), columns,
                                   gate.stride(0), up.stride(0), out.stride(0)};
    over_rows(rows, columns, [&](int64_t begin, int64_t end) { NITP_CALL(swiglu_rows, args, begin, end) });
  });
}

void swiglu_rows_backward_(Tensor gate, Tensor up, Tensor upstream, std::optional<Tensor> into_gate,
                           std::optional<Tensor> into_up) {
  const int64_t rows = gate.size(0), columns = gate.size(1);
  const Tensor d_gate = into_gate.value_or(gate), d_up = into_up.value_or(up);
  check_rows(gate, "gate", rows, columns);
  for (const Tensor& t : {up, upstream, d_gate, d_up}) {
    check_rows(t, "up, upstream, d_gate or d_up", rows, columns);
    STD_TORCH_CHECK(t.scalar_type() == gate.scalar_type(), "nitp_ops row kernel: all must have gate's dtype");
  }
  with_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    const nitp::SwigluRowsBackward<T> args{data<T>(gate),      data<T>(up),      data<T>(upstream), data<T>(d_gate),
                                           data<T>(d_up),      columns,          gate.stride(0),    up.stride(0),
                                           upstream.stride(0), d_gate.stride(0), d_up.stride(0)};
    over_rows(rows, columns, [&](int64_t begin, int64_t end) { NITP_CALL(swiglu_rows_backward, args, begin, end) });
  });
}

void accumulate_rows_(Tensor sum, Tensor addend) {
  const int64_t rows = sum.size(0), columns = sum.size(1);
  check_rows(sum, "sum", rows, columns);
  check_rows(addend, "addend", rows, columns);
  STD_TORCH_CHECK(sum.scalar_type() == ScalarType::Float && addend.scalar_type() == ScalarType::BFloat16,
                  "nitp_ops row kernel: sum must be float32 and addend bfloat16");
  const nitp::AccumulateRows<bfloat16> args{data<float>(sum), data<bfloat16>(addend), columns, sum.stride(0),
                                            addend.stride(0)};
  over_rows(rows, columns, [&](int64_t begin, int64_t end) { NITP_CALL(accumulate_rows, args, begin, end) });
}

void alignment_rows_(Tensor prediction, Tensor target, std::optional<Tensor> target_rows,
                     std::optional<Tensor> row_scale, Tensor stats, std::optional<Tensor> into_prediction,
                     std::optional<Tensor> d_target, int64_t distance, double eps, bool gradient) {
  const int64_t rows = prediction.size(0), columns = prediction.size(1);
  const Tensor d_prediction = into_prediction.value_or(prediction);
  const ScalarType work = working(prediction.scalar_type(), target.scalar_type());
  check_rows(prediction, "prediction", rows, columns);
  check_rows(d_prediction, "d_prediction", rows, columns);
  check_rows(target, "target", target_rows.has_value() ? target.size(0) : rows, columns);
  check_list(target_rows, "target_rows", rows, ScalarType::Long);
  check_list(row_scale, "row_scale", rows, work);
  check_stats(stats, 4, rows, work);
  if (d_target.has_value()) check_rows(*d_target, "d_target", rows, columns);
  STD_TORCH_CHECK(d_prediction.scalar_type() == prediction.scalar_type() &&
                      (!d_target.has_value() || d_target->scalar_type() == target.scalar_type()),
                  "nitp_ops row kernel: a gradient must have its input's dtype");
  STD_TORCH_CHECK(distance >= 0 && distance <= 3, "nitp_ops row kernel: distance must be 0, 1, 2 or 3");
  const int64_t* indices = data<int64_t>(target_rows);
  for (int64_t i = 0; indices != nullptr && i < rows; ++i) {
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < target.size(0), "nitp_ops row kernel: target_rows out of range");
  }
  with_dtype(prediction, [&](auto p) {
    with_dtype(target, [&](auto z) {
      using P = decltype(p);
      using Z = decltype(z);
      using A = decltype(working_t<P>{} + working_t<Z>{});
      const nitp::AlignmentRows<P, Z, A> args{data<P>(prediction),
                                              data<Z>(target),
                                              indices,
                                              data<A>(row_scale),
                                              data<A>(stats),
                                              data<P>(d_prediction),
                                              data<Z>(d_target),
                                              columns,
                                              prediction.stride(0),
                                              target.stride(0),
                                              stats.stride(0),
                                              d_prediction.stride(0),
                                              d_target.has_value() ? d_target->stride(0) : 0,
                                              static_cast<A>(eps),
                                              static_cast<nitp::Distance>(distance),
                                              gradient};
      over_rows(rows, columns, [&](int64_t begin, int64_t end) { NITP_CALL(alignment_rows, args, begin, end) });
    });
  });
}

void cross_entropy_rows_(Tensor logits, Tensor labels, std::optional<Tensor> target_weight, std::optional<Tensor> bias,
                         std::optional<Tensor> class_weight, std::optional<Tensor> row_scale, Tensor stats,
                         Tensor target_logit, Tensor prediction, int64_t ignore_index, bool negative_is_absent,
                         double label_smoothing, double z_loss, double softcap, double logit_scale, bool gradient) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType work = working(logits.scalar_type(), logits.scalar_type());
  STD_TORCH_CHECK(labels.dim() == 2, "nitp_ops row kernel: labels must be [rows, targets]");
  const int64_t targets = labels.size(1), fields = stats.size(0);
  check_rows(logits, "logits", rows, columns);
  check_list(labels, "labels", rows * targets, ScalarType::Long);
  check_list(target_weight, "target_weight", rows * targets, work);
  check_list(bias, "bias", columns, work);
  check_list(class_weight, "class_weight", columns, work);
  check_list(row_scale, "row_scale", rows, work);
  check_list(target_logit, "target_logit", rows * targets, work);
  check_list(prediction, "prediction", rows, ScalarType::Long);
  check_stats(stats, fields == 3 ? 3 : 2, rows, work);
  STD_TORCH_CHECK(columns > 0 || rows == 0, "nitp_ops row kernel: logits has no columns");
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = working_t<T>;
    double class_mass = 0;
    if (class_weight.has_value()) {
      for (int64_t v = 0; v < columns; ++v) class_mass += data<A>(class_weight)[v];
      class_mass /= static_cast<double>(columns);
    }
    const nitp::CrossEntropyRows<T, A> args{data<T>(logits),
                                            data<int64_t>(labels),
                                            data<A>(target_weight),
                                            data<A>(bias),
                                            data<A>(class_weight),
                                            data<A>(row_scale),
                                            data<A>(stats),
                                            data<A>(target_logit),
                                            data<int64_t>(prediction),
                                            columns,
                                            targets,
                                            logits.stride(0),
                                            stats.stride(0),
                                            ignore_index,
                                            class_mass,
                                            static_cast<A>(label_smoothing),
                                            static_cast<A>(z_loss),
                                            static_cast<A>(softcap),
                                            static_cast<A>(logit_scale),
                                            negative_is_absent,
                                            fields == 3,
                                            gradient};
    over_rows(rows, columns, [&](int64_t begin, int64_t end) { NITP_CALL(cross_entropy_rows, args, begin, end) });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nitp_ops, CPU, m) {
  m.impl("accumulate_rows_", TORCH_BOX(&accumulate_rows_));
  m.impl("swiglu_rows", TORCH_BOX(&swiglu_rows));
  m.impl("swiglu_rows_backward_", TORCH_BOX(&swiglu_rows_backward_));
  m.impl("alignment_rows_", TORCH_BOX(&alignment_rows_));
  m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_));
}
