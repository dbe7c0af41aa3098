// How fast this CPU multiplies int8, for the benchmark's roofline. Nothing else calls it.
#include <chrono>
#include <thread>
#include <vector>

#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

constexpr int kChains = 16;  // Independent sums: more than latency times units of any CPU.
constexpr int kRounds = 1 << 20;
constexpr double kOperations = 64 * 2;  // Of one instruction: 64 products and their additions.

__attribute__((target("avx512f,avx512vnni"))) int multiply() {
  __m512i sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_epi32(i);
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    asm volatile("" : "+v"(a), "+v"(b));  // The products must not be hoisted out of the loop.
  }
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  return _mm512_reduce_add_epi32(sums[0]);
}

}  // namespace

double hr_int8_gop_s(int32_t threads) {
  if (threads < 1 || !__builtin_cpu_supports("avx512vnni")) return 0.0;
  std::vector<std::thread> workers;
  std::vector<int> sums(threads);
  const auto begin = std::chrono::steady_clock::now();
  for (int32_t i = 0; i < threads; ++i) workers.emplace_back([&sums, i] { sums[i] = multiply(); });
  for (auto& worker : workers) worker.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  return kOperations * kChains * kRounds * threads / took.count() / 1e9;
}

#else

double hr_int8_gop_s(int32_t) { return 0.0; }

#endif
