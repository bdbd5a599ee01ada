// The kernels load, store, select and reduce vectors of LED_VECTOR_BYTES, and raise 2 to their power.
#pragma once

#include <math.h>

// LED_SIMD_ARRAYS takes the fallback on any compiler, to test it.
#if defined(__GNUC__) && !defined(LED_SIMD_ARRAYS)
  #include "vector_gnu.h"
#else
  #include "vector_array.h"
#endif

#ifdef _MSC_VER
  #define LED_NOINLINE __declspec(noinline)
#else
  #define LED_NOINLINE __attribute__((noinline))
#endif

namespace led {
namespace LED_ISA {

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> x;
  memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
inline void store(T* p, Vec<T> x) {
  memcpy(p, &x, sizeof(x));
}
// Is a where a > b, else b: NaN in a is dropped, as by x86's max.
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select<T>(a > b, a, b);
}
struct MaxOf {
  template <class V>
  V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};
struct SumOf {
  template <class V>
  V operator()(V a, V b) const {
    return a + b;
  }
};
template <class T>
inline T reduce_max(Vec<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  return reduce<T, kLanes<T>>(lanes, MaxOf());
}
template <class T>
inline T reduce_sum(Vec<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  return reduce<T, kLanes<T>>(lanes, SumOf());
}

// Is 2^x for x <= 128, and exactly 0 below the smallest normal number and for -inf; NaN stays NaN.
template <class T>
inline Vec<T> exp2_vec(Vec<T> x) {
  using S = Scalar<T>;
  // adding 1.5 * 2^mantissa leaves round(x) in the low bits
  const T magic = T(3) * static_cast<T>(uint64_t{1} << (S::kMantissaBits - 1));
  const Vec<T> shifted = x + magic;
  const Vec<T> fraction = x - (shifted - magic);
  Vec<T> p = broadcast<T>(S::kExp2[S::kTerms - 1]);
  for (int i = S::kTerms - 2; i >= 0; --i) p = p * fraction + broadcast<T>(S::kExp2[i]);
  p = from_bits<T>(bits_of<T>(p) + (bits_of<T>(shifted) << S::kMantissaBits));
  return select<T>(x < S::kMinExponent, broadcast<T>(0), p);
}

inline float exp2_scalar(float x) {
  return exp2f(x);
}
inline double exp2_scalar(double x) {
  return exp2(x);
}
inline float log2_scalar(float x) {
  return log2f(x);
}
inline double log2_scalar(double x) {
  return log2(x);
}
inline float erf_scalar(float x) {
  return erff(x);
}
inline double erf_scalar(double x) {
  return erf(x);
}
inline float sqrt_scalar(float x) {
  return sqrtf(x);
}
inline double sqrt_scalar(double x) {
  return sqrt(x);
}

template <class I>
inline I smaller(I a, I b) {
  return b < a ? b : a;
}
template <class I>
inline I larger(I a, I b) {
  return a < b ? b : a;
}

}  // namespace LED_ISA
}  // namespace led
