// Construction of a model and the filling of its weights.
#include "model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pack.h"

namespace headrace {
namespace {

Matrix matrix_of(Arena& arena, Format format, int outputs, int inputs) {
  Matrix m;
  m.format = format;
  m.panels = whole(outputs, kPanel);
  m.blocks = whole(inputs, kBlock);
  m.data = arena.take<uint8_t>(m.bytes());
  if (format == Format::kChannel8) m.scale = arena.take<float>(m.panels * kPanel);
  return m;
}

Activations activations_of(Arena& arena, int rows, int inputs) {
  Activations a;
  a.blocks = whole(inputs, kBlock);
  const size_t blocks = static_cast<size_t>(rows) * a.blocks;
  a.codes = arena.take<int8_t>(blocks * kBlock);
  a.scale = arena.take<float>(blocks);
  a.scaled_sum = arena.take<float>(blocks);
  a.offset = arena.take<int32_t>(blocks);
  return a;
}

}  // namespace

const Kernels* choose_kernels(int wanted) {
  if (wanted == 1) return portable_kernels();
  const Kernels* fast = avx512_kernels();
  return fast != nullptr || wanted == 2 ? fast : portable_kernels();
}

Model::Model(const HrConfig& config)
    : config_(config),
      kernels_(choose_kernels(config.kernels)),
      q_width_(config.heads * config.head_dim),
      kv_width_(config.kv_heads * config.head_dim),
      hidden_stride_(whole(config.hidden, kPanel) * kPanel),
      qkv_stride_(whole(q_width_ + 2 * kv_width_, kPanel) * kPanel),
      block_values_(static_cast<size_t>(2) * kPositions * config.head_dim),
      layers_(config.layers),
      seen_(static_cast<size_t>(config.layers + 1) * 16),
      scratch_(config.threads),
      blocks_of_sequence_(whole(config.sequence_tokens_max, kPositions)),
      crew_(config.threads) {
  if (kernels_ == nullptr) throw std::runtime_error("this CPU cannot run the kernels asked for");
  Arena measured;
  allocate_weights(measured);
  weights_ = Arena(measured.used());
  allocate_weights(weights_);
  for (Layer& layer : layers_)
    for (const Matrix* m : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) clear(*m);
  clear(embed_);
  if (!config_.tied) clear(head_);
  tensors_left_ = 3 + (config_.tied ? 0 : 1) + config_.layers * (config_.qk_norm ? 11 : 9);

  pool_ = Mapping(block_values_ * sizeof(uint16_t) * config_.kv_heads * config_.layers *
                  config_.kv_blocks);
  Arena counted;
  allocate_buffers(counted);
  buffers_ = Arena(counted.used());
  allocate_buffers(buffers_);
  block_pointers_.resize(static_cast<size_t>(config_.threads) * 2 * blocks_of_sequence_);
  positions_.reserve(config_.batch_tokens_max);
  row_of_.reserve(config_.batch_tokens_max);
  tiles_.reserve(config_.batch_tokens_max);
  writes_.reserve(config_.batch_tokens_max);
  sampled_.reserve(config_.rows_max);
}

void Model::allocate_weights(Arena& arena) {
  const HrConfig& c = config_;
  const Format format = c.bits == 4 ? Format::kBlock4 : Format::kChannel8;
  for (Layer& layer : layers_) {
    // In the order of use: a prefetch that runs past a matrix's end reaches the next one.
    layer.qkv = matrix_of(arena, format, q_width_ + 2 * kv_width_, c.hidden);
    layer.o = matrix_of(arena, format, c.hidden, q_width_);
    layer.gate_up = matrix_of(arena, format, 2 * whole(c.ffn, kPanel) * kPanel, c.hidden);
    layer.down = matrix_of(arena, format, c.hidden, c.ffn);
    layer.attn_norm = arena.take<float>(c.hidden);
    layer.mlp_norm = arena.take<float>(c.hidden);
    if (c.qk_norm) {
      layer.q_norm = arena.take<float>(c.head_dim);
      layer.k_norm = arena.take<float>(c.head_dim);
    }
    layer.qkv.bias = arena.take<float>(layer.qkv.panels * kPanel);
    layer.o.bias = arena.take<float>(layer.o.panels * kPanel);
  }
  final_norm_ = arena.take<float>(c.hidden);
  inv_freq_ = arena.take<float>(c.head_dim / 2);
  embed_ = matrix_of(arena, Format::kBlock8, c.vocab, c.hidden);
  head_ = c.tied ? embed_ : matrix_of(arena, Format::kBlock8, c.vocab, c.hidden);
}

void Model::allocate_buffers(Arena& arena) {
  const HrConfig& c = config_;
  const size_t tokens = c.batch_tokens_max;
  x_ = arena.take<float>(tokens * hidden_stride_);
  qkv_ = arena.take<float>(tokens * qkv_stride_);
  attended_ = arena.take<float>(tokens * q_width_);
  cos_ = arena.take<float>(tokens * c.head_dim / 2);
  sin_ = arena.take<float>(tokens * c.head_dim / 2);
  normed_ = activations_of(arena, static_cast<int>(std::max<size_t>(tokens, c.rows_max)), c.hidden);
  attended_codes_ = activations_of(arena, static_cast<int>(tokens), q_width_);
  mlp_ = activations_of(arena, static_cast<int>(tokens), c.ffn);
  const int queries = kPositions * (c.heads / c.kv_heads);
  for (Scratch& s : scratch_) {
    s.gate = arena.take<float>(kTileRows * kPanel);
    s.up = arena.take<float>(kTileRows * kPanel);
    s.queries = arena.take<uint16_t>(static_cast<size_t>(queries) * c.head_dim);
    s.attended = arena.take<float>(static_cast<size_t>(queries) * c.head_dim);
    s.visible = arena.take<int>(queries);
    s.input = activations_of(arena, kLocalNormTokens, c.hidden);
  }
}

bool Model::find(const char* name, int index, Want* want) {
  const std::string key = name;
  const HrConfig& c = config_;
  Layer& layer = layers_[std::max(index, 0)];
  if (index < 0) {
    if (key == "embed") *want = {&embed_, nullptr, c.vocab, c.hidden, {}, 0};
    if (key == "lm_head" && !c.tied) *want = {&head_, nullptr, c.vocab, c.hidden, {}, 1};
    if (key == "final_norm") *want = {nullptr, final_norm_, c.hidden, 1, {}, 2};
    if (key == "rope.inv_freq") *want = {nullptr, inv_freq_, c.head_dim / 2, 1, {}, 3};
    return want->outputs > 0;
  }
  if (key == "q") *want = {&layer.qkv, nullptr, q_width_, c.hidden, {}, 0};
  if (key == "k") *want = {&layer.qkv, nullptr, kv_width_, c.hidden, {q_width_}, 1};
  if (key == "v") *want = {&layer.qkv, nullptr, kv_width_, c.hidden, {q_width_ + kv_width_}, 2};
  if (key == "o") *want = {&layer.o, nullptr, c.hidden, q_width_, {}, 3};
  if (key == "gate") *want = {&layer.gate_up, nullptr, c.ffn, c.hidden, {0, 2, 0}, 4};
  if (key == "up") *want = {&layer.gate_up, nullptr, c.ffn, c.hidden, {0, 2, 1}, 5};
  if (key == "down") *want = {&layer.down, nullptr, c.hidden, c.ffn, {}, 6};
  if (key == "attn_norm") *want = {nullptr, layer.attn_norm, c.hidden, 1, {}, 7};
  if (key == "mlp_norm") *want = {nullptr, layer.mlp_norm, c.hidden, 1, {}, 8};
  if (key == "q_norm" && c.qk_norm) *want = {nullptr, layer.q_norm, c.head_dim, 1, {}, 9};
  if (key == "k_norm" && c.qk_norm) *want = {nullptr, layer.k_norm, c.head_dim, 1, {}, 10};
  // Biases may be absent: they are zero then, and not among the tensors waited for.
  float* bias = layer.qkv.bias;
  if (key == "q_bias") *want = {nullptr, bias, q_width_, 1, {}, kOptional};
  if (key == "k_bias") *want = {nullptr, bias + q_width_, kv_width_, 1, {}, kOptional};
  if (key == "v_bias") *want = {nullptr, bias + q_width_ + kv_width_, kv_width_, 1, {}, kOptional};
  if (key == "o_bias") *want = {nullptr, layer.o.bias, c.hidden, 1, {}, kOptional};
  return want->outputs > 0;
}

const char* Model::set(const char* name, int layer, const void* data, int64_t data_bytes,
                       const void* scale, int64_t scale_bytes, const void* low,
                       int64_t low_bytes) {
  Want want;
  if (layer >= config_.layers || !find(name, layer, &want)) return "the model has no such tensor";
  if (want.matrix == nullptr) {
    if (data_bytes != want.outputs * static_cast<int64_t>(sizeof(float)))
      return "the vector has another length";
    std::memcpy(want.vector, data, data_bytes);
  } else {
    const Matrix& m = *want.matrix;
    const int64_t blocks = static_cast<int64_t>(want.outputs) * m.blocks;
    const bool four = m.format == Format::kBlock4;
    const int64_t codes = four ? blocks * (kBlock / 2)
                               : static_cast<int64_t>(want.outputs) * want.inputs;
    const int64_t scales = m.format == Format::kChannel8 ? want.outputs * 4 : blocks * 2;
    if (data_bytes != codes || scale_bytes != scales || (four && low_bytes != blocks * 2))
      return "the matrix has another shape or format";
    const auto* bytes = static_cast<const uint8_t*>(data);
    pack(m, {bytes, static_cast<const uint8_t*>(scale), static_cast<const uint8_t*>(low),
             want.outputs, want.inputs},
         want.placement);
  }
  if (want.slot == kOptional) return nullptr;
  const size_t seen = static_cast<size_t>(layer + 1) * 16 + want.slot;
  if (!seen_[seen]) --tensors_left_;
  seen_[seen] = true;
  return nullptr;
}

int64_t Model::bytes(int which) const {
  if (which == 0) return static_cast<int64_t>(weights_.used());
  if (which == 1) return static_cast<int64_t>(pool_.bytes());
  return static_cast<int64_t>(buffers_.used());
}

}  // namespace headrace
