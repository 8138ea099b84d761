// The AVX-512 instructions of csrc/cpu/gemm/simd.h as loops over their lanes, so that its GEMMs can
// be run, and watched by sanitizers, on a processor without them. Loads and stores touch the lanes
// of their mask alone; an aligned load of an address that is not ends the run.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef int32_t __m512i __attribute__((vector_size(64)));
typedef int32_t __m256i __attribute__((vector_size(32)));
typedef float __m512 __attribute__((vector_size(64)));
typedef __m512i __m512bh;
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

#define TWIN static inline
#define _MM_HINT_T0 3
#define _MM_HINT_T1 2
#define _mm_prefetch(address, hint) static_cast<void>(address)

template <class To, class From>
To bits_of(const From& x, size_t offset = 0) {
  To y;
  std::memcpy(&y, reinterpret_cast<const char*>(&x) + offset, sizeof y);
  return y;
}
template <class Vector, class Number, class Mask>
Vector loaded(Mask mask, const void* from) {
  Number lanes[sizeof(Vector) / sizeof(Number)] = {};
  for (size_t i = 0; i < sizeof(Vector) / sizeof(Number); ++i) {
    if (mask >> i & 1) lanes[i] = static_cast<const Number*>(from)[i];
  }
  return bits_of<Vector>(lanes);
}
template <class Number, class Mask, class Vector>
void stored(void* to, Mask mask, Vector x) {
  for (size_t i = 0; i < sizeof(Vector) / sizeof(Number); ++i) {
    if (mask >> i & 1) static_cast<Number*>(to)[i] = bits_of<Number>(x, i * sizeof(Number));
  }
}
template <class Vector>
Vector aligned(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Vector) != 0) std::abort();
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

TWIN __m512i _mm512_setzero_si512() { return __m512i{}; }
TWIN __m512 _mm512_setzero_ps() { return __m512{}; }
TWIN __m512i _mm512_set1_epi32(int x) { return __m512i{} + x; }
TWIN __m512i _mm512_load_si512(const void* from) { return aligned<__m512i>(from); }
TWIN __m512 _mm512_load_ps(const void* from) { return aligned<__m512>(from); }
TWIN void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }

TWIN __m512i _mm512_maskz_loadu_epi32(__mmask16 m, const void* from) {
  return loaded<__m512i, int32_t>(m, from);
}
TWIN __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* from) {
  return loaded<__m512, float>(m, from);
}
TWIN __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void* from) {
  return loaded<__m512i, uint16_t>(m, from);
}
TWIN __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* from) {
  return loaded<__m256i, uint16_t>(m, from);
}
TWIN void _mm512_mask_storeu_ps(void* to, __mmask16 m, __m512 x) { stored<float>(to, m, x); }
TWIN void _mm512_mask_storeu_epi16(void* to, __mmask32 m, __m512i x) { stored<uint16_t>(to, m, x); }

// In each of the four quarters: numbers of `words` words, the low or the high half of both, one
// after another in turn.
TWIN __m512i unpacked(__m512i a, __m512i b, int words, bool high) {
  __m512i out{};
  for (int i = 0; i < 16; ++i) {
    const int lane = i % 4, from = i / 4 * 4 + 2 * high + lane / (2 * words) * words + lane % words;
    out[i] = lane / words % 2 == 0 ? a[from] : b[from];
  }
  return out;
}
TWIN __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked(a, b, 1, false); }
TWIN __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked(a, b, 1, true); }
TWIN __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked(a, b, 2, false); }
TWIN __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked(a, b, 2, true); }
TWIN __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int quarters) {
  __m512i out{};
  for (int i = 0; i < 16; ++i) {
    const int from = (quarters >> (2 * (i / 4)) & 3) * 4 + i % 4;
    out[i] = i < 8 ? a[from] : b[from];
  }
  return out;
}

TWIN __m512i _mm512_cvtepu16_epi32(__m256i x) {
  __m512i out{};
  for (int i = 0; i < 16; ++i) out[i] = bits_of<uint16_t>(x, 2 * i);
  return out;
}
TWIN __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
TWIN __m512i _mm512_slli_epi32(__m512i x, int bits) { return x << bits; }
TWIN __m512 _mm512_castsi512_ps(__m512i x) { return bits_of<__m512>(x); }
TWIN __m256i _mm512_castsi512_si256(__m512i x) { return bits_of<__m256i>(x); }
TWIN __m256i _mm512_extracti64x4_epi64(__m512i x, int half) {
  return bits_of<__m256i>(x, 32 * half);
}

TWIN __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
TWIN __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 sum) { return a * b + sum; }
TWIN float of_bfloat16(uint16_t x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }
TWIN __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 32; ++i) {
    sum[i / 2] +=
        of_bfloat16(bits_of<uint16_t>(a, 2 * i)) * of_bfloat16(bits_of<uint16_t>(b, 2 * i));
  }
  return sum;
}
TWIN __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  uint16_t lanes[32];
  for (int i = 0; i < 32; ++i) {
    const uint32_t x = bits_of<uint32_t>(i < 16 ? low : high, i % 16 * 4);
    lanes[i] = static_cast<uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
  return bits_of<__m512bh>(lanes);
}
