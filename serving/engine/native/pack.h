// The weights file's matrices (row-major, one row for each output) into packed panels.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace headrace {

// Rows of the file, all [outputs, inputs].
struct Source {
  const uint8_t* data;     // int8, or two 4-bit codes to a byte
  const uint8_t* scale;    // float32 [outputs], or fp16 [outputs, blocks]
  const uint8_t* low;      // fp16 [outputs, blocks]; 4-bit only
  int outputs;
  int inputs;
};

// Which panel and lane an output goes to: gate and up take turns panel by panel, so that one unit
// of work has both; q, k and v follow each other.
struct Placement {
  int first = 0;         // output 0 goes to this column
  int panel_stride = 1;  // 2: every second panel
  int panel_first = 0;
};

// Sets every code to "zero": what padding must be.
void clear(const Matrix& matrix);
void pack(const Matrix& matrix, const Source& source, const Placement& placement);
// One output of a kBlock8 matrix as float32: an embedding.
void unpack_output(const Matrix& matrix, int output, int inputs, float* out);

}  // namespace headrace
