// The CPU row kernels as plain C++: one struct of pointers and strides an op, one function over rows [begin, end).
// Strides count elements; the last axis is dense. Every .cpp beside this file is compiled once for each
// instruction set into a namespace of its own; entry.cpp picks the namespace at run time.
#pragma once
#include <cstdint>

#include "../alignment.h"

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

template <class T>
struct AccumulateRows {
  float* sum;
  const T* addend;
  int64_t columns, sum_stride, addend_stride;
};

template <class P, class Z, class A>
struct AlignmentRows {
  const P* prediction;
  const Z* target;
  const int64_t* target_rows;  // null: row i of the prediction meets row i of the target
  const A* row_scale;          // null: 1
  A* stats;                    // [4, rows]: loss, cosine, |prediction|, |target|
  P* d_prediction;             // row_scale * dloss/dprediction, where `gradient`; may be the prediction itself
  Z* d_target;                 // null: not wanted; row i belongs to row i of the prediction
  int64_t columns, prediction_stride, target_stride, stats_stride, d_prediction_stride, d_target_stride;
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
  const A* class_weight;   // null: none; of the smoothing term alone, target_weight holds it for the rest
  const A* row_scale;      // null: 1
  A* stats;                // [2 or 3, rows]: loss, log-sum-exp and, where `entropy`, the entropy
  A* target_logit;         // [rows, targets]
  int64_t* prediction;
  int64_t columns, targets, logits_stride, stats_stride, ignore_index;
  double class_mass;  // mean of class_weight
  A smoothing, z_loss, softcap, logit_scale;
  bool negative_is_absent, entropy, gradient;
};

#define NITP_DECLARE_ROWS(target)                                            \
  namespace target {                                                         \
  template <class T>                                                         \
  void swiglu_rows(const SwigluRows<T>&, int64_t, int64_t);                  \
  template <class T>                                                         \
  void swiglu_rows_backward(const SwigluRowsBackward<T>&, int64_t, int64_t); \
  template <class P, class Z, class A>                                       \
  void alignment_rows(const AlignmentRows<P, Z, A>&, int64_t, int64_t);      \
  template <class T, class A>                                                \
  void cross_entropy_rows(const CrossEntropyRows<T, A>&, int64_t, int64_t);  \
  template <class T>                                                         \
  void accumulate_rows(const AccumulateRows<T>&, int64_t, int64_t);          \
  }

NITP_DECLARE_ROWS(portable)
NITP_DECLARE_ROWS(avx2)
NITP_DECLARE_ROWS(avx512)
#undef NITP_DECLARE_ROWS

enum class InstructionSet { portable, avx2, avx512 };

}  // namespace nitp

// The best set that this CPU has and this library holds, decided when the library loads; tests choose lesser ones.
extern "C" __attribute__((visibility("default"))) const char* nitp_ops_instruction_set();
extern "C" __attribute__((visibility("default"))) bool nitp_ops_choose_instruction_set(const char* name);
nitp::InstructionSet nitp_instruction_set();
