// exp(unit (v - base)) for many v beside one base, and tanh, in as few instructions as the error
// budget allows.
#pragma once
#include <cmath>

#include "../../host_device.h"
#include "../launch.h"

namespace nitp {
namespace cuda {

using namespace portable;

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float exp2_of(float x) { return power_of_two(x); }
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float exp2_of(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
constexpr float kLog2e = 1.44269504f;
#endif

// float64 and what is computed once a thread: the difference first.
template <class A>
__device__ A exp_of_difference(A unit, A difference) {
  return exp_nonpositive(unit * difference);
}

template <class A>
struct Exponential {
  A unit, base;

  __device__ Exponential(A unit, A base, A) : unit(unit), base(base) {}
  __device__ Exponential(A unit, A base) : Exponential(unit, base, unit) {}
  __device__ A operator()(A v) const { return exp_of_difference(unit, v - base); }
  __device__ A correction() const { return A(1); }
};

// float32: 2^(rate v - offset), one multiply-add into the exponential, with offset = rate base
// rounded. What the rounding leaves out, `residual`, is exact and the same for all v: the result is
// exp(unit (v - base)) 2^-residual, and a sum is set right by one `correction`. From |offset| =
// 2^31 on the residual itself could overflow. There neighbouring floats are so far apart that only
// v = base counts, whatever the rate, and a power of two as rate leaves no residual.
template <>
struct Exponential<float> {
  float rate, offset, residual;

  // base: `base_unit` / `unit` times the base of the values
  __device__ Exponential(float unit, float base, float base_unit) : rate(unit * kLog2e) {
    float base_rate = base_unit * kLog2e;
    offset = base * base_rate;
    if (!(std::fabs(offset) < 2147483648.0f)) {
      rate = base_rate = without_fraction(base_rate);
      offset = base * base_rate;
    }
    residual = std::fma(base, base_rate, -offset);
  }
  __device__ Exponential(float unit, float base) : Exponential(unit, base, unit) {}
  __device__ float operator()(float v) const { return exp2_of(std::fma(v, rate, -offset)); }
  __device__ float correction() const { return exp2_of(-residual); }

 private:
  static __device__ float without_fraction(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0xff800000u;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// tanh = 1 - 2 / (1 + exp(2 x)), off by 2e-7: for logits that are in half precision.
__device__ inline float half_tanh(float x) {
  return std::fma(-2.0f, reciprocal(1.0f + exp2_of(x * (2.0f * kLog2e))), 1.0f);
}

// For gradients alone. bfloat16, whose logits are rounded by 2^-9: the device's own approximation
// in one instruction instead of two on the same unit, off by 2^-11; on the CPU tanh rounded to
// that. float16 has digits that it would lose.
template <class T>
__device__ float gradient_tanh(float x) {
  return half_tanh(x);
}
template <>
__device__ inline float gradient_tanh<bfloat16>(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = half_tanh(x), far = y * 8193.0f;
  return y - y == 0.0f ? far - (far - y) : y;
#endif
}

}  // namespace cuda
}  // namespace nitp
