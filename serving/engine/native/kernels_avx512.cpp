// The kernels for AVX-512 with VNNI: 8-bit dot products, quantisation, the sampler's passes.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include "vector512.h"

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

double weigh(const float* x, int n, float greatest, float factor, float* out) {
  const __m512 scale = _mm512_set1_ps(factor * 1.44269504f);
  const __m512 top = _mm512_set1_ps(greatest);
  __m512d sums = _mm512_setzero_pd();
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = lanes_left(n - i);
    const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(some, x + i), top);
    const __m512 e = _mm512_maskz_mov_ps(some, exp2_ps(_mm512_mul_ps(v, scale)));
    _mm512_mask_storeu_ps(out + i, some, e);
    sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
    sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
  }
  return _mm512_reduce_add_pd(sums);
}

void mass_above(const float* x, const float* weights, int n,
                const float (&thresholds)[kThresholds], double (&sums)[kThresholds]) {
  // Lanes are summed in single precision over so many values at a time, then in double.
  constexpr int kStretch = 2048;
  for (double& sum : sums) sum = 0;
  for (int begin = 0; begin < n; begin += kStretch) {
    const int end = begin + kStretch < n ? begin + kStretch : n;
    __m512 partial[kThresholds];
    for (__m512& sum : partial) sum = _mm512_setzero_ps();
    for (int i = begin; i < end; i += 16) {
      const __mmask16 some = lanes_left(end - i);
      const __m512 value = _mm512_maskz_loadu_ps(some, x + i);
      const __m512 weight = _mm512_maskz_loadu_ps(some, weights + i);
#pragma GCC unroll 8
      for (int j = 0; j < kThresholds; ++j)
        partial[j] = _mm512_mask_add_ps(
            partial[j], _mm512_cmp_ps_mask(value, _mm512_set1_ps(thresholds[j]), _CMP_GE_OQ),
            partial[j], weight);
    }
    for (int j = 0; j < kThresholds; ++j)
      sums[j] += static_cast<double>(_mm512_reduce_add_ps(partial[j]));
  }
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
    to_bf16,  store_kv, attend_avx512, argmax,   sum_exp,       weigh,
    mass_above, at_least,
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
