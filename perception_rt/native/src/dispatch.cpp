// Finds the instruction sets of this processor.
#include <cstring>
#include <string>

#include "decoder.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace prt {

extern const Kernels kAvx2, kAvxVnni, kAvx512, kNeon;

namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

struct Set {
  const Kernels* kernels;
  bool available;
};

const Set* sets(int& count) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  static const Set all[] = {
      {&kAvx512, avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni")},
      {&kAvxVnni, avx2 && has_avx_vnni()},
      {&kAvx2, avx2},
      {&kScalar, true},
  };
#elif defined(__aarch64__)
#ifdef __linux__
  static const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  static const bool dot = true;  // every Apple processor has it
#endif
  static const Set all[] = {{&kNeon, dot}, {&kScalar, true}};
#else
  static const Set all[] = {{&kScalar, true}};
#endif
  count = int(sizeof all / sizeof *all);
  return all;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  int count;
  const Set* all = sets(count);
  for (int i = 0; i < count; ++i)
    if (all[i].available && !std::strcmp(all[i].kernels->name, name)) return all[i].kernels;
  return nullptr;
}

}  // namespace prt

extern "C" const char* prt_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    int count;
    const prt::Set* all = prt::sets(count);
    for (int i = 0; i < count; ++i)
      if (all[i].available) joined += (joined.empty() ? "" : ",") + std::string(all[i].kernels->name);
    return joined;
  }();
  return names.c_str();
}
