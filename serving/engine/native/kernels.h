// The arithmetic of a step, as a table of functions: one table for AVX-512 with VNNI and BF16, one
// in plain C++ for any machine. Both read the same packed formats.
//
// Bitwise the same logits, whatever else is in a batch: every function treats each row (token)
// by itself, and the order of its floating-point operations does not depend on how many rows it
// was given. Integer sums are exact in any order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

// Inputs that share an activation scale, and a weight scale where weights have one for each block.
constexpr int kBlock = 32;
// Outputs of a panel: two 512-bit registers of 32-bit sums.
constexpr int kPanel = 32;
// Rows of a GEMM tile: with 2 registers of outputs, 12 integer and 12 float accumulators.
constexpr int kTileRows = 6;
// Positions of a KV block: scores of one block fill a 512-bit register.
constexpr int kPositions = 16;
// Thresholds that the sampler's search for a mass tries in one pass.
constexpr int kThresholds = 8;
// KV blocks whose scores are kept at a time; the softmax is rescaled between such spans.
constexpr int kSpanBlocks = 16;

// A weight matrix [outputs, inputs] by panels of 32 outputs, a panel by blocks of 32 inputs, a
// block by steps of 4 inputs: 32 outputs x 4 inputs = 128 bytes, so that one 32-bit lane of a
// VNNI dot product is one output. Panels follow each other in memory: a GEMM reads one stream.
enum class Format : int {
  // u8 = w + 128, 1,024 bytes a block; a scale for each output, outside.
  kChannel8 = 0,
  // 32 fp16 scales, then the same.
  kBlock8 = 1,
  // 32 fp16 scales, 32 fp16 minima, then 512 bytes: low nibbles are step 2 i, high ones 2 i + 1.
  kBlock4 = 2,
};

constexpr size_t block_bytes(Format format) {
  switch (format) {
    case Format::kChannel8: return 1024;
    case Format::kBlock8: return 64 + 1024;
    case Format::kBlock4: return 128 + 512;
  }
  return 0;
}

struct Matrix {
  Format format = Format::kChannel8;
  uint8_t* data = nullptr;
  // kChannel8: one for each output, padded to whole panels.
  float* scale = nullptr;
  // One for each output, padded; null where the model has none.
  float* bias = nullptr;
  int panels = 0;
  int blocks = 0;

  size_t panel_bytes() const { return block_bytes(format) * static_cast<size_t>(blocks); }
  size_t bytes() const { return panel_bytes() * static_cast<size_t>(panels); }
};

// Quantised activations: rows of `blocks` blocks of 32 int8, each block with its scale, its
// scaled sum (for minima of weights) and -128 times its sum (for the offset of 8-bit weights).
struct Activations {
  int8_t* codes = nullptr;
  float* scale = nullptr;
  float* scaled_sum = nullptr;
  int32_t* offset = nullptr;
  int blocks = 0;

  Activations row(int i) const {
    const ptrdiff_t n = static_cast<ptrdiff_t>(i) * blocks;
    return {codes + n * kBlock, scale + n, scaled_sum + n, offset + n, blocks};
  }
};

// What is done with a GEMM's results.
enum class Store { kSet, kAdd };

struct Tile {
  const Matrix* matrix;
  int panel;
  const Activations* input;
  int row;   // the first of
  int rows;  // 1 to kTileRows rows
  float* out;
  ptrdiff_t out_stride;
  int columns;  // of the panel that exist in `out`: 1 to 32
  Store store;
  // What is fetched meanwhile: -1, this panel's own stream a little ahead of its use (a panel that
  // is read once); or so many 64-byte lines of `ahead` with each block (the next panel, into L2).
  int ahead_lines;
  const uint8_t* ahead;
};

struct Attention {
  // bf16 queries, [rows][head_dim], after RoPE.
  const uint16_t* queries;
  int rows;
  int head_dim;
  // Positions that row i may see; all rows end in the same block.
  const int* visible;
  // Keys of 16 positions as [head_dim / 2][16][2] bf16, then values as [8][head_dim][2].
  const uint16_t* const* blocks;
  int num_blocks;
  // Those of the task that this thread will probably do next; fetched meanwhile.
  const uint16_t* const* next_blocks;
  int num_next_blocks;
  // 1 / sqrt(head_dim) * log2(e).
  float scale;
  // [rows][head_dim]
  float* out;
};

struct Kernels {
  const char* name;
  void (*gemm)(const Tile& tile);
  // RMSNorm of n values, then quantise; n is padded with zeros to whole blocks.
  void (*norm_quantize)(const float* x, const float* weight, int n, float eps, Activations out);
  void (*quantize)(const float* x, int n, Activations out);
  // One block: silu(gate) * up, quantised as block `block` of the row `out`.
  void (*silu_quantize)(const float* gate, const float* up, int block, Activations out);
  // RMSNorm over the head where `norm` is given, then RoPE (rotate-half) in place.
  void (*rotate_head)(float* head, const float* norm, float eps, const float* cos,
                      const float* sin, int head_dim);
  void (*to_bf16)(const float* x, int n, uint16_t* out);
  // Puts a key and a value (bf16) at one of a block's 16 positions.
  void (*store_kv)(const uint16_t* key, const uint16_t* value, int head_dim, int position,
                   uint16_t* block);
  void (*attend)(const Attention& task);
  // The sampler's passes over n logits.
  // Index of the greatest, the lowest of equals; -1 if any is NaN or none is finite.
  int (*argmax)(const float* x, int n);
  // Sum of exp((x - greatest) * factor), in a fixed order.
  double (*sum_exp)(const float* x, int n, float greatest, float factor);
  // out[i] = exp((x[i] - greatest) * factor); returns their sum, in a fixed order.
  double (*weigh)(const float* x, int n, float greatest, float factor, float* out);
  // sums[j]: of the weights whose x is at least thresholds[j], in a fixed order.
  void (*mass_above)(const float* x, const float* weights, int n,
                     const float (&thresholds)[kThresholds], double (&sums)[kThresholds]);
  // Indices of values >= threshold, ascending, at most `room`; returns how many there are.
  int (*at_least)(const float* x, int n, float threshold, int* out, int room);
};

// Null where this machine, or this build, has none.
const Kernels* avx512_kernels();
const Kernels* portable_kernels();
// A part of the former; in a file of its own.
void attend_avx512(const Attention& task);

}  // namespace headrace
