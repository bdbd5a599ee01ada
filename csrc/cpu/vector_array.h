// An array has the operators of vector_gnu.h, for compilers without the extension (MSVC).
#pragma once

#include <string.h>

#include <cstdint>

#include "scalar.h"

namespace led {
namespace LED_ISA {

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
#define LED_UNROLL
inline void prefetch(const char*) {}

}  // namespace LED_ISA
}  // namespace led
