// What the AVX-512 translation units share. Includes the intrinsics and switches the target: it
// comes after all other headers, and `#pragma GCC pop_options` ends what it begins.
//
// Everything that is compiled for AVX-512 is in an anonymous namespace, and no template of the
// standard library is used below the pragma: an inline function shared with other translation
// units could otherwise be linked from here and fail on an older CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#include <immintrin.h>

#include "scalar.h"

namespace headrace {
namespace {

// The first `left` of 16 lanes; none below one, all from 16 on.
inline __mmask16 lanes_left(int left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
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

}  // namespace
}  // namespace headrace
