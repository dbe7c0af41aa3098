// Scalar conversions and the head-sized loops that both kernel sets share. Everything has
// internal linkage: each translation unit compiles its own copy for its own instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace headrace {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

[[maybe_unused]] inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponents differ by 112; scaling by 2^112 is exact and covers subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest even, as vcvtneps2bf16 does; subnormals become zero there too.
[[maybe_unused]] inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (magnitude < 0x00800000) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

[[maybe_unused]] inline float bf16_to_float(uint16_t value) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}

// Sum of squares in 16 lanes and then in a fixed tree, so that it vectorises and is one order.
[[maybe_unused]] inline float sum_squares(const float* x, int n) {
  float lanes[16] = {};
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += x[i + j] * x[i + j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] += x[i] * x[i];
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

[[maybe_unused]] void rotate_head(float* __restrict head, const float* __restrict norm, float eps,
                                  const float* __restrict cos, const float* __restrict sin,
                                  int head_dim) {
  if (norm != nullptr) {
    const float factor = 1.0f / std::sqrt(sum_squares(head, head_dim) / head_dim + eps);
    for (int i = 0; i < head_dim; ++i) head[i] = head[i] * factor * norm[i];
  }
  const int half = head_dim / 2;
  float* __restrict low = head;
  float* __restrict high = head + half;
  for (int i = 0; i < half; ++i) {
    const float a = low[i];
    const float b = high[i];
    low[i] = a * cos[i] - b * sin[i];
    high[i] = b * cos[i] + a * sin[i];
  }
}

[[maybe_unused]] void store_kv(const uint16_t* __restrict key, const uint16_t* __restrict value,
                               int head_dim, int position, uint16_t* __restrict block) {
  for (int d = 0; d < head_dim; d += 2)
    std::memcpy(block + (d / 2 * 16 + position) * 2, key + d, 4);
  uint16_t* values = block + head_dim * 16 + position / 2 * head_dim * 2 + (position & 1);
  for (int d = 0; d < head_dim; ++d) values[2 * d] = value[d];
}

}  // namespace
}  // namespace headrace
