// From tensors to the row kernels of a token loss: the labels before the chunks, the rows of
// logits, the loss after them.
#pragma once

#include "argument_checks.h"

namespace {

template <class Backend>
void prepare_rows_(Tensor labels, std::optional<Tensor> target_weight,
                   std::optional<Tensor> row_weight, std::optional<Tensor> normalizer, Tensor scale,
                   Tensor totals, Tensor stats, Tensor target_logit, Tensor prediction,
                   int64_t ignore_index, bool negative_is_absent, int64_t classes, bool mean,
                   bool needs_target_weight, int64_t max_rows) {
  const ArgumentChecks<Backend> check{labels};
  NITP_CHECK(labels.dim() == 2, "nitp_ops row kernel: labels must be [rows, targets]");
  const int64_t rows = labels.size(0), targets = labels.size(1), fields = stats.size(0);
  const bool one_weight = row_weight.has_value() && row_weight->numel() == 1;
  const ScalarType work = scale.scalar_type();
  check.list(labels, "labels", rows * targets, ScalarType::Long);
  check.list(target_weight, "target_weight", rows * targets, work);
  check.list(row_weight, "row_weight", one_weight ? 1 : rows, work);
  check.list(normalizer, "normalizer", 1, work);
  check.list(scale, "scale", rows, work);
  check.list(totals, "totals", nitp::kTotals, ScalarType::Long);
  check.list(target_logit, "target_logit", rows * targets, work);
  check.list(prediction, "prediction", rows, ScalarType::Long);
  check.stats(stats, fields == 3 ? 3 : 2, rows, work);
  with_working_dtype(scale, [&](auto zero) {
    using A = decltype(zero);
    const nitp::PrepareRows<A> args{
        .labels = data<int64_t>(labels),
        .target_weight = data<A>(target_weight),
        .row_weight = data<A>(row_weight),
        .normalizer = data<A>(normalizer),
        .scale = data<A>(scale),
        .totals = data<int64_t>(totals),
        .stats = data<A>(stats),
        .target_logit = data<A>(target_logit),
        .prediction = data<int64_t>(prediction),
        .columns = rows,
        .targets = targets,
        .fields = fields,
        .stats_stride = stats.stride(0),
        .weight_stride = one_weight ? 0 : 1,
        .ignore_index = ignore_index,
        .classes = classes,
        .max_rows = max_rows,
        .negative_is_absent = negative_is_absent,
        .mean = mean,
        .needs_target_weight = needs_target_weight,
    };
    Backend::run(args, 1, labels);
  });
}

template <class Backend>
void cross_entropy_rows_(Tensor logits, Tensor labels, std::optional<Tensor> target_weight,
                         std::optional<Tensor> bias, std::optional<Tensor> class_weight,
                         std::optional<Tensor> row_scale, Tensor stats, Tensor target_logit,
                         Tensor prediction, int64_t ignore_index, bool negative_is_absent,
                         double label_smoothing, double z_loss, double softcap, double logit_scale,
                         bool gradient, std::optional<Tensor> softmax_partials) {
  const ArgumentChecks<Backend> check{logits};
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType work = working(logits.scalar_type(), logits.scalar_type());
  NITP_CHECK(labels.dim() == 2, "nitp_ops row kernel: labels must be [rows, targets]");
  const int64_t targets = labels.size(1), fields = stats.size(0);
  check.rows(logits, "logits", rows, columns);
  check.list(labels, "labels", rows * targets, ScalarType::Long);
  check.list(target_weight, "target_weight", rows * targets, work);
  check.list(bias, "bias", columns, work);
  check.list(class_weight, "class_weight", columns, work);
  check.list(row_scale, "row_scale", rows, work);
  check.list(target_logit, "target_logit", rows * targets, work);
  check.list(prediction, "prediction", rows, ScalarType::Long);
  check.stats(stats, fields == 3 ? 3 : 2, rows, work);
  if (softmax_partials.has_value()) check.stats(*softmax_partials, 4, rows, work);
  NITP_CHECK(columns > 0 || rows == 0, "nitp_ops row kernel: logits has no columns");
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = working_t<T>;
    double class_weight_mean = 0;
    if constexpr (Backend::reads_values) {
      for (int64_t v = 0; class_weight.has_value() && v < columns; ++v) {
        class_weight_mean += data<A>(class_weight)[v];
      }
      class_weight_mean /= static_cast<double>(columns);
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
        .softmax_partials = data<A>(softmax_partials),
        .columns = columns,
        .targets = targets,
        .logits_stride = logits.stride(0),
        .stats_stride = stats.stride(0),
        .softmax_partials_stride = softmax_partials.has_value() ? softmax_partials->stride(0) : 0,
        .ignore_index = ignore_index,
        .class_weight_mean = class_weight_mean,
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
void cross_entropy_gradient_rows_(Tensor logits, Tensor labels, Tensor target_scale,
                                  Tensor target_logit, std::optional<Tensor> bias,
                                  std::optional<Tensor> class_weight, Tensor grad_coeffs,
                                  double softcap, double logit_scale) {
  const ArgumentChecks<Backend> check{logits};
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType work = working(logits.scalar_type(), logits.scalar_type());
  NITP_CHECK(labels.dim() == 2, "nitp_ops row kernel: labels must be [rows, targets]");
  const int64_t targets = labels.size(1);
  check.rows(logits, "logits", rows, columns);
  check.list(labels, "labels", rows * targets, ScalarType::Long);
  check.list(target_scale, "target_scale", rows * targets, work);
  check.list(target_logit, "target_logit", rows * targets, work);
  check.list(bias, "bias", columns, work);
  check.list(class_weight, "class_weight", columns, work);
  check.stats(grad_coeffs, 3, rows, work);
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
        .grad_coeffs = data<A>(grad_coeffs),
        .columns = columns,
        .targets = targets,
        .logits_stride = logits.stride(0),
        .grad_coeffs_stride = grad_coeffs.stride(0),
        .softcap = static_cast<A>(softcap),
        .logit_scale = static_cast<A>(logit_scale),
    };
    Backend::run(args, rows, logits);
  });
}

template <class Backend>
void finish_rows_(Tensor stats, Tensor scale, Tensor loss) {
  const ArgumentChecks<Backend> check{stats};
  const int64_t rows = stats.size(1);
  const ScalarType work = stats.scalar_type();
  check.stats(stats, stats.size(0), rows, work);
  check.list(scale, "scale", rows, work);
  check.list(loss, "loss", 1, ScalarType::Double);
  with_working_dtype(stats, [&](auto zero) {
    using A = decltype(zero);
    const nitp::FinishRows<A> args{
        .losses = data<A>(stats),
        .scale = data<A>(scale),
        .loss = data<double>(loss),
        .columns = rows,
    };
    Backend::run(args, 1, stats);
  });
}

}  // namespace
