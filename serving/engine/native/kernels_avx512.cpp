// The kernels for AVX-512 with VNNI (8-bit dot products) and BF16 (attention).
//
// Everything that is compiled for AVX-512 is in the anonymous namespace, and no template of the
// standard library is used below the pragma: an inline function shared with other translation
// units could otherwise be linked from here and fail on an older CPU.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cmath>
#include <cstring>

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#include <immintrin.h>

#include "scalar.h"

namespace headrace {
namespace {

template <int R, Format F>
__attribute__((always_inline)) inline void block_dots(const uint8_t* w, const int8_t* const* rows,
                                                      int at, __m512i (*sums)[2]) {
  if constexpr (F == Format::kBlock4) {
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock / 8; ++i) {
      const __m512i p0 = _mm512_loadu_si512(w + i * 128);
      const __m512i p1 = _mm512_loadu_si512(w + i * 128 + 64);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i w0 = _mm512_and_si512(half ? _mm512_srli_epi16(p0, 4) : p0, low);
        const __m512i w1 = _mm512_and_si512(half ? _mm512_srli_epi16(p1, 4) : p1, low);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, rows[r] + at + i * 8 + half * 4, 4);
          const __m512i a = _mm512_set1_epi32(four);
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, a);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, a);
        }
      }
    }
  } else {
#pragma GCC unroll 8
    for (int step = 0; step < kBlock / 4; ++step) {
      const __m512i w0 = _mm512_loadu_si512(w + step * 128);
      const __m512i w1 = _mm512_loadu_si512(w + step * 128 + 64);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, rows[r] + at + step * 4, 4);
        const __m512i a = _mm512_set1_epi32(four);
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, a);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, a);
      }
    }
  }
}

inline __m512 halves(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

template <int R>
__attribute__((always_inline)) inline void finish(const Tile& tile, __m512 (*y)[2]) {
  const Matrix& m = *tile.matrix;
  const ptrdiff_t first = static_cast<ptrdiff_t>(tile.panel) * kPanel;
  for (int j = 0; j < 2; ++j) {
    const int left = tile.columns - 16 * j;
    if (left <= 0) break;
    const __mmask16 some = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 scale = m.format == Format::kChannel8 ? _mm512_loadu_ps(m.scale + first + 16 * j)
                                                       : _mm512_set1_ps(1.0f);
    const __m512 bias =
        m.bias != nullptr ? _mm512_loadu_ps(m.bias + first + 16 * j) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      float* out = tile.out + r * tile.out_stride + 16 * j;
      __m512 value = _mm512_fmadd_ps(y[r][j], scale, bias);
      if (tile.store == Store::kAdd) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, out));
      _mm512_mask_storeu_ps(out, some, value);
    }
  }
}

// How far ahead of its use a stream of weights is fetched when it is read once. Measured on Zen 5:
// the hardware's own prefetching alone is 5 % faster for one row of int8, 10 to 20 % slower else.
constexpr ptrdiff_t near_of(int rows) { return rows <= 2 ? 4096 : 8192; }

template <int R, Format F>
void gemm_tile(const Tile& tile) {
  constexpr bool kLow = F == Format::kBlock4;
  constexpr ptrdiff_t kBytes = static_cast<ptrdiff_t>(block_bytes(F));
  constexpr ptrdiff_t kHead = F == Format::kChannel8 ? 0 : kLow ? 128 : 64;
  const Matrix& m = *tile.matrix;
  const uint8_t* w = m.data + static_cast<size_t>(tile.panel) * m.panel_bytes();
  const int8_t* rows[R];
  const float* scales[R];
  const float* scaled_sums[R];
  const int32_t* offsets[R];
  for (int r = 0; r < R; ++r) {
    const Activations a = tile.input->row(tile.row + r);
    rows[r] = a.codes;
    scales[r] = a.scale;
    scaled_sums[r] = a.scaled_sum;
    offsets[r] = a.offset;
  }
  __m512 y[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) y[r][0] = y[r][1] = _mm512_setzero_ps();
  const auto* ahead = reinterpret_cast<const char*>(tile.ahead);
  for (int b = 0; b < m.blocks; ++b, w += kBytes) {
    if (tile.ahead_lines < 0) {
#pragma GCC unroll 18
      for (ptrdiff_t line = 0; line < kBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(w + near_of(R) + line), _MM_HINT_T0);
    }
    for (int i = 0; i < tile.ahead_lines; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    __m512i sums[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      sums[r][0] = sums[r][1] = kLow ? _mm512_setzero_si512() : _mm512_set1_epi32(offsets[r][b]);
    block_dots<R, F>(w + kHead, rows, b * kBlock, sums);
    if constexpr (F == Format::kChannel8) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 scale = _mm512_set1_ps(scales[r][b]);
        y[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][0]), scale, y[r][0]);
        y[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][1]), scale, y[r][1]);
      }
    } else {
      const __m512 d0 = halves(w);
      const __m512 d1 = halves(w + 32);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 scale = _mm512_set1_ps(scales[r][b]);
        y[r][0] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][0]), _mm512_mul_ps(d0, scale), y[r][0]);
        y[r][1] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][1]), _mm512_mul_ps(d1, scale), y[r][1]);
      }
      if constexpr (kLow) {
        const __m512 m0 = halves(w + 64);
        const __m512 m1 = halves(w + 96);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const __m512 sum = _mm512_set1_ps(scaled_sums[r][b]);
          y[r][0] = _mm512_fmadd_ps(m0, sum, y[r][0]);
          y[r][1] = _mm512_fmadd_ps(m1, sum, y[r][1]);
        }
      }
    }
  }
  finish<R>(tile, y);
}

template <Format F>
void gemm_format(const Tile& tile) {
  switch (tile.rows) {
    case 1: return gemm_tile<1, F>(tile);
    case 2: return gemm_tile<2, F>(tile);
    case 3: return gemm_tile<3, F>(tile);
    case 4: return gemm_tile<4, F>(tile);
    case 5: return gemm_tile<5, F>(tile);
    default: return gemm_tile<6, F>(tile);
  }
}

void gemm(const Tile& tile) {
  switch (tile.matrix->format) {
    case Format::kChannel8: return gemm_format<Format::kChannel8>(tile);
    case Format::kBlock8: return gemm_format<Format::kBlock8>(tile);
    case Format::kBlock4: return gemm_format<Format::kBlock4>(tile);
  }
}

inline void quantize_block(__m512 x0, __m512 x1, int block, const Activations& out) {
  // The bit patterns of magnitudes order as integers, NaN above all: a NaN is kept.
  const __m512i bits = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(x0)),
                                        _mm512_castps_si512(_mm512_abs_ps(x1)));
  const float greatest = bits_to_float(_mm512_reduce_max_epu32(bits));
  const __m512 inverse = _mm512_set1_ps(greatest > 0 ? 127.0f / greatest : 0.0f);
  const __m512i c0 = _mm512_cvtps_epi32(_mm512_mul_ps(x0, inverse));
  const __m512i c1 = _mm512_cvtps_epi32(_mm512_mul_ps(x1, inverse));
  int8_t* codes = out.codes + block * kBlock;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtsepi32_epi8(c0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtsepi32_epi8(c1));
  const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(c0, c1));
  const float scale = greatest / 127.0f;
  out.scale[block] = scale;
  out.scaled_sum[block] = scale * static_cast<float>(sum);
  out.offset[block] = -128 * sum;
}

inline __mmask16 lanes_left(int left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

void quantize(const float* x, int n, Activations out) {
  for (int b = 0; b < out.blocks; ++b) {
    const int at = b * kBlock;
    quantize_block(_mm512_maskz_loadu_ps(lanes_left(n - at), x + at),
                   _mm512_maskz_loadu_ps(lanes_left(n - at - 16), x + at + 16), b, out);
  }
}

void norm_quantize(const float* x, const float* weight, int n, float eps, Activations out) {
  const float factor = 1.0f / std::sqrt(sum_squares(x, n) / static_cast<float>(n) + eps);
  const __m512 f = _mm512_set1_ps(factor);
  for (int b = 0; b < out.blocks; ++b) {
    __m512 v[2];
    for (int j = 0; j < 2; ++j) {
      const int at = b * kBlock + 16 * j;
      const __mmask16 some = lanes_left(n - at);
      v[j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + at), f),
                           _mm512_maskz_loadu_ps(some, weight + at));
    }
    quantize_block(v[0], v[1], b, out);
  }
}

// 2^x for x <= 127; below -126 the result rounds to zero, and NaN is taken for that too.
// Cody-Waite on the integer part, then a polynomial fitted to 2^f on [-0.5, 0.5]: error 2e-7.
inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

void silu_quantize(const float* gate, const float* up, int block, Activations out) {
  __m512 v[2];
  for (int j = 0; j < 2; ++j) {
    const __m512 g = _mm512_loadu_ps(gate + 16 * j);
    // exp(-g), held below 2^126 so that the quotient is a number.
    const __m512 e = exp2_ps(_mm512_min_ps(_mm512_mul_ps(g, _mm512_set1_ps(-1.44269504f)),
                                           _mm512_set1_ps(126.0f)));
    v[j] = _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(e, _mm512_set1_ps(1.0f))),
                         _mm512_loadu_ps(up + 16 * j));
  }
  quantize_block(v[0], v[1], block, out);
}

void to_bf16(const float* x, int n, uint16_t* out) {
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = lanes_left(n - i);
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + i));
    _mm256_mask_storeu_epi16(out + i, some, (__m256i)half);
  }
}

inline __m512bh pair(const uint16_t* at) {
  int32_t two;
  std::memcpy(&two, at, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}

inline __m512bh load_bf16(const uint16_t* at) { return (__m512bh)_mm512_loadu_si512(at); }

// Scores of R queries against B blocks of 16 positions.
template <int R, int B, bool kPrefetch>
inline void scores_of(const uint16_t* queries, const uint16_t* const* blocks, int ahead, int dim,
                      float* out) {
  constexpr int kRowScores = kSpanBlocks * kPositions;
  __m512 sums[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) sums[r][b] = _mm512_setzero_ps();
  for (int d = 0; d < dim; d += 2) {
    __m512bh keys[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      keys[b] = load_bf16(blocks[b] + d * kPositions);
      if (kPrefetch) {
        // This block's values, and the keys of the block that comes as many blocks later.
        _mm_prefetch(reinterpret_cast<const char*>(blocks[b] + (dim + d) * kPositions), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(blocks[b + ahead] + d * kPositions), _MM_HINT_T0);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512bh q = pair(queries + r * dim + d);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], keys[b], q);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) _mm512_storeu_ps(out + r * kRowScores + b * kPositions, sums[r][b]);
}

// Adds weights x values of `count` blocks to 16 * J dimensions of R outputs, after rescaling.
template <int R, int J>
inline void add_values(const uint16_t* weights, const uint16_t* const* blocks, int count, int dim,
                       int first, const float* rescale, float* out) {
  constexpr int kRowScores = kSpanBlocks * kPositions;
  __m512 sums[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j)
      sums[r][j] = _mm512_mul_ps(_mm512_loadu_ps(out + r * dim + first + 16 * j),
                                 _mm512_set1_ps(rescale[r]));
  for (int b = 0; b < count; ++b) {
    const uint16_t* values = blocks[b] + dim * kPositions + first * 2;
    const uint16_t* w = weights + b * kPositions;
    for (int p = 0; p < kPositions; p += 2) {
      __m512bh v[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) v[j] = load_bf16(values + p * dim + j * 32);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512bh two = pair(w + r * kRowScores + p);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], v[j], two);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) _mm512_storeu_ps(out + r * dim + first + 16 * j, sums[r][j]);
}

// Scores to unnormalised weights (bf16) for one row of a span; returns the rescaling of what was
// summed before.
inline float soften(const float* scores, int count, int visible, float scale, float* greatest,
                    __m512* sums, uint16_t* weights) {
  const __m512 low = _mm512_set1_ps(-INFINITY);
  __m512 top = low;
  for (int b = 0; b < count; ++b)
    top = _mm512_max_ps(top, _mm512_mask_loadu_ps(low, lanes_left(visible - b * kPositions),
                                                  scores + b * kPositions));
  float next = _mm512_reduce_max_ps(top) * scale;
  next = next > *greatest ? next : *greatest;
  const float rescale = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(*greatest - next)));
  *greatest = next;
  const __m512 shift = _mm512_set1_ps(-next);
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_mul_ps(*sums, _mm512_set1_ps(rescale));
  for (int b = 0; b < count; ++b) {
    const __mmask16 some = lanes_left(visible - b * kPositions);
    const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(scores + b * kPositions), factor, shift);
    const __m256i w = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(some, exp2_ps(x)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + b * kPositions), w);
    // As they were rounded, so that the weights still sum to one.
    sum = _mm512_add_ps(
        sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16)));
  }
  *sums = sum;
  return rescale;
}

template <int R, bool kPrefetch>
void attend_rows(const Attention& task, int row) {
  constexpr int kRowScores = kSpanBlocks * kPositions;
  constexpr int kTogether = R == 1 ? 8 : R <= 2 ? 4 : R == 3 ? 4 : R == 4 ? 3 : 2;
  alignas(64) float scores[R * kRowScores];
  alignas(64) uint16_t weights[R * kRowScores];
  const int dim = task.head_dim;
  const uint16_t* queries = task.queries + static_cast<ptrdiff_t>(row) * dim;
  float* out = task.out + static_cast<ptrdiff_t>(row) * dim;
  std::memset(out, 0, sizeof(float) * R * dim);
  float greatest[R];
  float rescale[R];
  __m512 sums[R];
  for (int r = 0; r < R; ++r) {
    greatest[r] = -INFINITY;
    sums[r] = _mm512_setzero_ps();
  }
  for (int span = 0; span < task.num_blocks; span += kSpanBlocks) {
    const int left = task.num_blocks - span;
    const int count = left < kSpanBlocks ? left : kSpanBlocks;
    const uint16_t* const* blocks = task.blocks + span;
    int b = 0;
    for (; b + kTogether <= count; b += kTogether) {
      const int ahead = b + 2 * kTogether <= left ? kTogether : 0;
      scores_of<R, kTogether, kPrefetch>(queries, blocks + b, ahead, dim, scores + b * kPositions);
    }
    for (; b < count; ++b)
      scores_of<R, 1, kPrefetch>(queries, blocks + b, b + 1 < left, dim, scores + b * kPositions);
    for (int r = 0; r < R; ++r)
      rescale[r] = soften(scores + r * kRowScores, count, task.visible[row + r] - span * kPositions,
                          task.scale, &greatest[r], &sums[r], weights + r * kRowScores);
    int d = 0;
    for (; d + 64 <= dim; d += 64)
      add_values<R, 4>(weights, blocks, count, dim, d, rescale, out);
    for (; d < dim; d += 16) add_values<R, 1>(weights, blocks, count, dim, d, rescale, out);
  }
  for (int r = 0; r < R; ++r) {
    const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(sums[r]));
    for (int d = 0; d < dim; d += 16)
      _mm512_storeu_ps(out + r * dim + d, _mm512_div_ps(_mm512_loadu_ps(out + r * dim + d), sum));
  }
}

template <bool kPrefetch>
void attend_some(const Attention& task, int row, int rows) {
  switch (rows) {
    case 1: return attend_rows<1, kPrefetch>(task, row);
    case 2: return attend_rows<2, kPrefetch>(task, row);
    case 3: return attend_rows<3, kPrefetch>(task, row);
    case 4: return attend_rows<4, kPrefetch>(task, row);
    case 5: return attend_rows<5, kPrefetch>(task, row);
    default: return attend_rows<6, kPrefetch>(task, row);
  }
}

void attend(const Attention& task) {
  const int parts = (task.rows + kTileRows - 1) / kTileRows;
  for (int i = 0; i < parts; ++i) {
    const int begin = task.rows * i / parts;
    const int rows = task.rows * (i + 1) / parts - begin;
    // Only the first part reads keys and values from memory; the others find them in L2.
    if (i == 0) {
      attend_some<true>(task, begin, rows);
    } else {
      attend_some<false>(task, begin, rows);
    }
  }
}

int argmax(const float* x, int n) {
  __m512 best = _mm512_set1_ps(-INFINITY);
  __m512i where = _mm512_setzero_si512();
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __mmask16 broken = 0;
  for (int i = 0; i < n; i += 16) {
    const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), lanes_left(n - i), x + i);
    const __mmask16 more = _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ);
    broken |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    best = _mm512_mask_mov_ps(best, more, v);
    where = _mm512_mask_mov_epi32(where, more, index);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
  const float greatest = _mm512_reduce_max_ps(best);
  if (broken || !(std::fabs(greatest) < INFINITY)) return -1;
  const __mmask16 equal = _mm512_cmp_ps_mask(best, _mm512_set1_ps(greatest), _CMP_EQ_OQ);
  return static_cast<int>(_mm512_mask_reduce_min_epu32(equal, where));
}

double sum_exp(const float* x, int n, float greatest, float factor) {
  const __m512 scale = _mm512_set1_ps(factor * 1.44269504f);
  const __m512 top = _mm512_set1_ps(greatest);
  __m512d sums = _mm512_setzero_pd();
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = lanes_left(n - i);
    const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(some, x + i), top);
    const __m512 e = _mm512_maskz_mov_ps(some, exp2_ps(_mm512_mul_ps(v, scale)));
    sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
    sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
  }
  return _mm512_reduce_add_pd(sums);
}

int at_least(const float* x, int n, float threshold, int* out, int room) {
  const __m512 limit = _mm512_set1_ps(threshold);
  int count = 0;
  for (int i = 0; i < n; i += 16) {
    __mmask16 some = lanes_left(n - i);
    some = _mm512_mask_cmp_ps_mask(some, _mm512_maskz_loadu_ps(some, x + i), limit, _CMP_GE_OQ);
    unsigned bits = some;
    for (; bits != 0; bits &= bits - 1, ++count)
      if (count < room) out[count] = i + __builtin_ctz(bits);
  }
  return count;
}

constexpr Kernels kAvx512 = {
    "avx512", gemm,     norm_quantize, quantize, silu_quantize, rotate_head,
    to_bf16,  store_kv, attend,        argmax,   sum_exp,       at_least,
};

}  // namespace
}  // namespace headrace
#pragma GCC pop_options

namespace headrace {

const Kernels* avx512_kernels() {
  __builtin_cpu_init();
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512bf16");
  return here ? &kAvx512 : nullptr;
}

}  // namespace headrace

#else

namespace headrace {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace headrace

#endif
