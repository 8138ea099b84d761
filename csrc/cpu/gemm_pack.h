// Operands of a product in the order in which its tiles read them: panels of `Size` lines, in each panel word after
// word of depth, in each word line after line. A word is 32 bits: one float32, or two bfloat16 that one instruction
// multiplies and adds. Lines and depths that are not there are zeros.
#pragma once
#include <algorithm>

#include "avx512.h"
#include "gemm.h"

namespace nitp {
namespace NITP_TARGET {

template <class T>
constexpr int64_t in_word = 4 / sizeof(T);

NITP_HD int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

NITP_HD __mmask16 first(int64_t lanes) { return static_cast<__mmask16>((1u << std::min<int64_t>(lanes, 16)) - 1u); }

// Words from one panel to the next. With a depth of a power of two they would share sets of the caches but for the two
// lines more: packing the columns of bfloat16 dh took 1.5 and 1.9 cycles a word without them, 0.9 with.
template <int Size>
NITP_HD int64_t panel(int64_t words) {
  return words * Size + 32;
}

// How far ahead of the loads the lines are fetched: in bytes along a line, in words across lines. Bfloat16 products
// took 0.97 of the libraries' time with it, 0.99 without (means over four shapes, one run each).
constexpr int64_t kAheadBytes = 256, kAheadWords = 8;

NITP_HD void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
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

NITP_HD __m512i load_line(const float* line, int64_t count) { return _mm512_maskz_loadu_epi32(first(count), line); }
NITP_HD __m512i load_line(const bfloat16* line, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffffu : (1u << count) - 1u, line);
}

// Lines that are dense along the depth.
template <int Size, class T>
void pack_dense_lines(Operand<T> x, int64_t begin, int64_t end, int64_t from, int64_t depth, uint32_t* out) {
  for (int64_t i = begin; i < end; i += Size, out += panel<Size>(parts_of(depth, in_word<T>))) {
    for (int64_t part = 0; part < Size; part += 16) {
      const int64_t lanes = std::min<int64_t>(16, Size - part);
      const int64_t present = std::max<int64_t>(0, std::min(lanes, end - i - part));
      const T* lines = x.data + (i + part) * x.line + from;
      for (int64_t j = 0; j < depth; j += 16 * in_word<T>, lines += 16 * in_word<T>) {
        __m512i rows[16];
        for (int64_t row = 0; row < 16; ++row) {
          rows[row] = _mm512_setzero_si512();
          if (row >= present) continue;
          rows[row] = load_line(lines + row * x.line, depth - j);
          _mm_prefetch(reinterpret_cast<const char*>(lines + row * x.line) + kAheadBytes, _MM_HINT_T0);
        }
        transpose(rows);
        uint32_t* into = out + j / in_word<T> * Size + part;
        const int64_t words = std::min<int64_t>(16, parts_of(depth - j, in_word<T>));
        for (int64_t word = 0; word < words; ++word) {
          _mm512_mask_storeu_epi32(into + word * Size, first(lanes), rows[word]);
        }
      }
    }
  }
}

NITP_HD __m512i load_words(const float* at, int64_t, bool, __mmask16 lines) {
  return _mm512_maskz_loadu_epi32(lines, at);
}
NITP_HD __m512i load_words(const bfloat16* at, int64_t depth_stride, bool pair, __mmask16 lines) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lines, at));
  if (!pair) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lines, at + depth_stride));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Lines that lie beside each other. All panels of a depth, then the next: their numbers are neighbours in memory.
template <int Size, class T>
void pack_neighbours(Operand<T> x, int64_t begin, int64_t end, int64_t from, int64_t depth, uint32_t* out) {
  const int64_t next = panel<Size>(parts_of(depth, in_word<T>)),
                bytes = (end - begin) * static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < depth; j += in_word<T>) {
    const T* lines = x.data + begin + (from + j) * x.depth;
    for (int64_t row = kAheadWords * in_word<T>; row < (kAheadWords + 1) * in_word<T>; ++row) {
      const char* ahead = reinterpret_cast<const char*>(lines + row * x.depth);
      for (int64_t byte = 0; byte < bytes; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T0);
    }
    uint32_t* into = out + j / in_word<T> * Size;
    for (int64_t i = begin; i < end; i += Size, lines += Size, into += next) {
      for (int64_t part = 0; part < Size; part += 16) {
        const __mmask16 present = first(std::max<int64_t>(0, std::min<int64_t>(Size, end - i) - part));
        const __m512i words = load_words(lines + part, x.depth, j + 1 < depth, present);
        _mm512_mask_storeu_epi32(into + part, first(Size - part), words);
      }
    }
  }
}

// The panels of lines [begin, end) at depths [from, from + depth).
template <int Size, class T>
void pack(Operand<T> x, int64_t begin, int64_t end, int64_t from, int64_t depth, uint32_t* out) {
  if (x.depth == 1) {
    pack_dense_lines<Size>(x, begin, end, from, depth, out);
  } else {
    pack_neighbours<Size>(x, begin, end, from, depth, out);
  }
}

}  // namespace NITP_TARGET
}  // namespace nitp
