// There are two accumulation types. Everything of one instruction set lives in namespace led::LED_ISA, so
// that no function compiled for it is linked into another's.
#pragma once

#include <cstdint>
#include <limits>

#include "../attention_params.h"

namespace led {
namespace LED_ISA {

template <class T>
struct Scalar;

template <>
struct Scalar<float> {
  using Bits = int32_t;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr int kMantissaBits = 23;
  static constexpr float kMinExponent = -126.0f;
  // This polynomial is 2^x on [-1/2, 1/2], with a relative error of 2e-9 and exact at 0.
  static constexpr int kTerms = 7;
  static constexpr float kExp2[kTerms] = {1.0f,           0.693147182f,   0.240226477f,   0.0555033199f,
                                          0.00961843878f, 0.00133990031f, 0.000153532586f};
};

template <>
struct Scalar<double> {
  using Bits = int64_t;
  static constexpr DType kDType = DType::kFloat64;
  static constexpr int kMantissaBits = 52;
  static constexpr double kMinExponent = -1022.0;
  // This polynomial is 2^x on [-1/2, 1/2], with a relative error of 3e-18.
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

// A comparison of integers has lanes like theirs.
template <>
struct Scalar<int32_t> {
  using Bits = int32_t;
};
template <>
struct Scalar<int64_t> {
  using Bits = int64_t;
};

template <class T>
constexpr int kLanes = LED_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

}  // namespace LED_ISA
}  // namespace led
