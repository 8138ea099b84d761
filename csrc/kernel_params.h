// The parameters of the row kernels, the same on every device: one struct of pointers and strides
// per op. Strides count elements, the last axis is dense.
#pragma once
#include <cstdint>

#include "formulas/alignment.h"

namespace nitp {

template <class T>
struct SwigluRows {
  const T *gate, *up;
  T* out;
  int64_t columns, gate_stride, up_stride, out_stride;
};

template <class T>
struct SwigluRowsBackward {
  const T *gate, *up, *upstream;
  T *d_gate, *d_up;  // may be gate and up themselves
  int64_t columns, gate_stride, up_stride, upstream_stride, d_gate_stride, d_up_stride;
};

template <class T, class A>
struct AccumulateRows {
  A* sum;
  const T* addend;
  const A* factor;  // one number, of the addend; null: 1; 0 adds nothing, whatever the addend is
  int64_t columns, sum_stride, addend_stride;
};

template <class T, class Out, class A>
struct ScaleRows {
  const T* rows;
  const A* factor;  // one number
  Out* out;         // may be the rows themselves
  int64_t columns, stride, out_stride;
};

template <class P, class Z, class A>
struct AlignmentRows {
  const P* prediction;
  const Z* target;
  const int64_t* target_rows;  // null: row i of the prediction meets row i of the target
  const A* row_scale;          // null: 1
  A* stats;                    // [4, rows]: loss, cosine, |prediction|, |target|
  P* d_prediction;  // row_scale * dloss/dprediction, where `gradient`; may be the prediction itself
  Z* d_target;      // null: not wanted; row i belongs to row i of the prediction
  int64_t columns, target_count, prediction_stride, target_stride, stats_stride,
      d_prediction_stride, d_target_stride;
  A eps;
  Distance distance;
  bool gradient;
};

template <class T, class A>
struct CrossEntropyRows {
  T* logits;               // raw; overwritten with row_scale * dloss/dlogits where `gradient`
  const int64_t* labels;   // [rows, targets]
  const A* target_weight;  // [rows, targets]; null: 1
  const A* bias;           // null: none
  const A*
      class_weight;  // null: none; of the smoothing term alone, target_weight holds it for the rest
  const A* row_scale;  // null: 1
  A* stats;            // [2 or 3, rows]: loss, log-sum-exp and, where `entropy`, the entropy
  A* target_logit;     // [rows, targets]
  int64_t* prediction;
  A* softmax_partials;  // null, or [4, rows]: max, sum exp(z - max), sum u (z - max), sum exp(z -
                        // max) (max - z)
  int64_t columns, targets, logits_stride, stats_stride, softmax_partials_stride, ignore_index;
  double class_weight_mean;  // where the host may read class_weight; CUDA kernels compute it
                             // themselves
  A smoothing, z_loss, softcap, logit_scale;
  bool negative_is_absent, entropy, gradient;
};

template <class T, class A>
struct CrossEntropyGradientRows {
  T* logits;              // raw; overwritten with the gradient
  const int64_t* labels;  // [rows, targets]; those outside [0, columns) are absent
  const A* target_scale;  // [rows, targets]: target_coeff of SoftmaxGradient; zero adds nothing
  const A* target_logit;  // [rows, targets], transformed
  const A* bias;          // null: none
  const A* class_weight;  // null: 1
  const A* grad_coeffs;   // [3, rows]: the fields of SoftmaxGradient; where is_zero() the row
                          // becomes zeros
  int64_t columns, targets, logits_stride, grad_coeffs_stride;
  A softcap, logit_scale;
};

constexpr int kTotals = 5;

template <class A>
struct PrepareRows {
  const int64_t* labels;   // [rows, targets]
  const A* target_weight;  // [rows, targets]; null: 1
  const A* row_weight;     // one number, or one per row; null: 1
  const A* normalizer;  // one number; null: where `mean`, what the rows with a target count; else 1
  A* scale;             // [rows]: row weight over normalizer, 0 where nothing of the row may show
  int64_t* totals;      // rows with a target, rows with a scale, first and last row with a target,
                        // first label outside
  A *stats, *target_logit;  // as of CrossEntropyRows: 0 and NaN
  int64_t* prediction;      // -1
  int64_t columns;          // the rows
  int64_t targets, fields, stats_stride, weight_stride, ignore_index, classes, max_rows;
  bool negative_is_absent, mean, needs_target_weight;
};

template <class A>
struct FinishRows {
  const A *losses, *scale;  // [rows]
  double* loss;             // one number: sum of scale * losses
  int64_t columns;          // the rows
};

// The table of row kernels: operator, arguments, their types, schema. It declares the kernels
// (cpu/kernels.h, cuda/kernels.h), defines the operators (schemas.cpp) and registers the function
// of dispatch.h that has the operator's name (register.cpp). nitp_ops/kernels/table.py derives the
// same schemas from the torch implementations; a test compares them.
//
// `x_` overwrites its (a!) arguments; strided rows are accepted, the last axis must be dense. A
// gradient argument that is None means in place. stats tensors are [fields, rows] in the working
// precision (float64 for float64, else float32). softmax_partials [4, rows] are the sums over the
// columns of this device of a row that is sharded: max z, sum exp(z - max), sum u (z - max), sum
// exp(z - max) (max - z), whether or not a target is present. With them, prediction is that of the
// row also without a target, else -1 there. grad_coeffs [3, rows] are the coefficients of the
// gradient of the whole row: max, softmax_coeff, uniform_coeff (cross_entropy.h).
#define NITP_ROW_KERNELS(ROW)                                                                    \
  ROW(swiglu_rows, SwigluRows, (class T), (T), "(Tensor gate, Tensor up, Tensor(a!) out) -> ()") \
  ROW(swiglu_rows_backward_, SwigluRowsBackward, (class T), (T),                                 \
      "(Tensor(a!) gate, Tensor(b!) up, Tensor upstream, Tensor(c!)? d_gate=None, "              \
      "Tensor(d!)? d_up=None) -> ()")                                                            \
  ROW(alignment_rows_, AlignmentRows, (class P, class Z, class A), (P, Z, A),                    \
      "(Tensor(a!) prediction, Tensor target, Tensor? target_rows, Tensor? row_scale, "          \
      "Tensor(b!) stats, Tensor(c!)? d_prediction, Tensor(d!)? d_target, int distance, "         \
      "float eps, bool gradient) -> ()")                                                         \
  ROW(cross_entropy_rows_, CrossEntropyRows, (class T, class A), (T, A),                         \
      "(Tensor(a!) logits, Tensor labels, Tensor? target_weight, Tensor? bias, "                 \
      "Tensor? class_weight, Tensor? row_scale, Tensor(b!) stats, Tensor(c!) target_logit, "     \
      "Tensor(d!) prediction, int ignore_index, bool negative_is_absent, "                       \
      "float label_smoothing, float z_loss, float softcap, float logit_scale, bool gradient, "   \
      "Tensor(e!)? softmax_partials=None) -> ()")                                                \
  ROW(cross_entropy_gradient_rows_, CrossEntropyGradientRows, (class T, class A), (T, A),        \
      "(Tensor(a!) logits, Tensor labels, Tensor target_scale, Tensor target_logit, "            \
      "Tensor? bias, Tensor? class_weight, Tensor grad_coeffs, float softcap, "                  \
      "float logit_scale) -> ()")                                                                \
  ROW(accumulate_rows_, AccumulateRows, (class T, class A), (T, A),                              \
      "(Tensor(a!) sum, Tensor addend, Tensor? factor=None) -> ()")                              \
  ROW(scale_rows_, ScaleRows, (class T, class Out, class A), (T, Out, A),                        \
      "(Tensor(a!) rows, Tensor factor, Tensor(b!)? out=None) -> ()")                            \
  ROW(prepare_rows_, PrepareRows, (class A), (A),                                                \
      "(Tensor labels, Tensor? target_weight, Tensor? row_weight, Tensor? normalizer, "          \
      "Tensor(a!) scale, Tensor(b!) totals, Tensor(c!) stats, Tensor(d!) target_logit, "         \
      "Tensor(e!) prediction, int ignore_index, bool negative_is_absent, int classes, "          \
      "bool mean, bool needs_target_weight, int max_rows) -> ()")                                \
  ROW(finish_rows_, FinishRows, (class A), (A),                                                  \
      "(Tensor stats, Tensor scale, Tensor(a!) loss) -> ()")
#define NITP_UNPACK(...) __VA_ARGS__

}  // namespace nitp
