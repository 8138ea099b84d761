// A pair of rows from the view of a thread: the packs that it keeps in registers, the visits of all
// its features, the gradients that it writes.
#pragma once
#include <type_traits>

#include "pack.h"

namespace nitp {
namespace cuda {

// Packs of either row that a thread keeps. Few for what no training needs, float64 and the one half
// precision beside the other: unrolled code is slow to compile.
template <class P, class Z>
constexpr int kInRegisters =
    sizeof(P) == 8 || (sizeof(P) == sizeof(Z) && !std::is_same_v<P, Z>) ? 1 : 4;
constexpr int kMaxRowThreads = 256, kBlocks = 2;  // a bound of 128 registers a thread: no spills

template <class A, int W>
struct Values {
  static constexpr int width = W;
  A at[W];
};

template <class A>
struct Gradients {
  A p, z;
};

template <class A, class T, int W>
__device__ Values<A, W> values(const Pack<T, W>& pack) {
  Values<A, W> wide;
#pragma unroll
  for (int i = 0; i < W; ++i) wide.at[i] = static_cast<A>(widen(pack.at[i]));
  return wide;
}

template <class T, class A, int W>
__device__ void put(T* row, int64_t j, const Values<A, W>& wide) {
  Pack<T, W> pack;
#pragma unroll
  for (int i = 0; i < W; ++i) store(pack.at + i, static_cast<working_t<T>>(wide.at[i]));
  write(row + j, pack);
}

template <class P, class Z, class A>
struct Pair {
  static constexpr int N = kPackBytes / (sizeof(P) > sizeof(Z) ? sizeof(P) : sizeof(Z));
  static constexpr int R = kInRegisters<P, Z>;
  const P* p;
  const Z* z;
  P* dp;
  Z* dz;  // null: not wanted
  A scale;
  bool wanted;  // the gradients are
  Split<N> split;
  Pack<P, N> kept_p[R];
  Pack<Z, N> kept_z[R];

  __device__ bool here(int k) const {
    return threadIdx.x + static_cast<int64_t>(k) * blockDim.x < split.packs;
  }
  __device__ int64_t column(int k) const {
    return split.pack(threadIdx.x + static_cast<int64_t>(k) * blockDim.x);
  }

  __device__ void load(int64_t columns) {
    split = cuda::split<N>(columns, p, z, dp, dz ? dz : z);
#pragma unroll
    for (int k = 0; k < R; ++k) {
      if (here(k)) kept_p[k] = read<N>(p + column(k)), kept_z[k] = read<N>(z + column(k));
    }
  }
  __device__ void fill(A value, int64_t columns) const {
    for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
      put(dp, j, Values<A, 1>{{value}});
      if (dz) put(dz, j, Values<A, 1>{{value}});
    }
  }
  // body(first column, values of p, values of z) for every pack of this thread, single elements at
  // the edges.
  template <class Body>
  __device__ void packs(Body body) const {
#pragma unroll
    for (int k = 0; k < R; ++k) {
      if (here(k)) body(column(k), values<A>(unseen(kept_p[k])), values<A>(unseen(kept_z[k])));
    }
    for (int k = R; here(k); ++k) {
      body(column(k), values<A>(read<N>(p + column(k))), values<A>(read<N>(z + column(k))));
    }
    for (int64_t e = threadIdx.x; e < split.edges; e += blockDim.x) {
      const int64_t j = split.edge(e);
      body(j, values<A>(read<1>(p + j)), values<A>(read<1>(z + j)));
    }
  }
  // visit(p, z) for every feature of this thread.
  template <class Visit>
  __device__ void each(Visit visit) const {
    packs([&](int64_t, const auto& of_p, const auto& of_z) {
#pragma unroll
      for (int i = 0; i < of_p.width; ++i) visit(of_p.at[i], of_z.at[i]);
    });
  }
  // The same; what it returns becomes the gradients, where they are wanted.
  template <class Gradient>
  __device__ void overwrite(Gradient gradient) const {
    packs([&](int64_t j, auto of_p, auto of_z) {
#pragma unroll
      for (int i = 0; i < of_p.width; ++i) {
        const Gradients<A> g = gradient(of_p.at[i], of_z.at[i]);
        of_p.at[i] = g.p;
        of_z.at[i] = g.z;
      }
      if (wanted) put(dp, j, of_p);
      if (wanted && dz) put(dz, j, of_z);
    });
  }
};

}  // namespace cuda
}  // namespace nitp
