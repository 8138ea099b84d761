// Before the chunks of a token loss: row weights, the count and empty values from the labels. After
// them: the loss from the rows. The labels are read by a thread per row; what is summed over rows,
// by one block in an order that only the number of rows decides.
#include "../formulas/labels.h"
#include "kernels.h"
#include "reduce.h"

namespace nitp {
namespace cuda {
inline namespace prepare_cu {

constexpr int kReaders = 256, kAdders = 1024, kAtOnce = 8;

// use(row, load(row)) for every row, by one block: a thread has the loads of several rows in
// flight.
template <class Load, class Use>
__device__ __forceinline__ void each_row(int64_t rows, Load load, Use use) {
  for (int64_t first = threadIdx.x; first < rows; first += kAtOnce * kAdders) {
    decltype(load(first)) found[kAtOnce];
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at) {
      if (first + at * kAdders < rows) found[at] = load(first + at * kAdders);
    }
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at) {
      if (first + at * kAdders < rows) use(first + at * kAdders, found[at]);
    }
  }
}

// Scale and values of each row; its prediction says to count_rows whether it has a target.
template <class A>
__global__ void __launch_bounds__(kReaders) read_rows(PrepareRows<A> a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kReaders + threadIdx.x;
  if (row >= a.columns) return;
  const portable::RowLabels<A> labels = portable::read_labels(a, row);
  a.scale[row] = labels.weight;
  portable::clear_values(a, row);
  if (labels.present) a.prediction[row] = 0;
}

struct Counts {
  double count;
  int64_t present;
};

__device__ inline Counts warp_counts(Counts counts) {
  return warp_merge(
      counts, [](Counts x, Counts y) { return Counts{x.count + y.count, x.present + y.present}; });
}

// Of one block.
template <class A>
__global__ void __launch_bounds__(kAdders) count_rows(PrepareRows<A> a) {
  struct Scratch {
    Counts partials[kWarp];
  };
  Scratch& scratch = shared<Scratch>();
  Counts mine{0, 0};
  const auto has_target = [&](int64_t row) { return a.prediction[row] >= 0; };
  each_row(
      a.columns,
      [&](int64_t row) {
        return has_target(row) ? Counts{portable::count_of(a, row), 1} : Counts{0, 0};
      },
      [&](int64_t, const Counts& one) { mine.count += one.count, mine.present += one.present; });
  const Counts all = block_merge(mine, Counts{0, 0}, scratch.partials, warp_counts);
  const A normalizer = portable::normalizer_of(a, all.count);
  const bool too_many = a.max_rows >= 0 && all.present > a.max_rows;
  each_row(
      a.columns, [&](int64_t row) { return too_many && has_target(row) ? A(NAN) : a.scale[row]; },
      [&](int64_t row, A weight) {
        a.scale[row] = portable::scale_of(weight, normalizer);
        a.prediction[row] = -1;
      });
  if (threadIdx.x < kTotals) a.totals[threadIdx.x] = threadIdx.x == 0 ? all.present : -1;
}

// Of one block.
template <class A>
__global__ void __launch_bounds__(kAdders) add_losses(FinishRows<A> a) {
  struct Scratch {
    double partials[kWarp];
  };
  Scratch& scratch = shared<Scratch>();
  double mine = 0;
  each_row(
      a.columns, [&](int64_t row) { return portable::loss_of(a, row); },
      [&](int64_t, double loss) { mine += loss; });
  const double sum = block_merge(mine, 0.0, scratch.partials, [](double x) { return warp_sum(x); });
  if (threadIdx.x == 0) *a.loss = sum;
}

}  // namespace prepare_cu

template <class A>
void run(const PrepareRows<A>& a, int64_t, void* stream) {
  const int64_t blocks = (a.columns + kReaders - 1) / kReaders;
  if (blocks > 0) launch(read_rows<A>, blocks, kReaders, 0, stream, a);
  launch(count_rows<A>, 1, kAdders, 0, stream, a);
}

template <class A>
void run(const FinishRows<A>& a, int64_t, void* stream) {
  launch(add_losses<A>, 1, kAdders, 0, stream, a);
}

template void run(const PrepareRows<double>&, int64_t, void*);
template void run(const PrepareRows<float>&, int64_t, void*);
template void run(const FinishRows<double>&, int64_t, void*);
template void run(const FinishRows<float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
