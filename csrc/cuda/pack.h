// 16-byte accesses to rows that start anywhere: a row is `head` single elements up to the first aligned address, then
// packs of N elements, then single elements again. Both ends together are the edges.
#pragma once
#include "../host_device.h"
#include "launch.h"

namespace nitp {
namespace cuda {

using namespace portable;  // formulas: compiled once here

constexpr int kPackBytes = 16;

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <int N, class T>
__device__ Pack<T, N> read(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// To global memory, in one instruction: left to itself, the compiler stores the packs of an unrolled loop word by word.
template <class T, int N>
__device__ void write(T* p, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof pack >= 8) {
    uint32_t w[sizeof pack / sizeof(uint32_t)];
    memcpy(w, &pack, sizeof pack);
    const auto address = __cvta_generic_to_global(p);
    if constexpr (sizeof pack == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                   : "memory");
    } else {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(w[0]), "r"(w[1]) : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// The same pack, of which the compiler knows nothing: else it keeps the widened values of one pass for the next, in
// twice the registers that the pack itself takes.
template <class T, int N>
__device__ Pack<T, N> unseen(Pack<T, N> pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) < sizeof(uint32_t)) {
    uint32_t words[sizeof(pack) / sizeof(uint32_t)];
    memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (uint32_t& word : words) asm volatile("" : "+r"(word));
    memcpy(&pack, words, sizeof pack);
  }
#endif
  return pack;
}

template <int N>
struct Split {
  int64_t head, packs, edges;

  __device__ int64_t pack(int64_t i) const { return head + i * N; }
  __device__ int64_t edge(int64_t i) const { return i < head ? i : i + packs * N; }
};

template <int N, class T>
__device__ int64_t elements_to_boundary(const T* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return static_cast<int64_t>((0 - address) % sizeof(Pack<T, N>) / sizeof(T));
}

// Rows whose addresses reach their boundaries at different columns have no packs.
template <int N, class First, class... Others>
__device__ Split<N> split(int64_t columns, const First* first, const Others*... others) {
  const int64_t head = elements_to_boundary<N>(first);
  const bool together = ((elements_to_boundary<N>(others) == head) && ...);
  const int64_t packs = together && head < columns ? (columns - head) / N : 0;
  return {packs > 0 ? head : columns, packs, columns - packs * N};
}

template <int N>
struct Width {
  static constexpr int value = N;
};

// Elementwise kernels: a block takes one tile of one row.
struct Tiles {
  unsigned of_row;
  int threads;
};
constexpr int kPacksOfThread = 2;  // of each operand: with three operands 96 bytes a thread in flight
constexpr int kMaxThreads = 256;

// Dense rows are one long row.
template <class... Strides>
void flatten(int64_t& rows, int64_t& columns, Strides... strides) {
  if (!((strides == columns) && ...)) return;
  columns *= rows;
  rows = rows > 0 ? 1 : 0;
}

template <int N>
Tiles tiles(int64_t columns) {
  const int64_t packs = (columns + N - 1) / N, wanted = (packs + kPacksOfThread - 1) / kPacksOfThread;
  const int64_t threads = wanted < kMaxThreads ? wanted / 32 * 32 + 32 : kMaxThreads;
  const int64_t of_tile = threads * kPacksOfThread;
  return {static_cast<unsigned>((packs + of_tile - 1) / of_tile), static_cast<int>(threads)};
}

// finish(width, column, load(width, column)) for every piece of the tile; all packs are loaded before the first is
// finished, because a store may alias the next load.
template <int N, class Load, class Finish>
__device__ void over_tile(const Split<N>& split, int64_t tile, Load load, Finish finish) {
  const int threads = blockDim.x;
  const int64_t first = tile * kPacksOfThread * threads + threadIdx.x;
  decltype(load(Width<N>{}, 0)) operands[kPacksOfThread];
#pragma unroll
  for (int k = 0; k < kPacksOfThread; ++k) {
    const int64_t i = first + k * threads;
    if (i < split.packs) operands[k] = load(Width<N>{}, split.pack(i));
  }
#pragma unroll
  for (int k = 0; k < kPacksOfThread; ++k) {
    const int64_t i = first + k * threads;
    if (i < split.packs) finish(Width<N>{}, split.pack(i), operands[k]);
  }
  const int64_t per_tile = static_cast<int64_t>(kPacksOfThread) * threads * N, end = (tile + 1) * per_tile;
  for (int64_t i = tile * per_tile + threadIdx.x; i < split.edges && i < end; i += threads) {
    const int64_t j = split.edge(i);
    finish(Width<1>{}, j, load(Width<1>{}, j));
  }
}

}  // namespace cuda
}  // namespace nitp
