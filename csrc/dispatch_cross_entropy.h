// From tensors to the kernels before and after the chunks of a token loss: dispatch.h's for the others.
#pragma once

#include "argument_checks.h"

namespace {

template <class Backend>
void prepare_rows_(Tensor labels, std::optional<Tensor> target_weight, std::optional<Tensor> row_weight,
                   std::optional<Tensor> normalizer, Tensor scale, Tensor totals, Tensor stats, Tensor target_logit,
                   Tensor prediction, int64_t ignore_index, bool negative_is_absent, int64_t classes, bool mean,
                   bool needs_target_weight, int64_t max_rows) {
  const Door<Backend> door{labels};
  NITP_CHECK(labels.dim() == 2, "nitp_ops row kernel: labels must be [rows, targets]");
  const int64_t rows = labels.size(0), targets = labels.size(1), fields = stats.size(0);
  const bool one_weight = row_weight.has_value() && row_weight->numel() == 1;
  const ScalarType work = scale.scalar_type();
  door.list(labels, "labels", rows * targets, ScalarType::Long);
  door.list(target_weight, "target_weight", rows * targets, work);
  door.list(row_weight, "row_weight", one_weight ? 1 : rows, work);
  door.list(normalizer, "normalizer", 1, work);
  door.list(scale, "scale", rows, work);
  door.list(totals, "totals", nitp::kTotals, ScalarType::Long);
  door.list(target_logit, "target_logit", rows * targets, work);
  door.list(prediction, "prediction", rows, ScalarType::Long);
  door.stats(stats, fields == 3 ? 3 : 2, rows, work);
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
void finish_rows_(Tensor stats, Tensor scale, Tensor loss) {
  const Door<Backend> door{stats};
  const int64_t rows = stats.size(1);
  const ScalarType work = stats.scalar_type();
  door.stats(stats, stats.size(0), rows, work);
  door.list(scale, "scale", rows, work);
  door.list(loss, "loss", 1, ScalarType::Double);
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
