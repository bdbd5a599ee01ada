// Vectors of LED_VECTOR_BYTES, by the compiler's vector extension: one source for SSE, NEON, AVX2 and
// AVX-512. Everything lives in namespace led::LED_ISA, so that no function compiled for one instruction set
// is linked into another.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>
#include <limits>

namespace led {
namespace LED_ISA {

template <class T>
struct Scalar;

template <>
struct Scalar<float> {
  using Bits = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kMinExponent = -126.0f;
  // 2^x on [-1/2, 1/2], relative error 9e-8 and exact at 0
  static constexpr int kTerms = 6;
  static constexpr float kExp2[kTerms] = {1.0f,          0.693147004f,   0.240222409f,
                                          0.0555073507f, 0.00967161916f, 0.00132645911f};
};

template <>
struct Scalar<double> {
  using Bits = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kMinExponent = -1022.0;
  // 2^x on [-1/2, 1/2], relative error 3e-18
  static constexpr int kTerms = 12;
  static constexpr double kExp2[kTerms] = {1.0,
                                           0.69314718055994533,
                                           0.24022650695910158,
                                           0.055504108664819887,
                                           0.009618129107587695,
                                           0.0013333558146795935,
                                           0.00015403530463340714,
                                           1.5252733486003772e-5,
                                           1.3215432662196435e-6,
                                           1.0178199007253608e-7,
                                           7.0741819456159963e-9,
                                           4.4352281013764685e-10};
};

template <class T>
constexpr int kLanes = LED_VECTOR_BYTES / sizeof(T);

#if defined(__GNUC__)
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(LED_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using BitsVec = Vec<typename Scalar<T>::Bits>;

template <class T>
inline Vec<T> select(BitsVec<T> condition, Vec<T> yes, Vec<T> no) {
  return condition ? yes : no;
}
template <class T>
inline BitsVec<T> bits_of(Vec<T> x) {
  return (BitsVec<T>)x;
}
template <class T>
inline Vec<T> from_bits(BitsVec<T> x) {
  return (Vec<T>)x;
}
template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // the form that compilers turn into one instruction
}
// Folds the vector in halves.
template <class T, int lanes, class Fold>
inline T reduce(const T* x, Fold fold) {
  if constexpr (lanes == 2) {
    return fold(x[0], x[1]);
  } else {
    typedef T Half __attribute__((vector_size(lanes / 2 * sizeof(T))));
    Half low, high;
    memcpy(&low, x, sizeof(Half));
    memcpy(&high, x + lanes / 2, sizeof(Half));
    const Half folded = fold(low, high);
    T rest[lanes / 2];
    memcpy(rest, &folded, sizeof(Half));
    return reduce<T, lanes / 2>(rest, fold);
  }
}
  #define LED_NOINLINE __attribute__((noinline))
  #define LED_UNROLL _Pragma("GCC unroll 16")
inline void prefetch(const char* p) {
  __builtin_prefetch(p);
}
#else
// The same operators on an array, for compilers without the extension (MSVC).
template <class T>
struct ArrayVec {
  T lane[LED_VECTOR_BYTES / sizeof(T)];
  T& operator[](int i) { return lane[i]; }
  const T& operator[](int i) const { return lane[i]; }
};
template <class T>
using Vec = ArrayVec<T>;
template <class T>
using BitsVec = ArrayVec<typename Scalar<T>::Bits>;

  #define LED_ARRAY_OPERATOR(op)                                              \
    template <class T>                                                        \
    inline ArrayVec<T> operator op(ArrayVec<T> a, const ArrayVec<T>& b) {     \
      for (int i = 0; i < kLanes<T>; ++i) a.lane[i] = a.lane[i] op b.lane[i]; \
      return a;                                                               \
    }                                                                         \
    template <class T>                                                        \
    inline ArrayVec<T> operator op(ArrayVec<T> a, T b) {                      \
      for (int i = 0; i < kLanes<T>; ++i) a.lane[i] = a.lane[i] op b;         \
      return a;                                                               \
    }
LED_ARRAY_OPERATOR(+)
LED_ARRAY_OPERATOR(-)
LED_ARRAY_OPERATOR(*)
LED_ARRAY_OPERATOR(&)
LED_ARRAY_OPERATOR(|)
  #undef LED_ARRAY_OPERATOR
template <class T>
inline ArrayVec<T> operator<<(ArrayVec<T> a, int n) {
  for (int i = 0; i < kLanes<T>; ++i) a.lane[i] = static_cast<T>(static_cast<uint64_t>(a.lane[i]) << n);
  return a;
}
  #define LED_ARRAY_COMPARE(op)                                                        \
    template <class T>                                                                 \
    inline BitsVec<T> operator op(const ArrayVec<T>& a, const ArrayVec<T>& b) {        \
      BitsVec<T> r;                                                                    \
      for (int i = 0; i < kLanes<T>; ++i) r.lane[i] = a.lane[i] op b.lane[i] ? -1 : 0; \
      return r;                                                                        \
    }                                                                                  \
    template <class T>                                                                 \
    inline BitsVec<T> operator op(const ArrayVec<T>& a, T b) {                         \
      BitsVec<T> r;                                                                    \
      for (int i = 0; i < kLanes<T>; ++i) r.lane[i] = a.lane[i] op b ? -1 : 0;         \
      return r;                                                                        \
    }
LED_ARRAY_COMPARE(<)
LED_ARRAY_COMPARE(>)
LED_ARRAY_COMPARE(<=)
LED_ARRAY_COMPARE(>=)
LED_ARRAY_COMPARE(==)
  #undef LED_ARRAY_COMPARE
template <class T>
inline Vec<T> select(const BitsVec<T>& condition, Vec<T> yes, const Vec<T>& no) {
  for (int i = 0; i < kLanes<T>; ++i) yes.lane[i] = condition.lane[i] ? yes.lane[i] : no.lane[i];
  return yes;
}
template <class T>
inline BitsVec<T> bits_of(Vec<T> x) {
  BitsVec<T> r;
  memcpy(&r, &x, sizeof(r));
  return r;
}
template <class T>
inline Vec<T> from_bits(BitsVec<T> x) {
  Vec<T> r;
  memcpy(&r, &x, sizeof(r));
  return r;
}
template <class T>
inline Vec<T> broadcast(T x) {
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r.lane[i] = x;
  return r;
}
template <class T, int lanes, class Fold>
inline T reduce(const T* x, Fold fold) {
  T r = x[0];
  for (int i = 1; i < lanes; ++i) r = fold(r, x[i]);
  return r;
}
  #define LED_NOINLINE __declspec(noinline)
  #define LED_UNROLL
inline void prefetch(const char*) {}
#endif

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
// a where a > b, else b: NaN in a is dropped, as by x86's max.
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

// 2^x for x <= 128; exactly 0 below the smallest normal number and for -inf; NaN stays NaN.
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

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

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
