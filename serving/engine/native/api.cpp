#include "api.h"

#include <chrono>
#include <cstring>
#include <exception>
#include <string>

#include "model.h"
#include "sample.h"

namespace {

thread_local std::string last_error;

int32_t failed(const char* trouble) {
  if (trouble == nullptr) return 0;
  last_error = trouble;
  return 1;
}

// Reads memory as fast as the crew can; the sums keep the compiler from dropping the reads.
class Reading final : public headrace::Job {
 public:
  Reading(const void* data, int64_t bytes, int units)
      : data_(static_cast<const uint64_t*>(data)), words_(bytes / 8), units_(units), sums_(units) {}
  int phases() const override { return 1; }
  int units(int) const override { return units_; }
  void execute(int, int unit, int) noexcept override {
    const int64_t end = words_ * (unit + 1) / units_;
    uint64_t lanes[32] = {};
    int64_t i = words_ * unit / units_;
    for (; i + 32 <= end; i += 32)
      for (int j = 0; j < 32; ++j) lanes[j] ^= data_[i + j];
    for (uint64_t lane : lanes) sums_[unit] ^= lane;
  }
  uint64_t sum() const {
    uint64_t all = 0;
    for (uint64_t one : sums_) all ^= one;
    return all;
  }

 private:
  const uint64_t* data_;
  int64_t words_;
  int units_;
  std::vector<uint64_t> sums_;
};

}  // namespace

int32_t hr_abi_version() { return HR_ABI_VERSION; }

const char* hr_last_error() { return last_error.c_str(); }

const char* hr_kernels_name(int32_t wanted) {
  const auto* kernels = headrace::choose_kernels(wanted);
  return kernels == nullptr ? nullptr : kernels->name;
}

void* hr_model_new(const HrConfig* config) {
  try {
    return new headrace::Model(*config);
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

void hr_model_free(void* model) { delete static_cast<headrace::Model*>(model); }

int32_t hr_model_set(void* model, const char* name, int32_t layer, const void* data,
                     int64_t data_bytes, const void* scale, int64_t scale_bytes, const void* low,
                     int64_t low_bytes) {
  return failed(static_cast<headrace::Model*>(model)->set(name, layer, data, data_bytes, scale,
                                                          scale_bytes, low, low_bytes));
}

int32_t hr_model_ready(void* model) {
  return failed(static_cast<headrace::Model*>(model)->ready() ? nullptr : "a tensor is missing");
}

int64_t hr_model_bytes(void* model, int32_t which) {
  return static_cast<headrace::Model*>(model)->bytes(which);
}

int32_t hr_step(void* model, int32_t num_rows, const HrRow* rows, const int32_t* tokens,
                const int32_t* blocks, float* logits) {
  return failed(static_cast<headrace::Model*>(model)->step(num_rows, rows, tokens, blocks, logits));
}

void* hr_crew_new(int32_t threads, int32_t kernels) {
  try {
    return new headrace::SamplerCrew(threads, kernels);
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

void hr_crew_free(void* crew) { delete static_cast<headrace::SamplerCrew*>(crew); }

int32_t hr_sample(void* crew, int32_t rows, int32_t vocab, int32_t top_stride, const float* logits,
                  const HrSampling* const* params, int32_t* ids, float* logprobs,
                  int32_t* top_ids, float* top_logprobs) {
  return failed(static_cast<headrace::SamplerCrew*>(crew)->sample(
      {rows, vocab, top_stride, logits, params, ids, logprobs, top_ids, top_logprobs}));
}

double hr_read_bandwidth(const void* data, int64_t bytes, int32_t threads) {
  headrace::Crew crew(threads);
  Reading reading(data, bytes, threads * 64);
  const auto begin = std::chrono::steady_clock::now();
  crew.run(reading);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  return reading.sum() == 1 ? 0.0 : static_cast<double>(bytes) / took.count();
}
