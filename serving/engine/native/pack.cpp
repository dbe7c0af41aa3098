#include "pack.h"

#include <algorithm>
#include <cstring>

#include "scalar.h"

namespace headrace {
namespace {

struct Place {
  int panel;
  int lane;
};

Place place(const Placement& p, int output) {
  const int column = p.first + output;
  return {p.panel_first + column / kPanel * p.panel_stride, column % kPanel};
}

// Eight 4-bit codes, first in the lowest bits, to four bytes: code i low, code i + 4 high.
uint32_t interleave(uint32_t codes) {
  const auto spread = [](uint32_t x) {
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
  };
  return spread(codes & 0xffff) | spread(codes >> 16) << 4;
}

void pack8(const Source& source, int output, int lane, uint8_t* panel, Format format,
           int blocks) {
  const uint8_t* row = source.data + static_cast<size_t>(output) * source.inputs;
  const size_t head = format == Format::kBlock8 ? 64 : 0;
  for (int b = 0; b < blocks; ++b) {
    uint8_t* block = panel + b * block_bytes(format);
    if (head != 0) {
      const size_t at = (static_cast<size_t>(output) * blocks + b) * 2;
      std::memcpy(block + lane * 2, source.scale + at, 2);
    }
    const int count = std::min(kBlock, source.inputs - b * kBlock);
    uint8_t codes[kBlock] = {};
    std::memcpy(codes, row + b * kBlock, count);
    for (int step = 0; step < kBlock / 4; ++step) {
      uint32_t four;
      std::memcpy(&four, codes + step * 4, 4);
      four ^= 0x80808080;
      std::memcpy(block + head + step * 128 + lane * 4, &four, 4);
    }
  }
}

void pack4(const Source& source, int output, int lane, uint8_t* panel, int blocks) {
  for (int b = 0; b < blocks; ++b) {
    const size_t at = static_cast<size_t>(output) * blocks + b;
    uint8_t* block = panel + b * block_bytes(Format::kBlock4);
    std::memcpy(block + lane * 2, source.scale + at * 2, 2);
    std::memcpy(block + 64 + lane * 2, source.low + at * 2, 2);
    for (int i = 0; i < kBlock / 8; ++i) {
      uint32_t eight;
      std::memcpy(&eight, source.data + at * 16 + i * 4, 4);
      eight = interleave(eight);
      std::memcpy(block + 128 + i * 128 + lane * 4, &eight, 4);
    }
  }
}

}  // namespace

void clear(const Matrix& matrix) {
  const bool offset = matrix.format == Format::kChannel8 || matrix.format == Format::kBlock8;
  if (!offset) return;  // The mapping is zero.
  const size_t bytes = block_bytes(matrix.format);
  const size_t head = matrix.format == Format::kBlock8 ? 64 : 0;
  for (size_t b = 0; b < static_cast<size_t>(matrix.panels) * matrix.blocks; ++b)
    std::memset(matrix.data + b * bytes + head, 128, bytes - head);
}

void pack(const Matrix& matrix, const Source& source, const Placement& placement) {
  for (int n = 0; n < source.outputs; ++n) {
    const Place to = place(placement, n);
    uint8_t* panel = matrix.data + to.panel * matrix.panel_bytes();
    if (matrix.format == Format::kBlock4) {
      pack4(source, n, to.lane, panel, matrix.blocks);
      continue;
    }
    pack8(source, n, to.lane, panel, matrix.format, matrix.blocks);
    if (matrix.format == Format::kChannel8)
      std::memcpy(matrix.scale + to.panel * kPanel + to.lane, source.scale + n * 4, 4);
  }
}

void unpack_output(const Matrix& matrix, int output, int inputs, float* out) {
  const uint8_t* panel = matrix.data + output / kPanel * matrix.panel_bytes();
  const int lane = output % kPanel;
  for (int b = 0; b < matrix.blocks; ++b) {
    const uint8_t* block = panel + b * block_bytes(Format::kBlock8);
    uint16_t half;
    std::memcpy(&half, block + lane * 2, 2);
    const float scale = half_to_float(half);
    const int count = std::min(kBlock, inputs - b * kBlock);
    for (int i = 0; i < count; ++i)
      out[b * kBlock + i] =
          scale * static_cast<float>(block[64 + i / 4 * 128 + lane * 4 + i % 4] - 128);
  }
}

}  // namespace headrace
