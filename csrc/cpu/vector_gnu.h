// GCC and Clang have an extension for vectors, which makes this one source serve SSE, NEON, AVX2 and AVX-512.
#pragma once

#include <string.h>

#include <cstdint>

#include "scalar.h"

namespace led {
namespace LED_ISA {

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
#define LED_UNROLL _Pragma("GCC unroll 16")
inline void prefetch(const char* p) {
  __builtin_prefetch(p);
}

}  // namespace LED_ISA
}  // namespace led
