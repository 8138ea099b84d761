// The registers of the GEMMs by instruction set: how many numbers one holds, how they are loaded
// and stored, and the block sizes for its caches.
//
// A word is what one multiplier takes of an operand at a time: 32 bits, one float32, or two
// bfloat16 where one instruction multiplies pairs of them and adds (AVX512_BF16). AVX2 has no such
// instruction: there a bfloat16 is a word, widened.
#pragma once
#include <algorithm>

#include "../avx512.h"
#include "gemm.h"

namespace nitp {
namespace NITP_TARGET {

#ifndef __AVX512BF16__
#define NITP_GEMM_OF_FLOAT
#endif
#if defined(__AVX512BF16__) || !defined(__AVX512F__)
#define NITP_GEMM_OF_BFLOAT16
#endif

#ifdef __AVX512F__

// A tile: kHeight x kWidth sums in 28 of the 32 registers.
constexpr int kLanes = 16, kHeight = 14, kWidth = 32;
// Depth of a part, in words: a tile of it takes about 8 us and reads and writes `out` once.
constexpr int64_t kPart = 1024;
// Packed rows stay in the second-level cache (1 MiB), packed columns in the last-level one.
constexpr int64_t kBlockBytes = 256 << 10, kColumnBytes = 2 << 20;
// Words of a tile to one line that is fetched for later.
constexpr int64_t kFetchEvery = 4;

template <class T>
constexpr int64_t in_word = 4 / sizeof(T);

using Words = __m512i;
using Sums = __m512;

NITP_HD __mmask16 first(int64_t lanes) {
  return static_cast<__mmask16>((1u << std::min<int64_t>(lanes, 16)) - 1u);
}
NITP_HD __mmask32 first_32(int64_t lanes) { return lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1u; }

NITP_HD Words no_words() { return _mm512_setzero_si512(); }
NITP_HD Words words_at(const uint32_t* at) { return _mm512_load_si512(at); }
NITP_HD Words everywhere(const uint32_t* word) {
  return _mm512_set1_epi32(static_cast<int>(*word));
}
NITP_HD void put_words(uint32_t* into, Words words) { _mm512_storeu_si512(into, words); }

NITP_HD void transpose(Words (&rows)[kLanes]) {
  Words t[kLanes];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Words along a line; `count` numbers of it are there.
NITP_HD Words load_line(const float* line, int64_t count) {
  return _mm512_maskz_loadu_epi32(first(count), line);
}
NITP_HD Words load_line(const bfloat16* line, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_32(count), line);
}

// A word of each of `count` lines that lie beside each other; a bfloat16 alone has a zero for its
// pair.
NITP_HD Words load_words(const float* at, int64_t, bool, int64_t count) {
  return _mm512_maskz_loadu_epi32(first(count), at);
}
NITP_HD Words load_words(const bfloat16* at, int64_t depth_stride, bool pair, int64_t count) {
  const Words low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), at));
  if (!pair) return low;
  const Words high =
      _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), at + depth_stride));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

NITP_HD Sums no_sums() { return _mm512_setzero_ps(); }
NITP_HD Sums sums_at(const float* at) { return _mm512_load_ps(at); }
NITP_HD void multiply_add(float, Sums& sum, Words a, Words b) {
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// The first `columns` of two registers side by side, to `out` or added to it.
NITP_HD void put(float* out, Sums left, Sums right, int64_t columns, bool add) {
  const __mmask16 in_left = first(columns), in_right = first(columns > 16 ? columns - 16 : 0);
  if (add) left = _mm512_add_ps(left, _mm512_maskz_loadu_ps(in_left, out));
  if (add) right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(in_right, out + 16));
  _mm512_mask_storeu_ps(out, in_left, left);
  _mm512_mask_storeu_ps(out + 16, in_right, right);
}

#ifdef __AVX512BF16__
NITP_HD void multiply_add(bfloat16, Sums& sum, Words a, Words b) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
NITP_HD Sums widened(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
NITP_HD void put(bfloat16* out, Sums left, Sums right, int64_t columns, bool add) {
  if (add) {
    const __m512i old = _mm512_maskz_loadu_epi16(first_32(columns), out);
    left = _mm512_add_ps(left, widened(_mm512_castsi512_si256(old)));
    right = _mm512_add_ps(right, widened(_mm512_extracti64x4_epi64(old, 1)));
  }
  _mm512_mask_storeu_epi16(out, first_32(columns), (__m512i)_mm512_cvtne2ps_pbh(right, left));
}
#endif

#else  // AVX2

// 12 of the 16 registers, and half the second-level cache. Parts of 256 words were slower in
// bfloat16, whose sums then wait more often, parts of 1024 in a weight gradient of 2048 rows (0.93,
// 0.93 and 0.91 of torch.mm's time on average).
constexpr int kLanes = 8, kHeight = 6, kWidth = 16;
constexpr int64_t kPart = 512;
constexpr int64_t kBlockBytes = 192 << 10, kColumnBytes = 1 << 20;
constexpr int64_t kFetchEvery = 64;

template <class T>
constexpr int64_t in_word = 1;

using Words = __m256i;
using Sums = __m256;

NITP_HD __m256i first(int64_t lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(lanes, 8))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

NITP_HD Words no_words() { return _mm256_setzero_si256(); }
NITP_HD Words words_at(const uint32_t* at) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}
NITP_HD Words everywhere(const uint32_t* word) {
  return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(word)));
}
NITP_HD void put_words(uint32_t* into, Words words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(into), words);
}

NITP_HD void transpose(Words (&rows)[kLanes]) {
  Words t[kLanes];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
}

NITP_HD Words load_line(const float* line, int64_t count) {
  if (count >= kLanes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(line), first(count));
}
NITP_HD Words load_line(const bfloat16* line, int64_t count) {
  __m128i bits;
  if (count >= kLanes) {
    bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line));
  } else {
    alignas(16) bfloat16 there[kLanes] = {};
    std::copy_n(line, std::max<int64_t>(0, count), there);
    bits = _mm_load_si128(reinterpret_cast<const __m128i*>(there));
  }
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
template <class T>
NITP_HD Words load_words(const T* at, int64_t, bool, int64_t count) {
  return load_line(at, count);
}

NITP_HD Sums no_sums() { return _mm256_setzero_ps(); }
NITP_HD Sums sums_at(const float* at) { return _mm256_load_ps(at); }
template <class T>
NITP_HD void multiply_add(T, Sums& sum, Words a, Words b) {
  sum = _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum);
}

NITP_HD void put(float* out, Sums left, Sums right, int64_t columns, bool add) {
  if (columns >= kWidth) {
    if (add) left = _mm256_add_ps(left, _mm256_loadu_ps(out));
    if (add) right = _mm256_add_ps(right, _mm256_loadu_ps(out + kLanes));
    _mm256_storeu_ps(out, left);
    _mm256_storeu_ps(out + kLanes, right);
    return;
  }
  const __m256i in_left = first(columns), in_right = first(columns - kLanes);
  if (add) left = _mm256_add_ps(left, _mm256_maskload_ps(out, in_left));
  if (add) right = _mm256_add_ps(right, _mm256_maskload_ps(out + kLanes, in_right));
  _mm256_maskstore_ps(out, in_left, left);
  _mm256_maskstore_ps(out + kLanes, in_right, right);
}

// To nearest even; NaN stays NaN.
NITP_HD __m256i rounded(Sums x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 number = _mm256_cmp_ps(x, x, _CMP_ORD_Q);
  return _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), _mm256_srli_epi32(sum, 16),
                            _mm256_castps_si256(number));
}
NITP_HD void put(bfloat16* out, Sums left, Sums right, int64_t columns, bool add) {
  if (add) left = _mm256_add_ps(left, _mm256_castsi256_ps(load_line(out, columns)));
  if (add) {
    right = _mm256_add_ps(right, _mm256_castsi256_ps(load_line(out + kLanes, columns - kLanes)));
  }
  const __m256i crossed = _mm256_packus_epi32(rounded(left), rounded(right));
  const __m256i both = _mm256_permute4x64_epi64(crossed, 0xd8);
  if (columns >= kWidth) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), both);
  } else {
    alignas(32) bfloat16 whole[kWidth];
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole), both);
    std::copy_n(whole, columns, out);
  }
}

#endif

}  // namespace NITP_TARGET
}  // namespace nitp
