// Attention for AVX-512 with BF16 dot products, over paged keys and values.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include "vector512.h"

namespace headrace {
namespace {

inline __m512bh pair(const uint16_t* at) {
  int32_t two;
  std::memcpy(&two, at, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}

inline __m512bh load_bf16(const uint16_t* at) { return (__m512bh)_mm512_loadu_si512(at); }

inline void fetch_near(const uint16_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

inline void fetch_far(const uint16_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// Scores of R queries against B blocks of 16 positions.
//
// A decode row's keys and values come from memory, where a core has too few requests of its own in
// flight. So with each line of keys read here, one of the next task's keys is fetched into L2 (and
// in add_values() one of its values), and this task's values into L1. Measured on Zen 5, one
// thread, context 224: 26 GB/s; 22 when only the task's own lines were fetched, 4 blocks ahead.
template <int R, int B, bool kPrefetch>
inline void scores_of(const uint16_t* queries, const uint16_t* const* blocks,
                      const uint16_t* const* next, int dim, float* out) {
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
        fetch_near(blocks[b] + (dim + d) * kPositions);
        fetch_far(next[b] + d * kPositions);
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
template <int R, int J, bool kPrefetch>
inline void add_values(const uint16_t* weights, const uint16_t* const* blocks,
                       const uint16_t* const* next, int count, int dim, int first,
                       const float* rescale, float* out) {
  constexpr int kRowScores = kSpanBlocks * kPositions;
  __m512 sums[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j)
      sums[r][j] = _mm512_mul_ps(_mm512_loadu_ps(out + r * dim + first + 16 * j),
                                 _mm512_set1_ps(rescale[r]));
  for (int b = 0; b < count; ++b) {
    const int begin = dim * kPositions + first * 2;
    const uint16_t* values = blocks[b] + begin;
    const uint16_t* w = weights + b * kPositions;
    for (int p = 0; p < kPositions; p += 2) {
      __m512bh v[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        v[j] = load_bf16(values + p * dim + j * 32);
        if (kPrefetch) fetch_far(next[b] + begin + p * dim + j * 32);
      }
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
    const uint16_t* next[kSpanBlocks];
    for (int i = 0; kPrefetch && i < count; ++i) {
      const int last = task.num_next_blocks - 1;
      next[i] = task.next_blocks[span + i < last ? span + i : last];
    }
    int b = 0;
    for (; b + kTogether <= count; b += kTogether)
      scores_of<R, kTogether, kPrefetch>(queries, blocks + b, next + b, dim,
                                         scores + b * kPositions);
    for (; b < count; ++b)
      scores_of<R, 1, kPrefetch>(queries, blocks + b, next + b, dim, scores + b * kPositions);
    for (int r = 0; r < R; ++r)
      rescale[r] = soften(scores + r * kRowScores, count, task.visible[row + r] - span * kPositions,
                          task.scale, &greatest[r], &sums[r], weights + r * kRowScores);
    int d = 0;
    for (; d + 64 <= dim; d += 64)
      add_values<R, 4, kPrefetch>(weights, blocks, next, count, dim, d, rescale, out);
    for (; d < dim; d += 16)
      add_values<R, 1, kPrefetch>(weights, blocks, next, count, dim, d, rescale, out);
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

void attend_parts(const Attention& task) {
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

}  // namespace
}  // namespace headrace
#pragma GCC pop_options

namespace headrace {

void attend_avx512(const Attention& task) { attend_parts(task); }

}  // namespace headrace

#endif
