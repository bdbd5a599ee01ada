// Tells which instruction sets this build holds and this processor runs.
#include "kernel_table.h"

#if defined(_MSC_VER) && defined(_M_X64)
  #include <intrin.h>
#endif

namespace led {
namespace {

#if defined(_MSC_VER) && defined(_M_X64)
// cpuid's leaf 7 tells the instructions, xgetbv the registers that the operating system saves.
bool has(int leaf7_ebx, unsigned long long saved) {
  int info[4];
  __cpuid(info, 1);
  if ((info[2] & (1 << 27)) == 0 || (_xgetbv(0) & saved) != saved) return false;
  __cpuidex(info, 7, 0);
  return (info[1] & leaf7_ebx) == leaf7_ebx;
}
bool has_avx2() {
  return has(1 << 5, 0x6);
}
bool has_avx512() {
  return has(static_cast<int>(1u << 16 | 1u << 17 | 1u << 30 | 1u << 31), 0xE6);
}
#elif defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() {
  return false;
}
bool has_avx512() {
  return false;
}
#endif

}  // namespace

std::vector<const KernelTable*> cpu_kernels() {
  std::vector<const KernelTable*> tables;
  if (has_avx512() && avx512_kernels() != nullptr) tables.push_back(avx512_kernels());
  if (has_avx2() && avx2_kernels() != nullptr) tables.push_back(avx2_kernels());
  tables.push_back(generic_kernels());
  tables.push_back(avx512_emulated_kernels());
  return tables;
}

}  // namespace led
