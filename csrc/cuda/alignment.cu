// Alignment over pairs of rows, a block a pair: one pass for the sums, one that writes the
// gradients, also in place. What a thread reads of both rows stays in its registers between the
// passes (up to 8,192 bfloat16 or 4,096 float32 columns); longer rows are read again.
#include "../formulas/alignment.h"
#include "alignment_pair.h"
#include "kernels.h"
#include "reduce.h"

namespace nitp {
namespace cuda {
inline namespace alignment_cu {

// Shared memory of one block; every reduction has its own slots, so that one barrier each is
// enough.
template <class A>
struct Scratch {
  PairSums<A> sums[kWarp], scaled_sums[kWarp], maxima[kWarp], exponentials[kWarp];
  A loss[kWarp];
  CosineRow<A> rows[2];  // of the prediction, of the target
};

template <class A>
__device__ PairSums<A> plus(const PairSums<A>& a, const PairSums<A>& b) {
  return {a.pp + b.pp, a.zz + b.zz, a.pz + b.pz};
}

template <class A>
__device__ A block_sum(A value, A (&partials)[kWarp]) {
  return block_merge(value, A(0), partials, [](A x) { return warp_sum(x); });
}

template <class A>
__device__ PairSums<A> block_sum(const PairSums<A>& value, PairSums<A> (&partials)[kWarp]) {
  return block_merge(value, {A(0), A(0), A(0)}, partials,
                     [](const PairSums<A>& x) { return warp_merge(x, plus<A>); });
}

// Of the rows times their factors.
template <class P, class Z, class A>
__device__ PairSums<A> sums_of(const Pair<P, Z, A>& pair, PairFactors<A> by,
                               PairSums<A> (&partials)[kWarp]) {
  PairSums<A> sums{A(0), A(0), A(0)};
  pair.each([&](A p, A z) {
    p *= by.p, z *= by.z;
    sums.pp += p * p, sums.zz += z * z, sums.pz += p * z;
  });
  return block_sum(sums, partials);
}

// 1 - c, near c = 1 as half the squared chord: it keeps the digits that 1 - c loses.
template <class P, class Z, class A>
__device__ A cosine_row(const Pair<P, Z, A>& pair, PairFactors<A> by, Scratch<A>& scratch) {
  const CosineRow<A>&row = scratch.rows[0], &swapped = scratch.rows[1];
  const A of_p = row.unit_prediction, of_z = swapped.unit_prediction;
  const A a = row.of_prediction, b = row.of_target, c = swapped.of_prediction;
  const A d = swapped.of_target;
  if (!pair.wanted && !row.near) return static_cast<A>(1 - row.cosine);
  A chord(0);
  pair.overwrite([&](A p, A z) {
    p *= by.p, z *= by.z;
    const A apart = of_p * p - of_z * z;
    chord += apart * apart;
    return Gradients<A>{by.p * (a * p + b * z), by.z * (c * z + d * p)};
  });
  return row.near ? block_sum(chord, scratch.loss) / 2 : static_cast<A>(1 - row.cosine);
}

// mse and smooth_l1: a mean over features of a function of the difference.
template <class P, class Z, class A>
__device__ A difference_row(const Pair<P, Z, A>& pair, int64_t columns, bool smooth,
                            Scratch<A>& scratch) {
  const A scale = pair.scale / A(columns);
  A sum(0);
  pair.overwrite([&](A p, A z) {
    const A d = p - z, g = scale * (smooth ? smooth_l1_gradient(d) : A(2) * d);
    sum += smooth ? smooth_l1(d) : d * d;
    return Gradients<A>{g, -g};
  });
  return block_sum(sum, scratch.loss) / A(columns);
}

// kl = sum q_z (log q_z - log q_p), the logarithms relative to each row's maximum until the last
// addition.
template <class P, class Z, class A>
__device__ A kl_row(const Pair<P, Z, A>& pair, Scratch<A>& scratch) {
  const PairSums<A> lowest{A(-INFINITY), A(-INFINITY), A(0)};
  PairSums<A> max = lowest;
  pair.each([&](A p, A z) { max.pp = std::fmax(max.pp, p), max.zz = std::fmax(max.zz, z); });
  const auto largest = [](const PairSums<A>& a, const PairSums<A>& b) {
    return PairSums<A>{std::fmax(a.pp, b.pp), std::fmax(a.zz, b.zz), A(0)};
  };
  max = block_merge(max, lowest, scratch.maxima,
                    [&](const PairSums<A>& x) { return warp_merge(x, largest); });
  PairSums<A> sum{A(0), A(0), A(0)};
  pair.each([&](A p, A z) {
    const A e = exp_nonpositive(z - max.zz);
    sum.pp += exp_nonpositive(p - max.pp), sum.zz += e;
    sum.pz += e == A(0) ? A(0) : e * ((z - max.zz) - (p - max.pp));  // 0 log 0 = 0
  });
  sum = block_sum(sum, scratch.exponentials);
  const A inverse_p = A(1) / sum.pp, inverse_z = A(1) / sum.zz;
  const A offset = std::log(sum.pp) - std::log(sum.zz);
  const A kl = sum.pz * inverse_z + offset;
  if (pair.wanted) {
    pair.overwrite([&](A p, A z) {
      const A q_z = exp_nonpositive(z - max.zz) * inverse_z;
      const A q_p = exp_nonpositive(p - max.pp) * inverse_p;
      const A log_ratio = (z - max.zz) - (p - max.pp) + offset;
      return Gradients<A>{pair.scale * (q_p - q_z),
                          q_z == A(0) ? A(0) : pair.scale * q_z * (log_ratio - kl)};
    });
  }
  return kl;
}

template <class P, class Z, class A>
__global__ void __launch_bounds__(kMaxRowThreads, kBlocks)
    alignment_rows(AlignmentRows<P, Z, A> a) {
  Scratch<A>& scratch = shared<Scratch<A>>();
  const int64_t i = blockIdx.x, target_row = a.target_rows ? a.target_rows[i] : i;
  const A scale = a.row_scale ? a.row_scale[i] : A(1);
  A* stats = a.stats + i;
  Pair<P, Z, A> pair;
  pair.p = a.prediction + i * a.prediction_stride;
  pair.dp = a.d_prediction + i * a.d_prediction_stride;
  pair.dz = a.d_target ? a.d_target + i * a.d_target_stride : nullptr;
  pair.scale = scale;
  pair.wanted = a.gradient && scale != A(0);
  if (target_row < 0 || target_row >= a.target_count) {  // poisoned, and nothing is read
    if (threadIdx.x < 4) stats[threadIdx.x * a.stats_stride] = A(NAN);
    if (a.gradient) pair.fill(pair.wanted ? A(NAN) : A(0), a.columns);
    return;
  }
  pair.z = a.target + target_row * a.target_stride;
  pair.load(a.columns);

  PairSums<A> sums = sums_of(pair, PairFactors<A>(A(1), A(1)), scratch.sums);
  const PairFactors<A> by(sums, a.eps);
  if (!by.none()) sums = sums_of(pair, by, scratch.scaled_sums);  // all threads have the same sums
  // two threads at once: the float64 arithmetic of one row costs as much as that of both
  if (threadIdx.x < 2) {
    const bool first = threadIdx.x == 0;
    const PairFactors<A> swapped(by.z, by.p);
    scratch.rows[threadIdx.x] =
        CosineRow<A>(first ? sums : swap(sums), first ? by : swapped, a.eps, scale);
  }
  __syncthreads();
  A loss(0);
  switch (a.distance) {
    case Distance::cosine: loss = cosine_row(pair, by, scratch); break;
    case Distance::mse: loss = difference_row(pair, a.columns, false, scratch); break;
    case Distance::smooth_l1: loss = difference_row(pair, a.columns, true, scratch); break;
    case Distance::kl: loss = kl_row(pair, scratch); break;
  }
  // not 0 * gradient: a NaN under a zero weight stays out
  if (a.gradient && !pair.wanted) pair.fill(A(0), a.columns);
  if (threadIdx.x == 0) {
    const CosineRow<A>& row = scratch.rows[0];
    stats[0] = loss;
    stats[a.stats_stride] = static_cast<A>(row.cosine);
    stats[2 * a.stats_stride] = static_cast<A>(row.prediction_norm);
    stats[3 * a.stats_stride] = static_cast<A>(row.target_norm);
  }
}

}  // namespace alignment_cu

template <class P, class Z, class A>
void run(const AlignmentRows<P, Z, A>& a, int64_t rows, void* stream) {
  if (rows == 0) return;
  constexpr int64_t kOfThread = Pair<P, Z, A>::R * Pair<P, Z, A>::N;
  const int64_t warps = (a.columns + kOfThread * kWarp - 1) / (kOfThread * kWarp);
  const int64_t most = kMaxRowThreads / kWarp;
  const int threads = kWarp * static_cast<int>(warps < 1 ? 1 : warps < most ? warps : most);
  launch(alignment_rows<P, Z, A>, rows, threads, 0, stream, a);
}

template void run(const AlignmentRows<double, double, double>&, int64_t, void*);
template void run(const AlignmentRows<float, float, float>&, int64_t, void*);
template void run(const AlignmentRows<float, bfloat16, float>&, int64_t, void*);
template void run(const AlignmentRows<float, float16, float>&, int64_t, void*);
template void run(const AlignmentRows<bfloat16, float, float>&, int64_t, void*);
template void run(const AlignmentRows<bfloat16, bfloat16, float>&, int64_t, void*);
template void run(const AlignmentRows<bfloat16, float16, float>&, int64_t, void*);
template void run(const AlignmentRows<float16, float, float>&, int64_t, void*);
template void run(const AlignmentRows<float16, bfloat16, float>&, int64_t, void*);
template void run(const AlignmentRows<float16, float16, float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
