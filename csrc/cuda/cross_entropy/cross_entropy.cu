// Cross-entropy over rows of logits, a block or a cluster of blocks a row. One pass for the
// maximum, the sum of exponentials and the arg-max (each thread keeps its own maximum and rescales
// its sum when that grows), one exchange of sums, one pass that overwrites the logits with their
// gradient. Between the passes a thread keeps its packs of raw logits: the first in registers, the
// next in shared memory, and what is left is read again. A row that is held is read once and
// written once; on multiprocessors of 227 KB one block holds plain bfloat16 rows of up to 147,456
// columns, a cluster of n n times as many (docs/decisions/0029-clusters.md). Its threads take packs
// in turns, as those of one block do. A column has one thread: its block alone reads it, the
// target's logit as well, and its warp alone overwrites it.
#include <cmath>

#include "../../formulas/cross_entropy.h"
#include "../kernels.h"
#include "plan.h"
#include "row.h"

namespace nitp {
namespace cuda {
inline namespace cross_entropy_cu {

// Packs that a thread keeps in registers. A general row (see Kind) needs its registers for its
// options, and four times the unrolled code would take as long to compile as everything else here.
template <Kind K>
constexpr int kInRegisters = K == Kind::general ? 1 : 4;
// A full multiprocessor runs 1024 threads of 64 registers; float64 takes more of them.
template <class T>
constexpr int kMaxRowThreads = sizeof(T) == 8 ? 256 : 1024;

template <class Team, Kind K, class T, class A>
__device__ __forceinline__ void cross_entropy_row(const CrossEntropyRows<T, A>& a, int in_shared) {
  constexpr int N = kPackBytes / sizeof(T), R = kInRegisters<K>, U = Row<T, A, K>::kAtOnce;
  using Packed = Pack<T, N>;
  Scratch<Team, A>& scratch = shared<Scratch<Team, A>>();
  Packed* const held = dynamic_shared<Packed>() + threadIdx.x;
  const int threads = blockDim.x, thread = threadIdx.x, rank = Team::rank();
  const int of_team = Team::size() * threads, member = rank * threads + thread;
  const int64_t i = blockIdx.x / Team::size();
  T* const logits = a.logits + i * a.logits_stride;
  const Split<N> split = cuda::split<N>(a.columns, logits);
  const int head = static_cast<int>(split.head), packs = static_cast<int>(split.packs);
  const int edges = static_cast<int>(split.edges), step = of_team * N;
  const auto column = [&](int pack) { return head + pack * N; };
  const auto edge = [&](int e) { return e < head ? e : e + packs * N; };
  const auto load = [&](int pack) { return read<N>(logits + column(pack)); };
  // the packs of this thread: in registers before `from`, in shared memory before `to`, then read
  // again
  const int from = member + R * of_team, end = from + in_shared * of_team;
  const int to = end < packs ? end : packs;
  const auto owner = [&](int64_t label) {  // the member of the team that takes it
    const int j = static_cast<int>(label), pack = (j - head) / N;
    return (j < head ? j : pack < packs ? pack : j - packs * N) % of_team;
  };

  open<Team, Found<A>>(scratch.mail);
  Packed* into = held;
  for (int p = from; p < to; p += of_team, into += threads) begin_copy(into, logits + column(p));
  Packed kept[R];
#pragma unroll
  for (int k = 0; k < R; ++k) {
    if (member + k * of_team < packs) kept[k] = load(member + k * of_team);
  }
  Row<T, A, K> row(a);
  if (row.smooth()) {  // to the first column of the block
    const int first = rank * threads;
    const int j = first < packs ? column(first) : first < edges ? edge(first) : kNoColumn;
    if (j != kNoColumn) row.reference = finite_or_zero(row.value(row.key(logits[j], j)));
  }
  if (thread < kWarp) {  // the target logits, before any thread overwrites them
    A weight_sum(0), own(0);
    int present = 0, outside = 0;
    for (int64_t k = i * a.targets + thread; k < (i + 1) * a.targets; k += kWarp) {
      const Target<T, A> target(a, k);
      weight_sum += target.present ? target.weight : A(0);
      present += target.present;
      outside += target.present && !target.inside;
      if ((target.inside ? owner(target.label) / threads : 0) != rank) continue;
      const int j = static_cast<int>(target.label);
      a.target_logit[k] = target.inside ? row.unit * row.value(row.key(logits[j], j)) : A(NAN);
      own += target.inside ? target.weight : A(0);
    }
    weight_sum = warp_sum(weight_sum), own = warp_sum(own), present = warp_sum(present),
    outside = warp_sum(outside);
    if (thread == 0) scratch.targets = {weight_sum, own, present, outside};
  }

  RowSums<A> mine{A(-INFINITY), A(0), A(0),
                  A(0),         A(0), member < packs ? column(member) : kNoColumn};
  Exponential<A> exp = row.relative_to(mine.max);
#pragma unroll
  for (int k = 0; k < R; k += U) {
    if (member + (k + U - 1) * of_team < packs) {
      Packed loaded[U];
#pragma unroll
      for (int u = 0; u < U; ++u) loaded[u] = unseen(kept[k + u]);
      row.template add<U>(mine, exp, loaded, column(member + k * of_team), step);
    }
  }
  wait_for_copies();
  int p = from;
  const Packed* at = held;
  for (; p + (U - 1) * of_team < to; p += U * of_team, at += U * threads) {
    Packed loaded[U];
#pragma unroll
    for (int u = 0; u < U; ++u) loaded[u] = read<N>(at[u * threads].at);
    row.template add<U>(mine, exp, loaded, column(p), step);
  }
  for (; p + (U - 1) * of_team < packs; p += U * of_team) {
    Packed loaded[U];
#pragma unroll
    for (int u = 0; u < U; ++u) loaded[u] = load(p + u * of_team);
    row.template add<U>(mine, exp, loaded, column(p), step);
  }
  // an odd one, wherever it is: of those in shared memory the plan makes pairs
  if constexpr (U > 1) {
    Packed odd;
    if (p < packs) odd = p < to ? read<N>(at->at) : load(p);
#pragma unroll
    for (int k = 0; k < R; k += U) {
      const int q = unseen(member) + k * of_team;
      if (q < packs && q + of_team >= packs) odd = unseen(kept[k]), p = q;
    }
    if (p < packs) row.template add<1>(mine, exp, &odd, column(p), step);
  }
  for (int e = member; e < edges; e += of_team) {
    const auto single = read<1>(logits + edge(e));
    row.template add<1>(mine, exp, &single, edge(e), 0);
  }
  mine.sum *= exp.correction(), mine.entropy_sum *= exp.correction();

  const RowSums<A> none{A(-INFINITY), A(0), A(0), A(0), A(0), kNoColumn};
  const auto merge = [&](const RowSums<A>& s) { return row.merge_warp(s); };
  Found<A> found{block_merge(mine, none, scratch.partials, merge), A(0),
                 scratch.targets.own_weight_sum};
  if (row.smooth()) {
    const A shift = row.reference - row.base(found.sums.max);
    found.sums.shifted_logit_sum += found.sums.weight_sum * shift;
  }
  if (thread < kWarp) {
    for (int64_t k = i * a.targets + thread; k < (i + 1) * a.targets; k += kWarp) {
      const Target<T, A> target(a, k);
      if (!target.inside || owner(target.label) / threads != rank) continue;
      // a weight of zero adds nothing, even to an infinite gap
      if (target.weight != A(0)) {
        found.gap += target.weight * (row.unit * row.base(found.sums.max) - a.target_logit[k]);
      }
    }
    found.gap = warp_sum(found.gap);
  }
  found = exchange<Team>(scratch.mail, found, Found<A>{none, A(0), A(0)}, [&](Found<A> f) {
    const A max = warp_merge(f.sums.max, [](A x, A y) { return std::fmax(x, y); });
    const A raised = row.base(max) - row.base(f.sums.max);
    if (f.own_weight != A(0)) f.gap += f.own_weight * (row.unit * raised);
    if (f.sums.weight_sum != A(0)) f.sums.shifted_logit_sum -= f.sums.weight_sum * raised;
    return Found<A>{row.merge_warp(f.sums), warp_sum(f.gap), A(0)};
  });
  const RowSums<A>& sums = found.sums;
  const RowTargets<A> targets = scratch.targets;
  const bool absent = targets.present == 0;
  const A log_sum = std::log(sums.sum), max = row.unit * row.value(sums.max), lse = max + log_sum;
  const A smooth_weight_sum = row.by_class() ? sums.weight_sum / A(a.columns) : targets.weight_sum;
  const TokenLoss<A> token = token_loss(a, targets.weight_sum, smooth_weight_sum);
  if (mine.first == sums.first) {  // the one thread that has this pack and will overwrite it
    const bool is_pack = mine.first >= head && mine.first < column(packs);
    int best = mine.first;
    A top(-INFINITY);
    for (int j = mine.first; j < mine.first + (is_pack ? N : 1); ++j) {
      const A x = row.key(logits[j], j);
      if (x > top) top = x, best = j;
    }
    a.prediction[i] = absent && !a.softmax_partials ? -1 : best;
  }
  if (member == 0) {
    // of targets without weight nothing is left, even where the sum is no number
    const A gap = targets.weight_sum == A(0) ? found.gap : found.gap + targets.weight_sum * log_sum;
    const A shifted_mean =
        row.unit *
        (row.by_class() ? sums.shifted_logit_sum : targets.weight_sum * sums.shifted_logit_sum) /
        A(a.columns);
    a.stats[i] = absent ? A(0)
                        : token.loss(lse, targets.outside > 0 ? A(NAN) : gap,
                                     smooth_weight_sum * log_sum - shifted_mean);
    a.stats[a.stats_stride + i] = absent ? A(NAN) : lse;
    if (a.entropy) {
      a.stats[2 * a.stats_stride + i] = absent ? A(NAN) : log_sum + sums.entropy_sum / sums.sum;
    }
    if (a.softmax_partials) {
      a.softmax_partials[i] = max;
      a.softmax_partials[a.softmax_partials_stride + i] = sums.sum;
      a.softmax_partials[2 * a.softmax_partials_stride + i] =
          row.smooth() ? row.unit * sums.shifted_logit_sum : A(0);
      a.softmax_partials[3 * a.softmax_partials_stride + i] = a.entropy ? sums.entropy_sum : A(0);
    }
  }
  if (!a.gradient) return;

  const int again = unseen(member);  // else the addresses of the first pass are kept for the second
  const A row_scale = a.row_scale ? a.row_scale[i] : A(1);
  const A scale = targets.outside > 0 ? A(NAN) : row_scale;
  if (absent || row_scale == A(0)) {  // not 0 * gradient: a NaN under a zero weight stays out
    clear(logits, Split<N>{head, packs, edges}, again, of_team);
    return;
  }
  const A weight_sum = row.by_class() ? A(1) : targets.weight_sum;
  const SoftmaxGradient<A> coeffs{
      max, scale * token.softmax_weight(lse) / sums.sum,
      row.smooth() ? scale * a.smoothing * weight_sum / A(a.columns) : A(0)};
  exp = row.relative_to(sums.max);
  const Writer<T, A, K> writer{row, exp, row.common() * coeffs.softmax_coeff * exp.correction(),
                               row.common() * coeffs.uniform_coeff};
  for (p = again + (R + in_shared) * of_team; p < packs; p += of_team)
    writer(logits, column(p), load(p));  // the freshest in cache
  at = held;
  for (p = again + R * of_team; p < to; p += of_team, at += threads) {
    writer(logits, column(p), read<N>(at->at));
  }
#pragma unroll
  for (int k = 0; k < R; ++k) {
    if (again + k * of_team < packs) writer(logits, column(again + k * of_team), unseen(kept[k]));
  }
  for (int e = again; e < edges; e += of_team) {
    writer(logits, edge(e), read<1>(logits + edge(e)));
  }
  if (targets.outside > 0) return;
  __syncwarp();
  // over what its warp has written; duplicates add
  for (int64_t t = thread % kWarp; t < a.targets; t += kWarp) {
    const Target<T, A> target(a, i * a.targets + t);
    if (!target.inside || owner(target.label) / kWarp != member / kWarp) continue;
    A weight(0);
    bool first = true;
    for (int64_t other = 0; first && other < a.targets; ++other) {
      const Target<T, A> twin(a, i * a.targets + other);
      if (twin.label != target.label) continue;
      first = other >= t;
      weight += twin.weight;
    }
    if (!first) continue;
    const A z = a.target_logit[i * a.targets + t];
    const A everywhere = coeffs.at(z, row.weight(target.label));
    store(logits + target.label, row.common() * row.slope(z / row.unit) *
                                     (everywhere - scale * token.target_weight() * weight));
  }
}

template <class Team, class T, class A, Kind K>
__global__ void __launch_bounds__(kMaxRowThreads<T>, 1)
    cross_entropy_rows(CrossEntropyRows<T, A> a, int in_shared) {
  if constexpr (Team::kCompiled) cross_entropy_row<Team, K>(a, in_shared);
}

template <Kind K, class T, class A>
void start(const CrossEntropyRows<T, A>& a, int64_t rows, void* stream) {
  static DriverCache<int64_t, Plan> cache;
  const auto by_cluster = cross_entropy_rows<Cluster, T, A, K>;
  const Plan p = cache.get(current_device(), a.columns, [&] {
    const int64_t packs = a.columns * sizeof(T) / kPackBytes;
    return choose_plan(
        multiprocessor(), packs, kInRegisters<K>, sizeof(Scratch<Cluster, A>), kMaxRowThreads<T>,
        [&](const Plan& p) { return largest_cluster(by_cluster, p.threads, p.shared_bytes()); });
  });
  launch(p.blocks > 1 ? by_cluster : cross_entropy_rows<OneBlock, T, A, K>,
         Blocks(rows * p.blocks, p.blocks), p.threads, p.shared_bytes(), stream, a, p.in_shared);
}

}  // namespace cross_entropy_cu

template <class T, class A>
void run(const CrossEntropyRows<T, A>& a, int64_t rows, void* stream) {
  if (rows == 0) return;
  if (a.columns >= INT32_MAX) throw Failure("logits has more than 2^31 - 2 columns");
  const bool general = a.bias || (a.class_weight && a.smoothing > A(0)) || a.entropy;
  if constexpr (sizeof(T) == 2) {
    if (!general && a.softcap > A(0) && a.softcap < kLargestCap) {
      return start<Kind::capped>(a, rows, stream);
    }
  }
  if constexpr (sizeof(T) < 8) {  // float64 is for checks: half the code to compile
    if (!general && !(a.softcap > A(0))) return start<Kind::plain>(a, rows, stream);
  }
  start<Kind::general>(a, rows, stream);
}

template void run(const CrossEntropyRows<double, double>&, int64_t, void*);
template void run(const CrossEntropyRows<float, float>&, int64_t, void*);
template void run(const CrossEntropyRows<bfloat16, float>&, int64_t, void*);
template void run(const CrossEntropyRows<float16, float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
