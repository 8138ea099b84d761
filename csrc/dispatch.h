// From tensors to row kernels, for every device: checks devices, dtypes and shapes, fills the
// arguments.
//
// A Backend has: device, its name; holds(t, on), whether t lies where `on` does; reads_values,
// whether the host may read them; pairs<P, Z>, which dtypes meet in an alignment; adds<T>, which
// accumulate; run(args, rows, on), which launches a kernel.
#pragma once

#include "argument_checks.h"
#include "dispatch_cross_entropy.h"

namespace {

template <class Backend>
void swiglu_rows(Tensor gate, Tensor up, Tensor out) {
  const ArgumentChecks<Backend> check{gate};
  const int64_t rows = gate.size(0), columns = gate.size(1);
  check.rows(gate, "gate", rows, columns);
  check.rows(up, "up", rows, columns);
  check.rows(out, "out", rows, columns);
  NITP_CHECK(up.scalar_type() == gate.scalar_type() && out.scalar_type() == gate.scalar_type(),
             "nitp_ops row kernel: gate, up and out must share one dtype");
  with_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    const nitp::SwigluRows<T> args{
        .gate = data<T>(gate),
        .up = data<T>(up),
        .out = data<T>(out),
        .columns = columns,
        .gate_stride = gate.stride(0),
        .up_stride = up.stride(0),
        .out_stride = out.stride(0),
    };
    Backend::run(args, rows, gate);
  });
}

template <class Backend>
void swiglu_rows_backward_(Tensor gate, Tensor up, Tensor upstream, std::optional<Tensor> into_gate,
                           std::optional<Tensor> into_up) {
  const ArgumentChecks<Backend> check{gate};
  const int64_t rows = gate.size(0), columns = gate.size(1);
  const Tensor d_gate = into_gate.value_or(gate), d_up = into_up.value_or(up);
  check.rows(gate, "gate", rows, columns);
  for (const Tensor& t : {up, upstream, d_gate, d_up}) {
    check.rows(t, "up, upstream, d_gate or d_up", rows, columns);
    NITP_CHECK(t.scalar_type() == gate.scalar_type(),
               "nitp_ops row kernel: all must have gate's dtype");
  }
  with_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    const nitp::SwigluRowsBackward<T> args{
        .gate = data<T>(gate),
        .up = data<T>(up),
        .upstream = data<T>(upstream),
        .d_gate = data<T>(d_gate),
        .d_up = data<T>(d_up),
        .columns = columns,
        .gate_stride = gate.stride(0),
        .up_stride = up.stride(0),
        .upstream_stride = upstream.stride(0),
        .d_gate_stride = d_gate.stride(0),
        .d_up_stride = d_up.stride(0),
    };
    Backend::run(args, rows, gate);
  });
}

template <class Backend>
void accumulate_rows_(Tensor sum, Tensor addend, std::optional<Tensor> factor) {
  const ArgumentChecks<Backend> check{sum};
  const int64_t rows = sum.size(0), columns = sum.size(1);
  const ScalarType work = working(addend.scalar_type(), addend.scalar_type());
  check.rows(sum, "sum", rows, columns);
  check.rows(addend, "addend", rows, columns);
  check.list(factor, "factor", 1, work);
  NITP_CHECK(sum.scalar_type() == work,
             "nitp_ops row kernel: sum must be float32 (float64 for float64)");
  with_dtype(addend, [&](auto zero) {
    using T = decltype(zero);
    using A = working_t<T>;
    if constexpr (Backend::template adds<T>) {
      const nitp::AccumulateRows<T, A> args{
          .sum = data<A>(sum),
          .addend = data<T>(addend),
          .factor = data<A>(factor),
          .columns = columns,
          .sum_stride = sum.stride(0),
          .addend_stride = addend.stride(0),
      };
      Backend::run(args, rows, sum);
    } else {
      NITP_CHECK(false, "nitp_ops row kernel: addend must not be float16 on ", Backend::device);
    }
  });
}

// From rows to out in one dtype, or from float32 to float16, whose gradients wait for their
// upstream in float32.
template <class Backend>
void scale_rows_(Tensor rows, Tensor factor, std::optional<Tensor> into) {
  const ArgumentChecks<Backend> check{rows};
  const Tensor out = into.value_or(rows);
  check.rows(rows, "rows", rows.size(0), rows.size(1));
  check.rows(out, "out", rows.size(0), rows.size(1));
  check.list(factor, "factor", 1, working(rows.scalar_type(), rows.scalar_type()));
  const bool narrows =
      rows.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Half;
  NITP_CHECK(narrows || out.scalar_type() == rows.scalar_type(),
             "nitp_ops row kernel: out must have the dtype of rows (or be float16 beside float32)");
  with_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    using A = working_t<T>;
    const auto run = [&](auto of_out) {
      using Out = decltype(of_out);
      const nitp::ScaleRows<T, Out, A> args{
          .rows = data<T>(rows),
          .factor = data<A>(factor),
          .out = data<Out>(out),
          .columns = rows.size(1),
          .stride = rows.stride(0),
          .out_stride = out.stride(0),
      };
      Backend::run(args, rows.size(0), rows);
    };
    if constexpr (std::is_same_v<T, float>) {
      if (narrows) return run(float16{});
    }
    run(zero);
  });
}

template <class Backend>
void alignment_rows_(Tensor prediction, Tensor target, std::optional<Tensor> target_rows,
                     std::optional<Tensor> row_scale, Tensor stats,
                     std::optional<Tensor> into_prediction, std::optional<Tensor> d_target,
                     int64_t distance, double eps, bool gradient) {
  const ArgumentChecks<Backend> check{prediction};
  const int64_t rows = prediction.size(0), columns = prediction.size(1);
  const Tensor d_prediction = into_prediction.value_or(prediction);
  const ScalarType work = working(prediction.scalar_type(), target.scalar_type());
  check.rows(prediction, "prediction", rows, columns);
  check.rows(d_prediction, "d_prediction", rows, columns);
  check.rows(target, "target", target_rows.has_value() ? target.size(0) : rows, columns);
  check.list(target_rows, "target_rows", rows, ScalarType::Long);
  check.list(row_scale, "row_scale", rows, work);
  check.stats(stats, 4, rows, work);
  if (d_target.has_value()) check.rows(*d_target, "d_target", rows, columns);
  NITP_CHECK(d_prediction.scalar_type() == prediction.scalar_type() &&
                 (!d_target.has_value() || d_target->scalar_type() == target.scalar_type()),
             "nitp_ops row kernel: a gradient must have its input's dtype");
  NITP_CHECK(distance >= 0 && distance <= 3, "nitp_ops row kernel: distance must be 0, 1, 2 or 3");
  const int64_t* indices = data<int64_t>(target_rows);
  if constexpr (Backend::reads_values) {
    for (int64_t i = 0; indices != nullptr && i < rows; ++i) {
      NITP_CHECK(indices[i] >= 0 && indices[i] < target.size(0),
                 "nitp_ops row kernel: target_rows out of range");
    }
  }
  with_dtype(prediction, [&](auto p) {
    with_dtype(target, [&](auto z) {
      using P = decltype(p);
      using Z = decltype(z);
      if constexpr (!Backend::template pairs<P, Z>) {
        NITP_CHECK(false, "nitp_ops row kernel: float64 meets only float64 on ", Backend::device);
      } else {
        using A = decltype(working_t<P>{} + working_t<Z>{});
        const nitp::AlignmentRows<P, Z, A> args{
            .prediction = data<P>(prediction),
            .target = data<Z>(target),
            .target_rows = indices,
            .row_scale = data<A>(row_scale),
            .stats = data<A>(stats),
            .d_prediction = data<P>(d_prediction),
            .d_target = data<Z>(d_target),
            .columns = columns,
            .target_count = target.size(0),
            .prediction_stride = prediction.stride(0),
            .target_stride = target.stride(0),
            .stats_stride = stats.stride(0),
            .d_prediction_stride = d_prediction.stride(0),
            .d_target_stride = d_target.has_value() ? d_target->stride(0) : 0,
            .eps = static_cast<A>(eps),
            .distance = static_cast<nitp::Distance>(distance),
            .gradient = gradient,
        };
        Backend::run(args, rows, prediction);
      }
    });
  });
}

}  // namespace
