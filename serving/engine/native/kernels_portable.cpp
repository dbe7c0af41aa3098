// The kernels in plain C++: what any x86-64 or ARM machine runs, and what the others are tested
// against. The loops are written so that compilers vectorise them.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "scalar.h"

// On x86-64 each hot function is compiled twice and chosen at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HR_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define HR_CLONES
#endif

namespace headrace {
namespace {

// Adds a block's dot products with one row to 32 sums. Steps of 4 inputs, 128 bytes each.
HR_CLONES void dot_block(const uint8_t* __restrict weights, const int8_t* __restrict codes,
                         int32_t* __restrict sums) {
  for (int step = 0; step < kBlock / 4; ++step) {
    const uint8_t* w = weights + step * 4 * kPanel;
    const int8_t* a = codes + step * 4;
    for (int n = 0; n < kPanel; ++n)
      sums[n] += a[0] * w[4 * n] + a[1] * w[4 * n + 1] + a[2] * w[4 * n + 2] + a[3] * w[4 * n + 3];
  }
}

void unpack_block(const uint8_t* nibbles, uint8_t* out) {
  for (int i = 0; i < kBlock / 8; ++i)
    for (int j = 0; j < 4 * kPanel; ++j) {
      out[2 * i * 4 * kPanel + j] = nibbles[i * 4 * kPanel + j] & 15;
      out[(2 * i + 1) * 4 * kPanel + j] = nibbles[i * 4 * kPanel + j] >> 4;
    }
}

void halves(const uint8_t* in, float* out) {
  for (int n = 0; n < kPanel; ++n) {
    uint16_t half;
    std::memcpy(&half, in + 2 * n, 2);
    out[n] = half_to_float(half);
  }
}

struct BlockOfWeights {
  uint8_t unpacked[1024];
  const uint8_t* weights;
  float scale[kPanel];
  float low[kPanel];
};

void read_block(const Matrix& m, const uint8_t* at, BlockOfWeights* block) {
  if (m.format == Format::kChannel8) {
    block->weights = at;
    return;
  }
  halves(at, block->scale);
  block->weights = at + 64;
  if (m.format == Format::kBlock8) return;
  halves(at + 64, block->low);
  unpack_block(at + 128, block->unpacked);
  block->weights = block->unpacked;
}

void gemm(const Tile& tile) {
  const Matrix& m = *tile.matrix;
  const bool has_low = m.format == Format::kBlock4;
  float y[kTileRows][kPanel] = {};
  BlockOfWeights block;
  for (int b = 0; b < m.blocks; ++b) {
    read_block(m, m.data + tile.panel * m.panel_bytes() + b * block_bytes(m.format), &block);
    for (int r = 0; r < tile.rows; ++r) {
      const Activations a = tile.input->row(tile.row + r);
      int32_t sums[kPanel];
      std::fill_n(sums, kPanel, has_low ? 0 : a.offset[b]);
      dot_block(block.weights, a.codes + b * kBlock, sums);
      const float scale = a.scale[b];
      if (m.format == Format::kChannel8) {
        for (int n = 0; n < kPanel; ++n) y[r][n] += static_cast<float>(sums[n]) * scale;
        continue;
      }
      for (int n = 0; n < kPanel; ++n)
        y[r][n] += static_cast<float>(sums[n]) * (block.scale[n] * scale);
      if (has_low)
        for (int n = 0; n < kPanel; ++n) y[r][n] += block.low[n] * a.scaled_sum[b];
    }
  }
  const int first = tile.panel * kPanel;
  for (int r = 0; r < tile.rows; ++r) {
    float* out = tile.out + r * tile.out_stride;
    for (int n = 0; n < tile.columns; ++n) {
      float value = y[r][n];
      if (m.format == Format::kChannel8) value *= m.scale[first + n];
      if (m.bias != nullptr) value += m.bias[first + n];
      out[n] = tile.store == Store::kAdd ? out[n] + value : value;
    }
  }
}

void quantize_block(const float* x, int block, Activations out) {
  float greatest = 0;
  // Written so that a NaN is kept: it must reach the logits, not vanish.
  for (int i = 0; i < kBlock; ++i) greatest = std::fabs(x[i]) <= greatest ? greatest : std::fabs(x[i]);
  const float inverse = greatest > 0 ? 127.0f / greatest : 0.0f;
  int32_t sum = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float code = std::nearbyint(x[i] * inverse);
    out.codes[block * kBlock + i] = code >= -127 && code <= 127 ? static_cast<int8_t>(code) : 0;
    sum += out.codes[block * kBlock + i];
  }
  const float scale = greatest / 127.0f;
  out.scale[block] = scale;
  out.scaled_sum[block] = scale * static_cast<float>(sum);
  out.offset[block] = -128 * sum;
}

void quantize_padded(const float* x, const float* weight, float factor, int n, Activations out) {
  for (int b = 0; b < out.blocks; ++b) {
    float values[kBlock] = {};
    const int count = std::min(kBlock, n - b * kBlock);
    for (int i = 0; i < count; ++i) {
      const int at = b * kBlock + i;
      values[i] = weight == nullptr ? x[at] : x[at] * factor * weight[at];
    }
    quantize_block(values, b, out);
  }
}

void quantize(const float* x, int n, Activations out) { quantize_padded(x, nullptr, 1, n, out); }

void norm_quantize(const float* x, const float* weight, int n, float eps, Activations out) {
  const float factor = 1.0f / std::sqrt(sum_squares(x, n) / static_cast<float>(n) + eps);
  quantize_padded(x, weight, factor, n, out);
}

void silu_quantize(const float* gate, const float* up, int block, Activations out) {
  float values[kBlock];
  for (int i = 0; i < kBlock; ++i) values[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  quantize_block(values, block, out);
}

void to_bf16(const float* x, int n, uint16_t* out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

HR_CLONES void scores_of(const uint16_t* __restrict query, const uint16_t* __restrict keys,
                         int head_dim, float* __restrict out) {
  float sums[kPositions] = {};
  for (int d = 0; d < head_dim; d += 2) {
    const float a = bf16_to_float(query[d]);
    const float b = bf16_to_float(query[d + 1]);
    const uint16_t* k = keys + d * kPositions;
    for (int p = 0; p < kPositions; ++p)
      sums[p] += a * bf16_to_float(k[2 * p]) + b * bf16_to_float(k[2 * p + 1]);
  }
  for (int p = 0; p < kPositions; ++p) out[p] = sums[p];
}

HR_CLONES void add_values(const float* __restrict weights, const uint16_t* __restrict values,
                          int head_dim, float* __restrict out) {
  for (int p = 0; p < kPositions; p += 2) {
    const uint16_t* v = values + p * head_dim;
    for (int d = 0; d < head_dim; ++d)
      out[d] += weights[p] * bf16_to_float(v[2 * d]) + weights[p + 1] * bf16_to_float(v[2 * d + 1]);
  }
}

void attend_row(const Attention& task, int row) {
  const int dim = task.head_dim;
  float* out = task.out + static_cast<ptrdiff_t>(row) * dim;
  std::fill_n(out, dim, 0.0f);
  float greatest = -INFINITY;
  float sums[kPositions] = {};
  float scores[kSpanBlocks * kPositions];
  for (int span = 0; span < task.num_blocks; span += kSpanBlocks) {
    const int count = std::min(kSpanBlocks, task.num_blocks - span);
    const int visible = std::min(count * kPositions, task.visible[row] - span * kPositions);
    float top = greatest;
    for (int b = 0; b < count; ++b)
      scores_of(task.queries + static_cast<ptrdiff_t>(row) * dim, task.blocks[span + b], dim,
                scores + b * kPositions);
    for (int i = 0; i < visible; ++i) top = std::max(top, scores[i] * task.scale);
    const float rescale = std::exp2(greatest - top);
    greatest = top;
    for (float& sum : sums) sum *= rescale;
    for (int d = 0; d < dim; ++d) out[d] *= rescale;
    for (int i = 0; i < count * kPositions; ++i) {
      const float weight = i < visible ? std::exp2(scores[i] * task.scale - top) : 0.0f;
      // Rounded as the values' products are, so that the weights still sum to one.
      scores[i] = bf16_to_float(float_to_bf16(weight));
      sums[i % kPositions] += scores[i];
    }
    for (int b = 0; b < count; ++b)
      add_values(scores + b * kPositions, task.blocks[span + b] + dim * kPositions, dim, out);
  }
  for (int width = kPositions / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  for (int d = 0; d < dim; ++d) out[d] /= sums[0];
}

void attend(const Attention& task) {
  for (int row = 0; row < task.rows; ++row) attend_row(task, row);
}

int argmax(const float* x, int n) {
  int best = -1;
  float greatest = -INFINITY;
  for (int i = 0; i < n; ++i) {
    if (std::isnan(x[i])) return -1;
    if (x[i] > greatest) {
      greatest = x[i];
      best = i;
    }
  }
  return best >= 0 && greatest < INFINITY ? best : -1;
}

double sum_exp(const float* x, int n, float greatest, float factor) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += std::exp((x[i] - greatest) * factor);
  return sum;
}

double weigh(const float* x, int n, float greatest, float factor, float* out) {
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    out[i] = std::exp((x[i] - greatest) * factor);
    sum += out[i];
  }
  return sum;
}

void mass_above(const float* x, const float* weights, int n,
                const float (&thresholds)[kThresholds], double (&sums)[kThresholds]) {
  for (double& sum : sums) sum = 0;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < kThresholds; ++j) sums[j] += x[i] >= thresholds[j] ? weights[i] : 0.0f;
}

int at_least(const float* x, int n, float threshold, int* out, int room) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    if (!(x[i] >= threshold)) continue;
    if (count < room) out[count] = i;
    ++count;
  }
  return count;
}

constexpr Kernels kPortable = {
    "portable", gemm,     norm_quantize, quantize, silu_quantize, rotate_head,
    to_bf16,    store_kv, attend,        argmax,   sum_exp,       weigh,
    mass_above, at_least,
};

}  // namespace

const Kernels* portable_kernels() { return &kPortable; }

}  // namespace headrace
