// The CPU kernels' scratch memory, and how rows of any dtype get in and out of it.
#pragma once

#include <new>

#include "../interruption.h"
#include "simd.h"

namespace led {
namespace LED_ISA {

// One allocation serves all threads. It is made before they start, so that a failure reaches the caller as
// std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlign))) {
#ifndef NDEBUG
    memset(data_, 0xFF, static_cast<size_t>(bytes));  // NaN, so that what is read before it is written shows
#endif
  }
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* at(int64_t byte) const { return data_ + byte; }

 private:
  static constexpr std::align_val_t kAlign{64};
  char* data_;
};

// Hands out 64-byte aligned arrays; a first pass over a null base counts the bytes.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

inline float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_from_bf16(uint16_t x) {
  return float_from_bits(static_cast<uint32_t>(x) << 16);
}
inline uint16_t bf16_from_float(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

inline float float_from_fp16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = static_cast<uint32_t>(x & 0x7FFFu)
                                                                         << 13;
  // 2^112 rebiases the exponent and normalizes subnormals; inf and NaN keep the largest exponent
  const float scaled = float_from_bits(rest) * float_from_bits(0x77800000u);
  const uint32_t special = rest >= 0x0F800000u ? 0x7F800000u : 0u;
  return float_from_bits(bits_from_float(scaled) | special | sign);
}
inline uint16_t fp16_from_float(float x) {
  const uint32_t bits = bits_from_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal =
      (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;  // to nearest even
  // next to 0.5 a float's last place is 2^-24, that of fp16's subnormals: the addition rounds
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(half | sign);
}

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline char* row_address(const RowsRef& x, DType dtype, int64_t batch, int64_t row, int64_t head) {
  return static_cast<char*>(x.data) +
         bytes_of(dtype) * (batch * x.batch_stride + row * x.row_stride + head * x.head_stride);
}
template <class T>
inline T* lse_address(const LseRef& x, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride + row;
}

// Rows of one head lie a whole token apart, where no hardware prefetcher follows: ask for several before the
// first use.
inline void prefetch_row(const char* row, DType dtype, int64_t count) {
  for (int64_t byte = 0; byte < count * bytes_of(dtype); byte += 64) prefetch(row + byte);
}

// dst[0 .. count) becomes scale times the row, in the accumulation type, and dst[count .. width) zeros.
template <class T>
inline void load_row(const char* src, DType dtype, int64_t count, int64_t width, T scale, T* dst) {
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < count; ++i)
        dst[i] = scale * static_cast<T>(reinterpret_cast<const float*>(src)[i]);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < count; ++i)
        dst[i] = scale * static_cast<T>(reinterpret_cast<const double*>(src)[i]);
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i)
        dst[i] = scale * static_cast<T>(float_from_fp16(reinterpret_cast<const uint16_t*>(src)[i]));
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i)
        dst[i] = scale * static_cast<T>(float_from_bf16(reinterpret_cast<const uint16_t*>(src)[i]));
      break;
  }
  for (int64_t i = count; i < width; ++i) dst[i] = T(0);
}

// The row becomes scale * src[0 .. count), rounded once.
template <class T>
inline void store_row(char* row, DType dtype, int64_t count, T scale, const T* src) {
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < count; ++i)
        reinterpret_cast<float*>(row)[i] = static_cast<float>(scale * src[i]);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < count; ++i)
        reinterpret_cast<double*>(row)[i] = static_cast<double>(scale * src[i]);
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i)
        reinterpret_cast<uint16_t*>(row)[i] = fp16_from_float(static_cast<float>(scale * src[i]));
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i)
        reinterpret_cast<uint16_t*>(row)[i] = bf16_from_float(static_cast<float>(scale * src[i]));
      break;
  }
}
inline void store_zero_row(char* row, DType dtype, int64_t count) {
  memset(row, 0, static_cast<size_t>(count * bytes_of(dtype)));
}

}  // namespace LED_ISA
}  // namespace led
