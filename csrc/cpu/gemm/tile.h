// A tile of the result: kHeight x kWidth sums in registers, fed by one panel of a and one of b. It
// reaches 99 % of what the multipliers of one core can do while the panels are in its second-level
// cache, with AVX-512 as with AVX2.
#pragma once
#include "pack.h"

namespace nitp {
namespace NITP_TARGET {

// Prefetches what will be packed next into the second-level cache while tiles compute: two
// rectangles of memory.
class Prefetcher {
 public:
  void add(const char* data, int64_t stride, int64_t bytes, int64_t rows) {
    if (rows <= 0 || bytes <= 0) return;
    (now_.rows == 0 ? now_ : next_) = {data, data + bytes, stride, bytes, rows};
  }
  NITP_HD void fetch() {
    if (now_.rows == 0) return;
    _mm_prefetch(now_.at, _MM_HINT_T1);
    now_.at += 64;
    if (now_.at < now_.end) return;
    now_.end += now_.stride;
    now_.at = now_.end - now_.bytes;
    if (--now_.rows == 0) now_ = next_, next_.rows = 0;
  }

 private:
  struct Rectangle {
    const char *at, *end;
    int64_t stride, bytes, rows;
  };
  Rectangle now_{}, next_{};
};

// Sums of so many float32 are added to `out`: the error is 1.0 to 1.2 times that of MKL's sums (1.4
// at a depth of 256), where one chain of 512 makes it 1.3 to 1.7 times, at the same speed. Of
// bfloat16 operands, themselves rounded 2^16 times as coarsely, one chain takes the whole part of
// the depth: dW took 0.98 of the time at depths over 512.
constexpr int64_t kChain = 256;

// One word of the depth.
template <int Rows, class T>
NITP_HD void multiply_add(Sums (&sums)[Rows][2], const uint32_t* a, const uint32_t* b) {
  const Words left = words_at(b), right = words_at(b + kLanes);
  for (int line = 0; line < kWidth; line += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(b + 8 * kWidth + line), _MM_HINT_T0);
  }
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
    const Words x = everywhere(a + i);
    multiply_add(T{}, sums[i][0], x, left);
    multiply_add(T{}, sums[i][1], x, right);
  }
}

template <int Rows, class T, class O>
void tile(const uint32_t* a, const uint32_t* b, int64_t words, O* out, int64_t stride, int64_t rows,
          int64_t columns, bool add, Prefetcher& prefetcher) {
  Sums sums[Rows][2];
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
    const O* row = out + std::min<int64_t>(i, rows - 1) * stride;
    _mm_prefetch(reinterpret_cast<const char*>(row), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(row + kWidth - 1), _MM_HINT_T0);
  }
  const int64_t chain = sizeof(T) < 4 ? words : kChain;
  for (int64_t begin = 0; begin < words; begin += chain) {
    const int64_t end = std::min(words, begin + chain);
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) sums[i][0] = sums[i][1] = no_sums();
    for (int64_t word = begin; word < end; word += kFetchEvery) {
      prefetcher.fetch();
      // no branch among the multiply-adds: with one in 16 words, AVX2 lost a sixth beside a busy
      // sibling of the core
      const int64_t count = std::min(end - word, kFetchEvery);
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i, a += kHeight, b += kWidth) {
        multiply_add<Rows, T>(sums, a, b);
      }
    }
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) {
      if (i < rows) put(out + i * stride, sums[i][0], sums[i][1], columns, add || begin > 0);
    }
  }
}

// rows [1, kHeight] and columns [1, kWidth] of the tile belong to out.
template <class T, int Rows = kHeight, class O>
void tile_of(const uint32_t* a, const uint32_t* b, int64_t words, O* out, int64_t stride,
             int64_t rows, int64_t columns, bool add, Prefetcher& prefetcher) {
  if constexpr (Rows > 2) {
    if (rows <= Rows - 2) {
      return tile_of<T, Rows - 2>(a, b, words, out, stride, rows, columns, add, prefetcher);
    }
  }
  tile<Rows, T>(a, b, words, out, stride, rows, columns, add, prefetcher);
}

}  // namespace NITP_TARGET
}  // namespace nitp
