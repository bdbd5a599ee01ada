// Philox4x32-10 (Salmon et al., SC 2011) draws the same numbers as led_kernels/philox.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
  #define LED_HOST_DEVICE __host__ __device__
#else
  #define LED_HOST_DEVICE
#endif

namespace led {

constexpr uint32_t kBandedStream = 0, kGlobalStream = 1;

// Makes one round on the counter c under the key (k0, k1).
LED_HOST_DEVICE inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                                         uint32_t k1) {
  const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

LED_HOST_DEVICE inline void philox_next_key(uint32_t& k0, uint32_t& k1) {
  k0 += 0x9E3779B9u;
  k1 += 0xBB67AE85u;
}

}  // namespace led
