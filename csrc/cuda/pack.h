// 16-byte accesses to rows that start anywhere: a row is `head` single elements up to the first
// aligned address, then packs of N elements, then single elements again. Both ends aligned_alike
// are the edges.
#pragma once
#include <type_traits>

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

// In one instruction: left to itself, the compiler stores the packs of an unrolled loop word by
// word.
template <class T, int N>
__device__ void write(T* p, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof pack == 16) {
    uint4 words;
    memcpy(&words, &pack, sizeof pack);
    *reinterpret_cast<uint4*>(p) = words;
    return;
  } else if constexpr (sizeof pack == 8) {
    uint2 words;
    memcpy(&words, &pack, sizeof pack);
    *reinterpret_cast<uint2*>(p) = words;
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// The same pack, of which the compiler knows nothing: else it keeps the widened values of one pass
// for the next, in twice the registers that the pack itself takes.
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

__device__ inline int unseen(int number) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// The largest number of U packs in half precision; a NaN is left out where there is a number. Two
// comparisons at once.
template <int U, class T, int N>
__device__ float largest_of(const Pack<T, N>* packs) {
#ifdef __CUDA_ARCH__
  uint32_t words[U * N / 2];
  memcpy(words, packs, sizeof words);
  const auto of_two = [](uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    } else {
      asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    }
    return a;
  };
#pragma unroll
  for (int i = 1; i < U * N / 2; ++i) words[0] = of_two(words[0], words[i]);
  const uint32_t both = of_two(words[0], words[0] >> 16 | words[0] << 16);
  return widen(T{static_cast<uint16_t>(both)});
#else
  float top = -INFINITY;
  for (int i = 0; i < U * N; ++i) top = std::fmax(top, widen(packs[i / N].at[i % N]));
  return top;
#endif
}

// Rounded once.
template <class T, class A, int N>
__device__ Pack<T, N> narrow(const A (&values)[N]) {
  Pack<T, N> pack;
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2 && N > 1) {
    uint32_t words[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(words[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(words[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      }
    }
    memcpy(&pack, words, sizeof pack);
    return pack;
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < N; ++i) store(pack.at + i, values[i]);
    return pack;
  }
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
  const bool aligned_alike = ((elements_to_boundary<N>(others) == head) && ...);
  const int64_t packs = aligned_alike && head < columns ? (columns - head) / N : 0;
  return {packs > 0 ? head : columns, packs, columns - packs * N};
}

// The packs and edges of one of `threads` threads become zeros.
template <int N, class T>
__device__ void clear(T* row, const Split<N>& split, int64_t thread, int threads) {
  for (int64_t p = thread; p < split.packs; p += threads) write(row + split.pack(p), Pack<T, N>{});
  for (int64_t e = thread; e < split.edges; e += threads) write(row + split.edge(e), Pack<T, 1>{});
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
constexpr int kPacksOfThread =
    2;  // of each operand: with three operands 96 bytes a thread in flight
constexpr int kMaxThreads = 256;

// Dense rows are one long row.
template <class... Strides>
void flatten(int64_t& rows, int64_t& columns, Strides... strides) {
  if (!((strides == columns) && ...)) return;
  columns *= rows;
  rows = rows > 0 ? 1 : 0;
}

// As few tiles as blocks of kMaxThreads allow, and no more threads in each than its share of the
// packs needs.
template <int N>
Tiles tiles(int64_t columns) {
  constexpr int64_t kOfTile = kMaxThreads * kPacksOfThread;
  const int64_t packs = (columns + N - 1) / N, of_row = (packs + kOfTile - 1) / kOfTile;
  if (of_row == 0) return {0, kWarp};
  const int64_t of_warp = of_row * kPacksOfThread * kWarp;  // packs, if each tile has one warp
  return {static_cast<unsigned>(of_row), static_cast<int>((packs + of_warp - 1) / of_warp * kWarp)};
}

// finish(width, column, load(width, column)) for every pack and edge of the tile; all packs are
// loaded before the first is finished, because a store may alias the next load.
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
  const int64_t per_tile = static_cast<int64_t>(kPacksOfThread) * threads * N;
  const int64_t end = (tile + 1) * per_tile;
  for (int64_t i = tile * per_tile + threadIdx.x; i < split.edges && i < end; i += threads) {
    const int64_t j = split.edge(i);
    finish(Width<1>{}, j, load(Width<1>{}, j));
  }
}

}  // namespace cuda
}  // namespace nitp
