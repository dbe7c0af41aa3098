// Logits to tokens, for all rows of a step. The rules and their order: serving/engine/sampler.py.
#pragma once

#include <vector>

#include "api.h"
#include "crew.h"
#include "kernels.h"

namespace headrace {

struct SampleBatch {
  int rows;
  int vocab;
  int top_stride;
  const float* logits;
  const HrSampling* const* params;
  int32_t* ids;  // -1: the mask allows no token
  float* logprobs;
  int32_t* top_ids;
  float* top_logprobs;
};

class SamplerCrew final : private Job {
 public:
  // Throws std::runtime_error with a sentence.
  SamplerCrew(int threads, int kernels);
  // Sentence on failure, null on success.
  const char* sample(const SampleBatch& batch);

 private:
  struct Scratch {
    std::vector<float> changed;
    std::vector<int> ids;
    std::vector<int> order;
    std::vector<double> sums;
    std::vector<float> weights;
  };

  int phases() const override { return 1; }
  int units(int) const override { return batch_.rows; }
  void execute(int phase, int unit, int thread) noexcept override;

  const float* change(const float* raw, const HrSampling& p, Scratch* own, bool forbids) const;
  int choose(const float* x, int greatest, const HrSampling& p, Scratch* own) const;
  int draw_all(const float* x, float top, float factor, double chance, Scratch* own) const;
  void keep_likeliest(const float* x, float top, float factor, const HrSampling& p,
                      Scratch* own) const;
  void keep_top_k(const float* x, float top, float factor, int count, Scratch* own) const;
  void keep_mass(const float* x, float top, float factor, double wanted, Scratch* own) const;
  void keep_mass_of_ids(const float* x, double wanted, Scratch* own) const;
  void gather(const float* x, float top, float depth, int wanted, Scratch* own) const;
  void report(int row, int greatest, Scratch* own) const;

  SampleBatch batch_{};
  const Kernels* kernels_;
  std::vector<Scratch> scratch_;
  std::vector<char> broken_;
  Crew crew_;
};

}  // namespace headrace
