#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "model.h"

namespace headrace {
namespace {

// Below it, sampling is greedy: the quotient would overflow before it changed an answer.
constexpr float kTemperatureMin = 1e-5f;
// Fewer rows than this are not worth waking a thread for.
constexpr int kRowsForCrew = 3;
// Logits whose sums are formed at a time when a draw is over the whole vocabulary.
constexpr int kSumBlock = 1024;
// Each encloses the wanted mass nine times closer: 100 becomes 0.02 after the fourth.
constexpr int kMassPasses = 4;
constexpr float kLow = -std::numeric_limits<float>::infinity();

uint64_t mix(uint64_t x) {  // splitmix64's finaliser (Steele, Lea and Flood, 2014)
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// Uniform in [0, 1), a function of the two alone.
double chance_of(uint64_t seed, uint64_t step) {
  return static_cast<double>(mix(mix(seed) ^ mix(~step)) >> 11) * 0x1p-53;
}

// Likelier first, lower id first among equals.
struct Likelier {
  const float* x;
  bool operator()(int a, int b) const { return x[a] != x[b] ? x[a] > x[b] : a < b; }
};

double weight_of(float x, float top, float factor) {
  return std::exp(static_cast<double>((x - top) * factor));
}

template <typename Condition>
void drop_if(std::vector<int>& ids, Condition condition) {
  ids.erase(std::remove_if(ids.begin(), ids.end(), condition), ids.end());
}

}  // namespace

SamplerCrew::SamplerCrew(int threads, int kernels)
    : kernels_(choose_kernels(kernels)), scratch_(threads), crew_(threads) {
  if (kernels_ == nullptr) throw std::runtime_error("this CPU cannot run the kernels asked for");
}

const char* SamplerCrew::sample(const SampleBatch& batch) {
  batch_ = batch;
  broken_.assign(batch.rows, 0);
  for (Scratch& own : scratch_) {
    own.changed.resize(batch.vocab);
    own.weights.resize(batch.vocab);
    own.ids.reserve(batch.vocab);
    own.order.reserve(batch.vocab);
    own.sums.reserve(batch.vocab / kSumBlock + 1);
  }
  if (batch.rows < kRowsForCrew) {
    for (int i = 0; i < batch.rows; ++i) execute(0, i, 0);
  } else {
    crew_.run(*this);
  }
  for (char broken : broken_)
    if (broken) return "a row holds a NaN, or no finite value";
  return nullptr;
}

void SamplerCrew::execute(int, int row, int thread) noexcept {
  const HrSampling& p = *batch_.params[row];
  const float* raw = batch_.logits + static_cast<size_t>(row) * batch_.vocab;
  Scratch* own = &scratch_[thread];
  const bool changes = p.bias_count > 0 || p.history_count > 0 || p.forbid_count > 0 || p.mask;
  int likeliest = -1;
  if (!changes || p.logprobs >= 0) {
    likeliest = kernels_->argmax(raw, batch_.vocab);
    broken_[row] = likeliest < 0;
    if (likeliest < 0) return;
  }
  if (p.logprobs >= 0) report(row, likeliest, own);
  const float* x = raw;
  if (changes) {
    x = change(raw, p, own, true);
    likeliest = kernels_->argmax(x, batch_.vocab);
    if (likeliest < 0 && p.forbid_count > 0) {
      x = change(raw, p, own, false);
      likeliest = kernels_->argmax(x, batch_.vocab);
    }
    if (likeliest < 0) {
      broken_[row] = kernels_->argmax(raw, batch_.vocab) < 0;
      batch_.ids[row] = -1;
      return;
    }
  }
  const int id = p.temperature < kTemperatureMin ? likeliest : choose(x, likeliest, p, own);
  batch_.ids[row] = id;
  // report() left the logarithm of the raw distribution's normaliser there.
  if (p.logprobs >= 0) batch_.logprobs[row] = raw[id] - batch_.logprobs[row];
}

// The logits after bias, penalties, mask and forbidden tokens, in this thread's scratch.
const float* SamplerCrew::change(const float* raw, const HrSampling& p, Scratch* own,
                                 bool forbids) const {
  const int vocab = batch_.vocab;
  float* x = own->changed.data();
  std::copy_n(raw, vocab, x);
  const auto known = [vocab](int id) { return id >= 0 && id < vocab; };
  for (int i = 0; i < p.bias_count; ++i)
    if (known(p.bias_ids[i])) x[p.bias_ids[i]] += p.bias_values[i];
  for (int i = 0; i < p.history_count; ++i) {
    const int id = p.history_ids[i];
    if (!known(id)) continue;
    const float penalty = p.repetition_penalty;
    if (penalty != 1.0f) x[id] = x[id] > 0 ? x[id] / penalty : x[id] * penalty;
    if (p.history_counts[i] == 0) continue;
    x[id] -= p.frequency_penalty * static_cast<float>(p.history_counts[i]) + p.presence_penalty;
  }
  if (p.mask != nullptr) {
    for (int word = 0; word * 32 < vocab; ++word) {
      const uint32_t bits = word < p.mask_words ? p.mask[word] : 0;
      if (bits == 0xffffffff) continue;
      const int count = std::min(32, vocab - word * 32);
      for (int i = 0; i < count; ++i) x[word * 32 + i] = bits >> i & 1 ? x[word * 32 + i] : kLow;
    }
  }
  for (int i = 0; forbids && i < p.forbid_count; ++i)
    if (known(p.forbid_ids[i])) x[p.forbid_ids[i]] = kLow;
  return x;
}

int SamplerCrew::choose(const float* x, int greatest, const HrSampling& p, Scratch* own) const {
  const float top = x[greatest];
  const float factor = 1.0f / p.temperature;
  const double chance = chance_of(p.seed, p.step);
  const bool top_k = p.top_k > 0 && p.top_k < batch_.vocab;
  if (!top_k && !(p.top_p < 1.0f) && !(p.min_p > 0.0f))
    return draw_all(x, top, factor, chance, own);
  keep_likeliest(x, top, factor, p, own);
  const std::vector<float>& weights = own->weights;
  double total = 0;
  for (int id : own->ids) total += weights[id];
  double left = chance * total;
  for (int id : own->ids) {
    left -= weights[id];
    if (left < 0) return id;
  }
  return own->ids.back();
}

int SamplerCrew::draw_all(const float* x, float top, float factor, double chance,
                          Scratch* own) const {
  own->sums.clear();
  double total = 0;
  for (int begin = 0; begin < batch_.vocab; begin += kSumBlock) {
    const int count = std::min(kSumBlock, batch_.vocab - begin);
    own->sums.push_back(kernels_->sum_exp(x + begin, count, top, factor));
    total += own->sums.back();
  }
  double left = chance * total;
  int begin = 0;
  size_t block = 0;
  for (; block + 1 < own->sums.size() && left >= own->sums[block]; ++block) {
    left -= own->sums[block];
    begin += kSumBlock;
  }
  const int end = std::min(batch_.vocab, begin + kSumBlock);
  int last = -1;
  for (int id = begin; id < end; ++id) {
    if (x[id] == kLow) continue;
    last = id;
    left -= weight_of(x[id], top, factor);
    if (left < 0) return id;
  }
  // Rounding left a remainder beyond the last allowed token.
  while (last < 0) last = x[--begin] == kLow ? -1 : begin;
  return last;
}

// Leaves in own->ids, ascending, what top_k, top_p and min_p keep; and in own->weights each
// token's exp((x - top) * factor).
void SamplerCrew::keep_likeliest(const float* x, float top, float factor, const HrSampling& p,
                                 Scratch* own) const {
  const int vocab = batch_.vocab;
  double total = kernels_->weigh(x, vocab, top, factor, own->weights.data());
  const bool top_k = p.top_k > 0 && p.top_k < vocab;
  const bool top_p = p.top_p < 1.0f;
  if (top_k) {
    keep_top_k(x, top, factor, p.top_k, own);
    total = 0;
    for (int id : own->ids) total += own->weights[id];
  }
  const double wanted = total * static_cast<double>(p.top_p);
  if (top_p && top_k) keep_mass_of_ids(x, wanted, own);
  if (top_p && !top_k) keep_mass(x, top, factor, wanted, own);
  if (p.min_p > 0.0f) {
    const float least = top + std::log(p.min_p) / factor;
    if (top_k || top_p) {
      drop_if(own->ids, [x, least](int id) { return x[id] < least; });
    } else {
      gather(x, top, top - least, 1, own);
    }
  }
}

void SamplerCrew::keep_top_k(const float* x, float top, float factor, int count,
                             Scratch* own) const {
  // A first guess at how far below the greatest a kept logit may lie; gather() deepens it.
  gather(x, top, 4.0f / factor, count, own);
  if (static_cast<int>(own->ids.size()) <= count) return;
  own->order = own->ids;
  std::nth_element(own->order.begin(), own->order.begin() + count - 1, own->order.end(),
                   Likelier{x});
  const float least = x[own->order[count - 1]];
  drop_if(own->ids, [x, least](int id) { return x[id] < least; });
}

// Of own->ids, the fewest likeliest whose weights reach `wanted`; for short lists.
void SamplerCrew::keep_mass_of_ids(const float* x, double wanted, Scratch* own) const {
  own->order = own->ids;
  const Likelier likelier{x};
  std::sort(own->order.begin(), own->order.end(), likelier);
  double mass = 0;
  for (int cut : own->order) {
    mass += own->weights[cut];
    if (mass < wanted) continue;
    drop_if(own->ids, [&likelier, cut](int id) { return likelier(cut, id); });
    return;
  }
}

// The same of the whole vocabulary, without sorting it: the logit at which the mass is reached is
// enclosed by passes that each try several thresholds, until few tokens lie between.
void SamplerCrew::keep_mass(const float* x, float top, float factor, double wanted,
                            Scratch* own) const {
  const int vocab = batch_.vocab;
  // Weights from `high` on sum to `mass`, less than wanted; those from `low` on reach it, or `low`
  // is so deep that what lies below it has no weight.
  float high = std::nextafter(top, std::numeric_limits<float>::infinity());
  float low = top - 100.0f / factor;
  double mass = 0;
  for (int pass = 0; pass < kMassPasses; ++pass) {
    float thresholds[kThresholds];
    double sums[kThresholds];
      for (int j = 0; j < kThresholds; ++j) {
      // At first by halves: masses fall off exponentially with depth.
      const float part = pass == 0 ? std::exp2(static_cast<float>(-1 - j))
                                   : 1.0f - static_cast<float>(j + 1) / (kThresholds + 1);
      thresholds[j] = high - (high - low) * part;
    }
    kernels_->mass_above(x, own->weights.data(), vocab, thresholds, sums);
    float next_low = low;
    for (int j = 0; j < kThresholds; ++j) {
      if (sums[j] >= wanted) {
        next_low = std::max(next_low, thresholds[j]);
      } else if (thresholds[j] < high) {
        high = thresholds[j];
        mass = sums[j];
      }
    }
    low = next_low;
  }
  low = std::min(low, top);
  own->ids.resize(vocab);
  own->ids.resize(kernels_->at_least(x, vocab, low, own->ids.data(), vocab));
  own->order.clear();
  for (int id : own->ids)
    if (x[id] < high) own->order.push_back(id);
  const Likelier likelier{x};
  std::sort(own->order.begin(), own->order.end(), likelier);
  for (int cut : own->order) {
    mass += own->weights[cut];
    if (mass < wanted) continue;
    drop_if(own->ids, [&likelier, cut](int id) { return likelier(cut, id); });
    return;
  }
}

// Ids with logits >= top - depth, ascending; deeper until there are `wanted` or all are there.
void SamplerCrew::gather(const float* x, float top, float depth, int wanted, Scratch* own) const {
  const int vocab = batch_.vocab;
  own->ids.resize(vocab);
  int count = 0;
  for (;; depth *= 2) {
    // The greatest finite depth takes every allowed token.
    const bool all = depth > 1e30f;
    const float least = all ? std::numeric_limits<float>::lowest() : top - depth;
    count = kernels_->at_least(x, vocab, least, own->ids.data(), vocab);
    if (count >= wanted || all) break;
  }
  own->ids.resize(count);
}

// The likeliest tokens of the model's own distribution; and, in logprobs[row], the logarithm of
// its normaliser, from which the caller forms the chosen token's.
void SamplerCrew::report(int row, int greatest, Scratch* own) const {
  const HrSampling& p = *batch_.params[row];
  const float* x = batch_.logits + static_cast<size_t>(row) * batch_.vocab;
  const double sum = kernels_->sum_exp(x, batch_.vocab, x[greatest], 1.0f);
  const float normaliser = static_cast<float>(x[greatest] + std::log(sum));
  batch_.logprobs[row] = normaliser;
  const int wanted = std::min({p.logprobs, batch_.vocab, batch_.top_stride});
  if (wanted == 0) return;
  gather(x, x[greatest], 4.0f, wanted, own);
  // Logits of minus infinity are not gathered; what is left of the list says so.
  const int count = std::min<int>(wanted, own->ids.size());
  std::partial_sort(own->ids.begin(), own->ids.begin() + count, own->ids.end(), Likelier{x});
  for (int i = 0; i < wanted; ++i) {
    const size_t at = static_cast<size_t>(row) * batch_.top_stride + i;
    batch_.top_ids[at] = i < count ? own->ids[i] : -1;
    batch_.top_logprobs[at] = i < count ? x[own->ids[i]] - normaliser : kLow;
  }
}

}  // namespace headrace
