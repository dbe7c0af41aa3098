// The C interface, called through ctypes by native_library.py, which mirrors these structs.
//
// Python has checked every name, size and bound before a call; the checks here are those whose
// failure would touch foreign memory. A call that fails returns a non-zero code (or null) and
// leaves a sentence for hr_last_error() on the calling thread. No exception crosses.
#pragma once

#include <cstdint>

#define HR_ABI_VERSION 1
#define HR_LOGPROBS_MAX 20
#define HR_EXPORT extern "C" __attribute__((visibility("default")))

struct HrConfig {
  int32_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
  int32_t qk_norm, tied;
  int32_t bits;  // of the layers' matrices: 8 or 4
  int32_t rows_max, batch_tokens_max, sequence_tokens_max, kv_blocks;
  int32_t threads;
  int32_t kernels;  // 0 the fastest here, 1 portable, 2 avx512
  float rms_eps, rope_scale;
};

struct HrRow {
  int32_t tokens_first, tokens, position;
  int32_t blocks_first, blocks;
  int32_t samples;
};

struct HrSampling {
  uint64_t seed, step;
  float temperature, top_p, min_p;
  float repetition_penalty, presence_penalty, frequency_penalty;
  int32_t top_k;
  int32_t logprobs;  // -1: none
  int32_t bias_count, history_count, forbid_count, mask_words;
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* history_ids;
  const int32_t* history_counts;  // occurrences in the answer; 0: in the prompt only
  const int32_t* forbid_ids;
  const uint32_t* mask;  // null: every token is allowed
};

HR_EXPORT int32_t hr_abi_version();
HR_EXPORT const char* hr_last_error();
// Name of the kernels that `wanted` (HrConfig.kernels) gets on this machine; null if none.
HR_EXPORT const char* hr_kernels_name(int32_t wanted);

HR_EXPORT void* hr_model_new(const HrConfig* config);
HR_EXPORT void hr_model_free(void* model);
// Copies one tensor of the weights file, in the formats of compile/quantize.py, to its packed
// place. `name` is "embed", "layers.3.q", "layers.3.q_bias", "final_norm" and so on. For vectors
// `data` is float32 and the others are null.
HR_EXPORT int32_t hr_model_set(void* model, const char* name, int32_t layer, const void* data,
                               int64_t data_bytes, const void* scale, int64_t scale_bytes,
                               const void* low, int64_t low_bytes);
// 0 if every tensor has been set.
HR_EXPORT int32_t hr_model_ready(void* model);
// Bytes: 0 packed weights, 1 KV pool (reserved; its use follows the blocks touched), 2 buffers.
HR_EXPORT int64_t hr_model_bytes(void* model, int32_t which);
HR_EXPORT int32_t hr_step(void* model, int32_t num_rows, const HrRow* rows, const int32_t* tokens,
                          const int32_t* blocks, float* logits);

HR_EXPORT void* hr_crew_new(int32_t threads, int32_t kernels);
HR_EXPORT void hr_crew_free(void* crew);
HR_EXPORT int32_t hr_sample(void* crew, int32_t rows, int32_t vocab, int32_t top_stride,
                            const float* logits, const HrSampling* const* params, int32_t* ids,
                            float* logprobs, int32_t* top_ids, float* top_logprobs);
// Bytes per second at which `threads` threads read `bytes` at `data`; for benchmarks.
HR_EXPORT double hr_read_bandwidth(const void* data, int64_t bytes, int32_t threads);
// int8 operations per second that `threads` threads reach in registers, in 10^9; 0 where unknown.
HR_EXPORT double hr_int8_gop_s(int32_t threads);
