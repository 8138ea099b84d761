// A loop over the columns of a row. Its body gets an accessor that loads and stores: one column, in
// a loop that compilers vectorise; or, where the numbers are bfloat16 and the processor has
// AVX-512, sixteen columns as `Lanes`, for two instructions that compilers do not find:
// multiplication by a power of two (vscalefps: no clamp, no integer arithmetic in exp) and, in the
// set avx512_bf16, rounding to bfloat16 (vcvtneps2bf16: one instruction for eight).
//
// That rounding treats subnormal numbers (under 2^-126) as zero, as the bfloat16 dot products of
// the same processors do.
#pragma once
#include <type_traits>

#include "../host_device.h"
#ifdef __AVX512F__
#include "avx512.h"
#endif

#define NITP_INLINE __attribute__((always_inline))

namespace nitp {
namespace NITP_TARGET {

struct Column {
  int64_t j;

  template <class T>
  NITP_HD working_t<T> load(const T* row) const {
    return widen(row[j]);
  }
  template <class T>
  NITP_HD void store(T* row, working_t<T> x) const {
    NITP_TARGET::store(row + j, x);
  }
};

#ifdef __AVX512F__

// The operators that formulas use; the compiler contracts them to fused multiply-adds.
struct Lanes {
  static constexpr int64_t count = 16;
  __m512 v;

  NITP_HD Lanes(__m512 lanes) : v(lanes) {}
  NITP_HD Lanes(float x) : v(_mm512_set1_ps(x)) {}
  NITP_HD friend Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.v, b.v); }
  NITP_HD friend Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.v, b.v); }
  NITP_HD friend Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.v, b.v); }
  NITP_HD friend Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.v, b.v); }
  NITP_HD float total() const { return _mm512_reduce_add_ps(v); }
};

// 2^t: t = n + f, |f| <= 1/2, and a degree-5 fit of 2^f with relative error 9.1e-8.
NITP_HD Lanes power_of_two(Lanes t) {
  const Lanes f = _mm512_reduce_ps(t.v, 0), n = t - f;
  const Lanes tail =
      Lanes(0.05550733581f) + f * (Lanes(0.009671512991f) + f * Lanes(0.001326472382f));
  const Lanes power = Lanes(1) + f * (Lanes(0.6931470037f) + f * (Lanes(0.2402224243f) + f * tail));
  return _mm512_scalef_ps(power.v, n.v);
}

// Here for every x. The rounding of the argument adds |x| 6e-8 to the relative error: before a
// rounding to bfloat16, and in a sum of exponentials, nothing.
NITP_HD Lanes exp_nonpositive(Lanes x) { return power_of_two(x * Lanes(1.44269504f)); }
NITP_HD Lanes sigmoid(Lanes x) {
  return Lanes(1) / (Lanes(1) + power_of_two(x * Lanes(-1.44269504f)));
}

struct LaneColumns {
  int64_t j;
  __mmask16 mask;  // of the last columns of a row

  NITP_HD Lanes load(const float* row) const { return _mm512_maskz_loadu_ps(mask, row + j); }
  NITP_HD Lanes load(const bfloat16* row) const {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + j));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  NITP_HD Lanes only(Lanes x) const { return _mm512_maskz_mov_ps(mask, x.v); }
  NITP_HD void store(float* row, Lanes x) const { _mm512_mask_storeu_ps(row + j, mask, x.v); }
  NITP_HD void store(bfloat16* row, Lanes x) const {
    _mm256_mask_storeu_epi16(row + j, mask, rounded(x));
  }

 private:
  NITP_HD static __m256i rounded(Lanes x) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
    const __m512i bits = _mm512_castps_si512(x.v), last = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(last, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 number = _mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, sum, 16));
#endif
  }
};

template <class Body>
NITP_HD void over_lanes(int64_t columns, const Body body) {
  int64_t j = 0;
  for (; j + Lanes::count <= columns; j += Lanes::count) body(LaneColumns{j, 0xffff});
  if (j < columns) body(LaneColumns{j, static_cast<__mmask16>((1 << (columns - j)) - 1)});
}

template <class Body>
NITP_HD float sum_over_lanes(int64_t columns, const Body body) {
  Lanes sum(0.0f);
  over_lanes(columns, [body, &sum](LaneColumns at) NITP_INLINE { sum = sum + at.only(body(at)); });
  return sum.total();
}

template <class T>
constexpr bool by_lanes = std::is_same_v<T, bfloat16>;

#else

template <class T>
constexpr bool by_lanes = false;

#endif

// T: of the numbers that the body stores.
template <class T, class Body>
NITP_HD void over_columns(int64_t columns, const Body body) {
  if constexpr (by_lanes<T>) {
    over_lanes(columns, body);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) body(Column{j});
  }
}

// The sum of what the body returns.
template <class T, class A, class Body>
NITP_HD A sum_over_columns(int64_t columns, const Body body) {
  if constexpr (by_lanes<T>) {
    return sum_over_lanes(columns, body);
  } else {
    A sum(0);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) sum += body(Column{j});
    return sum;
  }
}

}  // namespace NITP_TARGET
}  // namespace nitp
