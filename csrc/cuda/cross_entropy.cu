// Cross-entropy over rows of logits, a block or a cluster of blocks a row. One pass for the maximum, the sum of
// exponentials and the arg-max (each thread keeps its own maximum and rescales its sum when that grows), one barrier,
// one pass that overwrites the logits with their gradient. Between the passes a thread keeps its packs of raw logits:
// the first in registers, the next in shared memory, and what is left is read again. A row that is held is read once
// and written once; on multiprocessors of 227 KB one block holds plain bfloat16 rows of up to 147,456 columns, a
// cluster of n n times as many (docs/decisions/0029-clusters.md). Its threads take packs in turns, as those of one
// block do. Only the thread that took a logit overwrites it, behind the barrier before which all others read theirs:
// the targets' logits, and logits[0] for smoothing.
#include <algorithm>
#include <stdexcept>

#include "../cross_entropy.h"
#include "cross_entropy_row.h"
#include "rows.h"

namespace nitp {
namespace cuda {
inline namespace cross_entropy_cu {

// Packs that a thread keeps in registers. A row with options (see Row) needs its registers for them, and four times the
// unrolled code would take as long to compile as everything else here.
template <bool Plain>
constexpr int kInRegisters = Plain ? 4 : 1;
constexpr int kMinRowThreads = 128;
// A full multiprocessor runs 1024 threads of 64 registers; float64 takes more of them.
template <class T>
constexpr int kMaxRowThreads = sizeof(T) == 8 ? 256 : 1024;

template <class A>
struct Scratch {
  RowSums<A> partials[kWarp], whole;
  RowTargets<A> targets;
};

template <class Team, bool Plain, class T, class A>
__device__ __forceinline__ void cross_entropy_row(const CrossEntropyRows<T, A>& a, int in_shared) {
  constexpr int N = kPackBytes / sizeof(T), R = kInRegisters<Plain>;
  using Piece = Pack<T, N>;
  Scratch<A>& scratch = shared<Scratch<A>>();
  Piece* held = dynamic_shared<Piece>() + threadIdx.x;
  const int threads = blockDim.x, thread = threadIdx.x, rank = Team::rank();
  const int of_team = Team::size() * threads, place = rank * threads + thread;
  const int64_t i = blockIdx.x / Team::size(), step = static_cast<int64_t>(of_team) * N;
  T* logits = a.logits + i * a.logits_stride;
  const Split<N> split = cuda::split<N>(a.columns, logits);
  const auto here = [&](int k) { return place + static_cast<int64_t>(k) * of_team < split.packs; };
  const auto column = [&](int k) { return split.pack(place + static_cast<int64_t>(k) * of_team); };

  for (int k = R; k < R + in_shared && here(k); ++k) begin_copy(held + (k - R) * threads, logits + column(k));
  Piece kept[R];
#pragma unroll
  for (int k = 0; k < R; ++k) {
    if (here(k)) kept[k] = read<N>(logits + column(k));
  }
  Row<T, A, Plain> row(a);
  if (row.smooth()) row.reference = finite_or_zero(row.value(logits[0], 0));
  if (place < kWarp) {  // the target logits, before anybody overwrites them
    A mass(0);
    int present = 0, outside = 0;
    for (int64_t k = i * a.targets + thread; k < (i + 1) * a.targets; k += kWarp) {
      const Target<T, A> target(a, k);
      a.target_logit[k] = target.inside ? row.unit * row.value(logits[target.label], target.label) : A(NAN);
      mass += target.present ? target.weight : A(0);
      present += target.present;
      outside += target.present && !target.inside;
    }
    mass = warp_sum(mass), present = warp_sum(present), outside = warp_sum(outside);
    if (place == 0) scratch.targets = {mass, present, outside};
  }

  constexpr int U = Row<T, A, Plain>::kAtOnce;
  RowSums<A> mine{A(-INFINITY), A(0), A(0), A(0), A(0), kNoColumn};
#pragma unroll
  for (int k = 0; k < R; k += U) {
    if (here(k + U - 1)) {
      row.template add<U>(mine, kept + k, column(k), step);
    } else if (here(k)) {
      row.template add<1>(mine, kept + k, column(k), step);
    }
  }
  const auto take = [&](auto width, int k) {
    Piece pieces[decltype(width)::value];
#pragma unroll
    for (int u = 0; u < decltype(width)::value; ++u) {
      pieces[u] = k + u - R < in_shared ? held[(k + u - R) * threads] : read<N>(logits + column(k + u));
    }
    row.template add<decltype(width)::value>(mine, pieces, column(k), step);
  };
  wait_for_copies();
  int k = R;
  for (; here(k + U - 1); k += U) take(Width<U>{}, k);
  for (; here(k); ++k) take(Width<1>{}, k);
  for (int64_t e = place; e < split.edges; e += of_team) {
    const auto piece = read<1>(logits + split.edge(e));
    row.template add<1>(mine, &piece, split.edge(e), 0);
  }

  const RowSums<A> none{A(-INFINITY), A(0), A(0), A(0), A(0), kNoColumn};
  const auto merge = [&](const RowSums<A>& s) { return merge_warp(s, row.exp); };
  const RowSums<A> of_block = block_merge(mine, none, scratch.partials, merge);
  const RowSums<A> sums = team_merge<Team>(of_block, none, scratch.whole, merge);
  const RowTargets<A>& targets = Team::of(0, scratch.targets);
  const bool absent = targets.present == 0;
  const A log_sum = std::log(sums.sum), max = row.unit * sums.max, lse = max + log_sum;
  const A smooth_mass = row.by_class() ? sums.mass / A(a.columns) : targets.mass;
  const TokenLoss<A> token{a.smoothing, a.z_loss, targets.mass, smooth_mass};
  if (mine.first == sums.first) {  // the one thread that has this piece and will overwrite it
    const bool is_pack = mine.first >= split.head && mine.first < split.pack(split.packs);
    int64_t best = mine.first;
    A top(-INFINITY);
    for (int64_t j = mine.first; j < mine.first + (is_pack ? N : 1); ++j) {
      const A z = row.value(logits[j], j);
      if (z > top) top = z, best = j;
    }
    a.prediction[i] = best;
  }
  if (place < kWarp) {
    A gap(0);  // sum_k w_k (lse - z_k); a weight of zero adds nothing, even to an infinite gap
    for (int64_t t = i * a.targets + thread; t < (i + 1) * a.targets; t += kWarp) {
      const Target<T, A> target(a, t);
      if (target.inside && target.weight != A(0)) gap += target.weight * (log_sum + (max - a.target_logit[t]));
    }
    gap = warp_sum(gap);
    if (place == 0) {
      const A below = row.unit * (row.by_class() ? sums.below : targets.mass * sums.below) / A(a.columns);
      const A smooth_gap = smooth_mass * (row.unit * (sums.max - row.reference) + log_sum) - below;
      a.stats[i] = absent ? A(0) : token.loss(lse, targets.outside > 0 ? A(NAN) : gap, smooth_gap);
      a.stats[a.stats_stride + i] = absent ? A(NAN) : lse;
      if (a.entropy) a.stats[2 * a.stats_stride + i] = absent ? A(NAN) : log_sum + sums.spread / sums.sum;
      if (a.parts) {
        a.parts[i] = max;
        a.parts[a.parts_stride + i] = sums.sum;
        // nothing was weighed: not 0 times an infinite maximum
        a.parts[2 * a.parts_stride + i] =
            row.smooth() ? row.unit * (sums.below - sums.mass * (sums.max - row.reference)) : A(0);
        a.parts[3 * a.parts_stride + i] = a.entropy ? sums.spread : A(0);
      }
    }
  }
  if (!a.gradient) {
    Team::sync();  // the peers have read
    return;
  }

  // not 0 * gradient: a NaN under a zero weight stays out
  const A row_scale = a.row_scale ? a.row_scale[i] : A(1), scale = targets.outside > 0 ? A(NAN) : row_scale;
  const A mass = row.by_class() ? A(1) : targets.mass;
  const SoftmaxGradient<A> slopes{max, scale * token.probability_factor(lse) / sums.sum,
                                  row.smooth() ? scale * a.smoothing * mass / A(a.columns) : A(0)};
  const SoftmaxGradient<A> of_values{sums.max, row.unit * slopes.probability, row.unit * slopes.off};
  const Writer<T, A, Plain> writer{row, of_values, !absent && row_scale != A(0)};
  for (k = R + in_shared; here(k); ++k)
    writer(logits, column(k), read<N>(logits + column(k)));  // the freshest in cache
  for (k = R; k < R + in_shared && here(k); ++k) writer(logits, column(k), read<N>(held[(k - R) * threads].at));
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (here(r)) writer(logits, column(r), unseen(kept[r]));
  }
  for (int64_t e = place; e < split.edges; e += of_team) {
    writer(logits, split.edge(e), read<1>(logits + split.edge(e)));
  }
  Team::sync();
  if (rank != 0 || !writer.live || targets.outside > 0) return;
  for (int64_t t = thread; t < a.targets; t += threads) {  // over what the whole row got; duplicates add
    const Target<T, A> target(a, i * a.targets + t);
    A weight(0);
    bool first = target.inside;
    for (int64_t other = 0; first && other < a.targets; ++other) {
      const Target<T, A> twin(a, i * a.targets + other);
      if (twin.label != target.label) continue;
      first = other >= t;
      weight += twin.weight;
    }
    if (!first) continue;
    const A z = a.target_logit[i * a.targets + t];
    const A everywhere = slopes.at(z, row.weight(target.label));
    store(logits + target.label, row.slope(z) * (everywhere - scale * token.at_target() * weight));
  }
}

template <class Team, class T, class A, bool Plain>
__global__ void __launch_bounds__(kMaxRowThreads<T>, 1) cross_entropy_rows(CrossEntropyRows<T, A> a, int in_shared) {
  if constexpr (Team::kCompiled) cross_entropy_row<Team, Plain>(a, in_shared);
}

struct Plan {
  int blocks, threads, in_shared;
  bool held;  // nothing is read again

  int64_t shared_bytes() const { return static_cast<int64_t>(in_shared) * threads * kPackBytes; }
};

// How `blocks` of so many threads take a row, if each multiprocessor has `resident` of them; `reserved` is a block's
// static part.
Plan plan(const Multiprocessor& memory, int64_t packs, int in_registers, int64_t reserved, int blocks, int threads,
          int resident) {
  constexpr int64_t kOfDriver = 1024;  // of each block
  const int64_t bytes = std::min(memory.shared_of_block, memory.shared / resident - kOfDriver) - reserved;
  const int64_t room = bytes > 0 ? bytes / (kPackBytes * threads) : 0;
  const int64_t of_block = (packs + blocks - 1) / blocks, each = (of_block + threads - 1) / threads;
  const int64_t wanted = each > in_registers ? each - in_registers : 0;
  return {blocks, threads, static_cast<int>(std::min(wanted, room)), wanted <= room};
}

// The smallest cluster that holds the row, in blocks that share their multiprocessor with others: while one waits for
// its peers or for memory, another computes. One block takes at most half of a multiprocessor's threads, those of a
// cluster a quarter, because the fewer they are the less they wait for one another; where that does not hold the row,
// clusters may have blocks of half, then of all. Three quarters of a multiprocessor's threads are enough to be busy.
// Time of 4096 bfloat16 rows of 128256 columns on an H100, over that of a copy: 1.14 by one block, 1.17 by clusters of
// two of 512 threads, 1.12 by four of 256. Where no cluster holds the row, the largest: then the fewest rows are in
// flight, and the largest part of each is read once.
template <bool Plain, class T, class A>
void start(const CrossEntropyRows<T, A>& a, int64_t rows, void* stream) {
  const Multiprocessor memory = multiprocessor();
  const int most = std::min(kMaxRowThreads<T>, memory.threads_of_block);
  const auto by_cluster = cross_entropy_rows<Cluster, T, A, Plain>;
  const auto by = [&](int blocks, int threads, int busy) {
    const int64_t packs = a.columns * sizeof(T) / kPackBytes;
    return plan(memory, packs, kInRegisters<Plain>, sizeof(Scratch<A>), blocks, threads,
                (busy + threads - 1) / threads);
  };
  const auto fits = [&](const Plan& p) {
    return p.blocks == 1 || p.blocks <= largest_cluster(by_cluster, p.threads, p.shared_bytes());
  };
  const auto chosen = [&] {
    for (const int of_cluster : {most / 4, most / 2, most}) {
      for (int blocks = 1; blocks <= kMaxCluster; blocks *= 2) {
        for (const int busy : {most, most / 4 * 3}) {
          const int limit = blocks == 1 ? std::max(of_cluster, most / 2) : of_cluster;
          for (int threads = kMinRowThreads; threads <= limit; threads *= 2) {
            const Plan p = by(blocks, threads, busy);
            if (p.held && fits(p)) return p;
          }
        }
      }
    }
    int blocks = kMaxCluster;
    while (!fits(by(blocks, most, most))) blocks /= 2;
    return by(blocks, most, most);
  };
  const Plan p = chosen();
  launch(p.blocks > 1 ? by_cluster : cross_entropy_rows<OneBlock, T, A, Plain>, Blocks(rows * p.blocks, p.blocks),
         p.threads, p.shared_bytes(), stream, a, p.in_shared);
}

}  // namespace cross_entropy_cu

template <class T, class A>
void run(const CrossEntropyRows<T, A>& a, int64_t rows, void* stream) {
  if (rows == 0) return;
  if (a.columns >= INT32_MAX) throw std::runtime_error("nitp_ops row kernel: logits has more than 2^31 - 2 columns");
  const bool plain = !a.bias && !(a.softcap > A(0)) && !(a.class_weight && a.smoothing > A(0)) && !a.entropy;
  constexpr bool has_plain = sizeof(T) < 8;  // float64 is for checks: half the code to compile
  has_plain&& plain ? start<has_plain>(a, rows, stream) : start<false>(a, rows, stream);
}

template void run(const CrossEntropyRows<double, double>&, int64_t, void*);
template void run(const CrossEntropyRows<float, float>&, int64_t, void*);
template void run(const CrossEntropyRows<bfloat16, float>&, int64_t, void*);
template void run(const CrossEntropyRows<float16, float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
