// From tensors to row kernels, whatever the device: checks devices, dtypes and shapes, fills the arguments.
//
// A Backend has: device, its name; holds(t, on), whether t lies where `on` does; reads_values, whether the host may
// read them; pairs<P, Z>, which dtypes meet in an alignment; adds<T>, which accumulate; run(args, rows, on), which
// starts a kernel.
#pragma once

#include "argument_checks.h"
#include "dispatch_cross_entropy.h"

namespace {

template <class Backend>
void swiglu_rows(Tensor gate, Tensor up, Tensor out) {
  const Door<Backend> door{gate};
  const int64_t rows = gate.size(0), columns = gate.size(1);
  door.rows(gate, "gate", rows, columns);
  door.rows(up, "up", rows, columns);
  door.rows(out, "out", rows, columns);
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
  const Door<Backend> door{gate};
  const int64_t rows = gate.size(0), columns = gate.size(1);
  const Tensor d_gate = into_gate.value_or(gate), d_up = into_up.value_or(up);
  door.rows(gate, "gate", rows, columns);
  for (const Tensor& t : {up, upstream, d_gate, d_up}) {
    door.rows(t, "up, upstream, d_gate or d_up", rows, columns);
    NITP_CHECK(t.scalar_type() == gate.scalar_type(), "nitp_ops row kernel: all must have gate's dtype");
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
  const Door<Backend> door{sum};
  const int64_t rows = sum.size(0), columns = sum.size(1);
  const ScalarType work = working(addend.scalar_type(), addend.scalar_type());
  door.rows(sum, "sum", rows, columns);
  door.rows(addend, "addend", rows, columns);
  door.list(factor, "factor", 1, work);
  NITP_CHECK(sum.scalar_type() == work, "nitp_ops row kernel: sum must be float32 (float64 for float64)");
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

// From rows to out in one dtype, or from float32 to float16, whose gradients wait for their upstream in float32.
template <class Backend>
void scale_rows_(Tensor rows, Tensor factor, std::optional<Tensor> into) {
  const Door<Backend> door{rows};
  const Tensor out = into.value_or(rows);
  door.rows(rows, "rows", rows.size(0), rows.size(1));
  door.rows(out, "out", rows.size(0), rows.size(1));
  door.list(factor, "factor", 1, working(rows.scalar_type(), rows.scalar_type()));
  const bool narrows = rows.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Half;
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
                     std::optional<Tensor> row_scale, Tensor stats, std::optional<Tensor> into_prediction,
                     std::optional<Tensor> d_target, int64_t distance, double eps, bool gradient) {
  const Door<Backend> door{prediction};
  const int64_t rows = prediction.size(0), columns = prediction.size(1);
  const Tensor d_prediction = into_prediction.value_or(prediction);
  const ScalarType work = working(prediction.scalar_type(), target.scalar_type());
  door.rows(prediction, "prediction", rows, columns);
  door.rows(d_prediction, "d_prediction", rows, columns);
  door.rows(target, "target", target_rows.has_value() ? target.size(0) : rows, columns);
  door.list(target_rows, "target_rows", rows, ScalarType::Long);
  door.list(row_scale, "row_scale", rows, work);
  door.stats(stats, 4, rows, work);
  if (d_target.has_value()) door.rows(*d_target, "d_target", rows, columns);
  NITP_CHECK(d_prediction.scalar_type() == prediction.scalar_type() &&
                 (!d_target.has_value() || d_target->scalar_type() == target.scalar_type()),
             "nitp_ops row kernel: a gradient must have its input's dtype");
  NITP_CHECK(distance >= 0 && distance <= 3, "nitp_ops row kernel: distance must be 0, 1, 2 or 3");
  const int64_t* indices = data<int64_t>(target_rows);
  if constexpr (Backend::reads_values) {
    for (int64_t i = 0; indices != nullptr && i < rows; ++i) {
      NITP_CHECK(indices[i] >= 0 && indices[i] < target.size(0), "nitp_ops row kernel: target_rows out of range");
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

template <class Backend>
void cross_entropy_rows_(Tensor logits, Tensor labels, std::optional<Tensor> target_weight, std::optional<Tensor> bias,
                         std::optional<Tensor> class_weight, std::optional<Tensor> row_scale, Tensor stats,
                         Tensor target_logit, Tensor prediction, int64_t ignore_index, bool negative_is_absent,
                         double label_smoothing, double z_loss, double softcap, double logit_scale, bool gradient,
                         std::optional<Tensor> parts) {
  const Door<Backend> door{logits};
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType work = working(logits.scalar_type(), logits.scalar_type());
  NITP_CHECK(labels.dim() == 2, "nitp_ops row kernel: labels must be [rows, targets]");
  const int64_t targets = labels.size(1), fields = stats.size(0);
  door.rows(logits, "logits", rows, columns);
  door.list(labels, "labels", rows * targets, ScalarType::Long);
  door.list(target_weight, "target_weight", rows * targets, work);
  door.list(bias, "bias", columns, work);
  door.list(class_weight, "class_weight", columns, work);
  door.list(row_scale, "row_scale", rows, work);
  door.list(target_logit, "target_logit", rows * targets, work);
  door.list(prediction, "prediction", rows, ScalarType::Long);
  door.stats(stats, fields == 3 ? 3 : 2, rows, work);
  if (parts.has_value()) door.stats(*parts, 4, rows, work);
  NITP_CHECK(columns > 0 || rows == 0, "nitp_ops row kernel: logits has no columns");
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = working_t<T>;
    double class_mass = 0;
    if constexpr (Backend::reads_values) {
      for (int64_t v = 0; class_weight.has_value() && v < columns; ++v) class_mass += data<A>(class_weight)[v];
      class_mass /= static_cast<double>(columns);
    }
    const nitp::CrossEntropyRows<T, A> args{
        .logits = data<T>(logits),
        .labels = data<int64_t>(labels),
        .target_weight = data<A>(target_weight),
        .bias = data<A>(bias),
        .class_weight = data<A>(class_weight),
        .row_scale = data<A>(row_scale),
        .stats = data<A>(stats),
        .target_logit = data<A>(target_logit),
        .prediction = data<int64_t>(prediction),
        .parts = data<A>(parts),
        .columns = columns,
        .targets = targets,
        .logits_stride = logits.stride(0),
        .stats_stride = stats.stride(0),
        .parts_stride = parts.has_value() ? parts->stride(0) : 0,
        .ignore_index = ignore_index,
        .class_mass = class_mass,
        .smoothing = static_cast<A>(label_smoothing),
        .z_loss = static_cast<A>(z_loss),
        .softcap = static_cast<A>(softcap),
        .logit_scale = static_cast<A>(logit_scale),
        .negative_is_absent = negative_is_absent,
        .entropy = fields == 3,
        .gradient = gradient,
    };
    Backend::run(args, rows, logits);
  });
}

template <class Backend>
void cross_entropy_gradient_rows_(Tensor logits, Tensor labels, Tensor target_scale, Tensor target_logit,
                                  std::optional<Tensor> bias, std::optional<Tensor> class_weight, Tensor factors,
                                  double softcap, double logit_scale) {
  const Door<Backend> door{logits};
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType work = working(logits.scalar_type(), logits.scalar_type());
  NITP_CHECK(labels.dim() == 2, "nitp_ops row kernel: labels must be [rows, targets]");
  const int64_t targets = labels.size(1);
  door.rows(logits, "logits", rows, columns);
  door.list(labels, "labels", rows * targets, ScalarType::Long);
  door.list(target_scale, "target_scale", rows * targets, work);
  door.list(target_logit, "target_logit", rows * targets, work);
  door.list(bias, "bias", columns, work);
  door.list(class_weight, "class_weight", columns, work);
  door.stats(factors, 3, rows, work);
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = working_t<T>;
    const nitp::CrossEntropyGradientRows<T, A> args{
        .logits = data<T>(logits),
        .labels = data<int64_t>(labels),
        .target_scale = data<A>(target_scale),
        .target_logit = data<A>(target_logit),
        .bias = data<A>(bias),
        .class_weight = data<A>(class_weight),
        .factors = data<A>(factors),
        .columns = columns,
        .targets = targets,
        .logits_stride = logits.stride(0),
        .factors_stride = factors.stride(0),
        .softcap = static_cast<A>(softcap),
        .logit_scale = static_cast<A>(logit_scale),
    };
    Backend::run(args, rows, logits);
  });
}

}  // namespace
