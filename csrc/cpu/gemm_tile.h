// A tile of a product: kHeight x kWidth sums in 28 of the 32 registers, fed by one panel of a and one of b. It reaches
// 99 % of what the multipliers of one core can do while the panels are in its second-level cache.
#pragma once
#include "gemm_pack.h"

namespace nitp {
namespace NITP_TARGET {

constexpr int kHeight = 14, kWidth = 32;

NITP_HD void multiply_add(float, __m512& sum, __m512i a, __m512i b) {
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
NITP_HD void put(float* out, __m512 left, __m512 right, int64_t columns, bool add) {
  const __mmask16 in_left = first(columns), in_right = first(columns > 16 ? columns - 16 : 0);
  if (add) left = _mm512_add_ps(left, _mm512_maskz_loadu_ps(in_left, out));
  if (add) right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(in_right, out + 16));
  _mm512_mask_storeu_ps(out, in_left, left);
  _mm512_mask_storeu_ps(out + 16, in_right, right);
}

#ifdef __AVX512BF16__
NITP_HD void multiply_add(bfloat16, __m512& sum, __m512i a, __m512i b) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
NITP_HD __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
NITP_HD void put(bfloat16* out, __m512 left, __m512 right, int64_t columns, bool add) {
  const __mmask32 inside = columns >= 32 ? 0xffffffffu : (1u << columns) - 1u;
  if (add) {
    const __m512i old = _mm512_maskz_loadu_epi16(inside, out);
    left = _mm512_add_ps(left, widened(_mm512_castsi512_si256(old)));
    right = _mm512_add_ps(right, widened(_mm512_extracti64x4_epi64(old, 1)));
  }
  _mm512_mask_storeu_epi16(out, inside, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}
#endif

// What will be packed next comes into the second-level cache while tiles compute: two rectangles of memory.
class Ahead {
 public:
  void add(const char* data, int64_t stride, int64_t bytes, int64_t rows) {
    if (rows > 0 && bytes > 0) (now_.rows == 0 ? now_ : next_) = {data, data + bytes, stride, bytes, rows};
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

// Sums of so many float32 are added to `out`: the error is 1.0 to 1.2 times that of MKL's sums (1.4 at a depth of 256),
// where one chain of 512 makes it 1.3 to 1.7 times, at the same speed. Of bfloat16 operands, themselves rounded 2^16
// times as coarsely, one chain takes the whole part of the depth: dW took 0.98 of the time at depths over 512.
constexpr int64_t kChain = 256;

template <int Rows, class T, class O>
void tile(const uint32_t* a, const uint32_t* b, int64_t words, O* out, int64_t stride, int64_t rows, int64_t columns,
          bool add, Ahead& ahead) {
  __m512 sums[Rows][2];
  for (int i = 0; i < Rows; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(out + std::min<int64_t>(i, rows - 1) * stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(out + std::min<int64_t>(i, rows - 1) * stride) + 64, _MM_HINT_T0);
  }
  const int64_t chain = sizeof(T) < 4 ? words : kChain;
  for (int64_t begin = 0; begin < words; begin += chain) {
    const int64_t end = std::min(words, begin + chain);
    for (int i = 0; i < Rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t word = begin; word < end; ++word, a += kHeight, b += kWidth) {
      const __m512i left = _mm512_load_si512(b), right = _mm512_load_si512(b + 16);
      _mm_prefetch(reinterpret_cast<const char*>(b + 8 * kWidth), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(b + 8 * kWidth + 16), _MM_HINT_T0);
      if (word % 4 == 0) ahead.fetch();
#pragma GCC unroll 14
      for (int i = 0; i < Rows; ++i) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(a[i]));
        multiply_add(T{}, sums[i][0], x, left);
        multiply_add(T{}, sums[i][1], x, right);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      if (i < rows) put(out + i * stride, sums[i][0], sums[i][1], columns, add || begin > 0);
    }
  }
}

// rows [1, 14] and columns [1, 32] of the tile belong to out.
template <class T, class O>
void tile_of(const uint32_t* a, const uint32_t* b, int64_t words, O* out, int64_t stride, int64_t rows, int64_t columns,
             bool add, Ahead& ahead) {
  switch ((rows + 1) / 2) {
    case 1: return tile<2, T>(a, b, words, out, stride, rows, columns, add, ahead);
    case 2: return tile<4, T>(a, b, words, out, stride, rows, columns, add, ahead);
    case 3: return tile<6, T>(a, b, words, out, stride, rows, columns, add, ahead);
    case 4: return tile<8, T>(a, b, words, out, stride, rows, columns, add, ahead);
    case 5: return tile<10, T>(a, b, words, out, stride, rows, columns, add, ahead);
    case 6: return tile<12, T>(a, b, words, out, stride, rows, columns, add, ahead);
    default: return tile<14, T>(a, b, words, out, stride, rows, columns, add, ahead);
  }
}

}  // namespace NITP_TARGET
}  // namespace nitp
