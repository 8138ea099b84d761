// What every formula header needs: the host/device mark, the working precision of a storage type,
// and exp / tanh in a form that compilers vectorise.
//
// Each CPU instruction set compiles the headers into a namespace of its own (NITP_TARGET), so that
// the linker can never hand an AVX-512 body to a machine without it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define NITP_HD __host__ __device__ __forceinline__
#else
#define NITP_HD inline __attribute__((always_inline))
#endif

#ifndef NITP_TARGET
#define NITP_TARGET portable
#endif

namespace nitp {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace NITP_TARGET {

// Working precision: float64 stays, everything narrower is computed in float32.
template <class T>
struct Working {
  using type = float;
};
template <>
struct Working<double> {
  using type = double;
};
template <class T>
using working_t = typename Working<T>::type;

NITP_HD float widen(float x) { return x; }
NITP_HD double widen(double x) { return x; }
NITP_HD float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

NITP_HD void store(float* p, float x) { *p = x; }
NITP_HD void store(double* p, double x) { *p = x; }
NITP_HD void store(bfloat16* p, float x) {  // round to nearest even; NaN stays NaN
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
#endif
}

// Half precision by integer arithmetic, in a form that compilers vectorise. Exponents differ by 127
// - 15 = 112.
NITP_HD float widen(float16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t size = (x.bits & 0x7fffu) << 13;  // exponent and fraction at float32's places
  uint32_t bits = size + (112u << 23);
  bits += size >= (31u << 23) ? 112u << 23 : 0u;  // infinity and NaN keep the largest exponent
  const uint32_t tiny_bits = bits + (1u << 23), offset_bits = 113u << 23;
  float tiny, offset, y;
  memcpy(&tiny, &tiny_bits, sizeof tiny);
  memcpy(&offset, &offset_bits, sizeof offset);
  tiny -= offset;  // a subnormal half: 2^-14 (1 + fraction) - 2^-14
  memcpy(&y, &bits, sizeof y);
  y = size < (1u << 23) ? tiny : y;
  return x.bits & 0x8000u ? -y : y;
#endif
}
NITP_HD void store(float16* p,
                   float x) {  // round to nearest even; beyond 65504 infinity, NaN stays NaN
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  float magnitude = x < 0.0f ? -x : x;
  magnitude += 0.5f;  // the spacing of floats from 0.5 on is 2^-24, that of subnormal halves: the
                      // sum rounds as they do
  uint32_t tiny;
  memcpy(&tiny, &magnitude, sizeof tiny);
  tiny -= 126u << 23;
  uint32_t half = size < (113u << 23) ? tiny : normal;
  half = size >= (143u << 23) ? (size > (255u << 23) ? 0x7e00u : 0x7c00u) : half;
  p->bits = static_cast<uint16_t>(sign | half);
#endif
}

#ifdef __CUDA_ARCH__
constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
#endif

// exp(x) for x <= 0 (all that soft-max, sigmoid and tanh need): x = n ln2 + r, |r| <= ln2 / 2, and
// a degree-6 Chebyshev fit of exp(r); relative error at most 1e-7, 8e-8 by fused multiply-adds
// (measured at 2e7 points), 0 under -87.7, NaN stays NaN.
NITP_HD float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  // Two instructions where expf takes eight; the difference x - max is formed before, so that only
  // its rounding counts.
  return power_of_two(x * kLog2e);
#else
  const float clamped = -88.0f > x ? -88.0f : x;
  const float shifted =
      clamped * 1.44269504f + 12583039.0f;  // 1.5 * 2^23 + 127: the sum rounds to an integer
  const float n = shifted - 12583039.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  const float tail = 0.5f + r * (0.1666657599f +
                                 r * (0.04166655336f + r * (0.008363345811f + r * 0.00139263919f)));
  const float power = 1.0f + r * (1.0f + r * tail);
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;  // the low bits of `shifted` hold n + 127; n = -127 gives a scale of 0
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return power * scale;
#endif
}
NITP_HD double exp_nonpositive(double x) { return std::exp(x); }

// tanh: near zero x + x^3 Q(x^2) (Chebyshev fit on |x| <= 0.6), else (1 - e) / (1 + e) with e =
// exp(-2 |x|); relative error at most 1.6e-7 (measured likewise).
NITP_HD float tanh_of(float x) {
#ifdef __CUDA_ARCH__
  return tanhf(x);
#else
  const float t = x * x;
  const float q =
      -0.3333333033f +
      t * (0.1333291537f + t * (-0.05387394885f + t * (0.02111095905f + t * -0.00626911972f)));
  const float size = x < 0.0f ? -x : x;
  const float e = exp_nonpositive(-2.0f * size);
  const float far = (1.0f - e) / (1.0f + e);
  return size < 0.6f ? x + x * t * q : (x < 0.0f ? -far : far);
#endif
}
NITP_HD double tanh_of(double x) { return std::tanh(x); }

NITP_HD float quotient(float a, float b) {  // a / b with |b| < 2^126
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);  // two instructions, 2 ulp; the IEEE division is a dozen and a branch
#else
  return a / b;
#endif
}
NITP_HD double quotient(double a, double b) { return a / b; }

// sigmoid(x) without overflow on either side.
template <class A>
NITP_HD A sigmoid(A x) {
  const A e = exp_nonpositive(x < A(0) ? x : -x);
  return quotient(x < A(0) ? e : A(1), A(1) + e);
}

}  // namespace NITP_TARGET
}  // namespace nitp
