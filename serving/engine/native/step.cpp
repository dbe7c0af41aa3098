// One step: the phases of a forward pass over packed rows of tokens.
#include <algorithm>
#include <cmath>

#include "model.h"

namespace headrace {
namespace {

constexpr int kPhasesOfLayer = 9;
// Tokens of a unit in phases that treat each token alone.
constexpr int kTokensOfUnit = 4;

// Lets the tile `part` of `parts` fetch its share of the panel `next`, so that the reading of
// weights from memory goes on evenly under the arithmetic of all tiles. Measured on Zen 5, all
// matrices of SmolLM2-135M, int8, one thread, against fetching in the first tile: 4.2 for 5.9 ms
// at 8 rows, 6.5 for 9.1 at 16, 12.4 for 15.6 at 32. A panel past the matrix's end is the next
// matrix's first, or beyond the arena: a prefetch of no consequence. Fetching the next attention's
// keys and values here as well gains 5 % at 32 rows and loses 8 % at 8 and 16.
void fetch_ahead(Tile* tile, int part, int parts, int next) {
  const Matrix& m = *tile->matrix;
  const int lines = static_cast<int>(block_bytes(m.format) / 64);
  const int begin = lines * part / parts;
  tile->ahead_lines = parts == 1 ? -1 : lines * (part + 1) / parts - begin;
  tile->ahead = m.data + next * m.panel_bytes() + static_cast<size_t>(begin) * 64 * m.blocks;
}

}  // namespace

const char* Model::step(int num_rows, const HrRow* rows, const int32_t* tokens,
                        const int32_t* blocks, float* logits) {
  if (const char* trouble = check(num_rows, rows, tokens, blocks)) return trouble;
  rows_ = rows;
  token_ids_ = tokens;
  block_ids_ = blocks;
  logits_ = logits;
  plan(num_rows, rows);
  ++serial_;
  crew_.run(*this);
  return nullptr;
}

Model::Op Model::op_of(int phase, int* layer) const {
  if (phase == 0) return kEmbed;
  *layer = (phase - 1) / kPhasesOfLayer;
  if (*layer == config_.layers)
    return phase - 1 - config_.layers * kPhasesOfLayer == 0 ? kFinalNorm : kHead;
  return static_cast<Op>(kNorm + (phase - 1) % kPhasesOfLayer);
}

int Model::units(int phase) const {
  int layer = 0;
  const Op op = op_of(phase, &layer);
  if (num_tokens_ == 0) return 0;
  const bool local_norm = num_tokens_ <= kLocalNormTokens;
  const int sampled = static_cast<int>(sampled_.size());
  switch (op) {
    case kEmbed: return whole(num_tokens_, kTokensOfUnit);
    case kNorm:
    case kMlpNorm: return local_norm ? 0 : whole(num_tokens_, kTokensOfUnit);
    case kQkv: return layers_[layer].qkv.panels;
    case kRotate: return static_cast<int>(writes_.size());
    case kAttend: return static_cast<int>(tiles_.size()) * config_.kv_heads;
    case kQuantizeAttended:
      return config_.head_dim % kBlock == 0 ? 0 : whole(num_tokens_, kTokensOfUnit);
    case kOut: return layers_[layer].o.panels;
    case kGateUp: return layers_[layer].gate_up.panels / 2;
    case kDown: return layers_[layer].down.panels;
    case kFinalNorm: return whole(sampled, kTokensOfUnit);
    case kHead: return sampled == 0 ? 0 : head_.panels;
  }
  return 0;
}

void Model::execute(int phase, int unit, int thread) noexcept {
  int index = 0;
  const Op op = op_of(phase, &index);
  const Layer& layer = layers_[std::min(index, config_.layers - 1)];
  const int columns = std::min(kPanel, config_.hidden - unit * kPanel);
  float* x = x_ + unit * kPanel;
  const int first = unit * kTokensOfUnit;
  switch (op) {
    case kEmbed: return embed(unit);
    case kNorm: return norm(layer.attn_norm, unit);
    case kQkv:
      return multiply(layer.qkv, normed(layer.attn_norm, phase, thread), num_tokens_, unit,
                      qkv_ + unit * kPanel, qkv_stride_, kPanel, Store::kSet);
    case kRotate: return rotate(index, unit);
    case kAttend: return attend(index, unit, thread);
    case kQuantizeAttended:
      for (int t = first; t < std::min(first + kTokensOfUnit, num_tokens_); ++t)
        kernels_->quantize(attended_ + static_cast<ptrdiff_t>(t) * q_width_, q_width_,
                           attended_codes_.row(t));
      return;
    case kOut:
      return multiply(layer.o, attended_codes_, num_tokens_, unit, x, hidden_stride_, columns,
                      Store::kAdd);
    case kMlpNorm: return norm(layer.mlp_norm, unit);
    case kGateUp: return gate_up(layer, normed(layer.mlp_norm, phase, thread), unit, thread);
    case kDown:
      return multiply(layer.down, mlp_, num_tokens_, unit, x, hidden_stride_, columns, Store::kAdd);
    case kFinalNorm:
      for (int i = first; i < std::min<int>(first + kTokensOfUnit, sampled_.size()); ++i)
        kernels_->norm_quantize(x_ + static_cast<ptrdiff_t>(sampled_[i]) * hidden_stride_,
                                final_norm_, config_.hidden, config_.rms_eps, normed_.row(i));
      return;
    case kHead:
      return multiply(head_, normed_, static_cast<int>(sampled_.size()), unit,
                      logits_ + unit * kPanel, config_.vocab,
                      std::min(kPanel, config_.vocab - unit * kPanel), Store::kSet);
  }
}

void Model::embed(int unit) {
  const int half = config_.head_dim / 2;
  const int first = unit * kTokensOfUnit;
  for (int t = first; t < std::min(first + kTokensOfUnit, num_tokens_); ++t) {
    unpack_output(embed_, token_ids_[t], config_.hidden,
                  x_ + static_cast<ptrdiff_t>(t) * hidden_stride_);
    for (int i = 0; i < half; ++i) {
      // The angle is rounded to float32 first, as the reference does it.
      const double angle = static_cast<double>(inv_freq_[i] * static_cast<float>(positions_[t]));
      cos_[t * half + i] = static_cast<float>(std::cos(angle)) * config_.rope_scale;
      sin_[t * half + i] = static_cast<float>(std::sin(angle)) * config_.rope_scale;
    }
  }
}

void Model::norm(const float* weight, int unit) {
  const int first = unit * kTokensOfUnit;
  for (int t = first; t < std::min(first + kTokensOfUnit, num_tokens_); ++t)
    kernels_->norm_quantize(x_ + static_cast<ptrdiff_t>(t) * hidden_stride_, weight,
                            config_.hidden, config_.rms_eps, normed_.row(t));
}

// The normed and quantised input of a phase: shared, or for few tokens this thread's own.
const Activations& Model::normed(const float* weight, int phase, int thread) {
  if (num_tokens_ > kLocalNormTokens) return normed_;
  Scratch& own = scratch_[thread];
  const int64_t serial = serial_ * phases() + phase;
  if (own.input_serial == serial) return own.input;
  own.input_serial = serial;
  for (int t = 0; t < num_tokens_; ++t)
    kernels_->norm_quantize(x_ + static_cast<ptrdiff_t>(t) * hidden_stride_, weight,
                            config_.hidden, config_.rms_eps, own.input.row(t));
  return own.input;
}

void Model::multiply(const Matrix& matrix, const Activations& input, int rows, int panel,
                     float* out, ptrdiff_t stride, int columns, Store store) {
  Tile tile{};
  tile.matrix = &matrix;
  tile.panel = panel;
  tile.input = &input;
  tile.out_stride = stride;
  tile.columns = columns;
  tile.store = store;
  const int parts = whole(rows, kTileRows);
  for (int i = 0; i < parts; ++i) {
    tile.row = rows * i / parts;
    tile.rows = rows * (i + 1) / parts - tile.row;
    tile.out = out + tile.row * stride;
    fetch_ahead(&tile, i, parts, panel + 1);
    kernels_->gemm(tile);
  }
}

void Model::gate_up(const Layer& layer, const Activations& input, int panel, int thread) {
  const Scratch& own = scratch_[thread];
  const Matrix& matrix = layer.gate_up;
  const int parts = whole(num_tokens_, kTileRows);
  Tile tiles[2] = {};
  for (int i = 0; i < 2; ++i) {
    tiles[i].matrix = &matrix;
    tiles[i].panel = 2 * panel + i;
    tiles[i].input = &input;
    tiles[i].out = i == 0 ? own.gate : own.up;
    tiles[i].out_stride = kPanel;
    tiles[i].columns = kPanel;
  }
  for (int i = 0; i < parts; ++i) {
    const int begin = num_tokens_ * i / parts;
    const int rows = num_tokens_ * (i + 1) / parts - begin;
    for (Tile& tile : tiles) {
      tile.row = begin;
      tile.rows = rows;
      fetch_ahead(&tile, i, parts, tile.panel + 2);
      kernels_->gemm(tile);
    }
    for (int r = 0; r < rows; ++r)
      kernels_->silu_quantize(own.gate + r * kPanel, own.up + r * kPanel, panel,
                              mlp_.row(begin + r));
  }
}

uint16_t* Model::block_at(int layer, int block, int kv_head) const {
  // Blocks are outermost: what a sequence touches, and so the memory in use, follows its length.
  const size_t index =
      (static_cast<size_t>(block) * config_.layers + layer) * config_.kv_heads + kv_head;
  return reinterpret_cast<uint16_t*>(pool_.data()) + index * block_values_;
}

// Rotates a token's key and puts key and value into the row's block.
void Model::store_token(int index, const HrRow& row, int token, int kv_head) {
  const int dim = config_.head_dim;
  const Layer& layer = layers_[index];
  float* key = qkv_ + static_cast<ptrdiff_t>(token) * qkv_stride_ + q_width_ + kv_head * dim;
  kernels_->rotate_head(key, layer.k_norm, config_.rms_eps, cos_ + token * (dim / 2),
                        sin_ + token * (dim / 2), dim);
  uint16_t halves[2 * kHeadDimMax];
  kernels_->to_bf16(key, dim, halves);
  kernels_->to_bf16(key + kv_width_, dim, halves + dim);
  const int position = positions_[token];
  const int block = block_ids_[row.blocks_first + position / kPositions];
  kernels_->store_kv(halves, halves + dim, dim, position % kPositions,
                     block_at(index, block, kv_head));
}

void Model::rotate(int index, int unit) {
  const QueryTile& tile = writes_[unit];
  const int dim = config_.head_dim;
  for (int t = tile.first; t < tile.first + tile.tokens; ++t) {
    float* queries = qkv_ + static_cast<ptrdiff_t>(t) * qkv_stride_;
    for (int h = 0; h < config_.heads; ++h)
      kernels_->rotate_head(queries + h * dim, layers_[index].q_norm, config_.rms_eps,
                            cos_ + t * (dim / 2), sin_ + t * (dim / 2), dim);
    for (int h = 0; h < config_.kv_heads; ++h) store_token(index, rows_[tile.row], t, h);
  }
}

// Where the keys and values lie that an attention unit reads; returns how many blocks there are.
int Model::blocks_of(int index, int unit, const uint16_t** out) const {
  const QueryTile& tile = tiles_[unit / config_.kv_heads];
  const int32_t* ids = block_ids_ + rows_[tile.row].blocks_first;
  const int count = positions_[tile.first] / kPositions + 1;
  for (int b = 0; b < count; ++b) out[b] = block_at(index, ids[b], unit % config_.kv_heads);
  return count;
}

void Model::attend(int index, int unit, int thread) {
  const QueryTile& tile = tiles_[unit / config_.kv_heads];
  const int kv_head = unit % config_.kv_heads;
  const HrRow& row = rows_[tile.row];
  const int dim = config_.head_dim;
  const int group = config_.heads / config_.kv_heads;
  const Scratch& own = scratch_[thread];
  if (tile.writes) store_token(index, row, tile.first, kv_head);
  for (int i = 0; i < tile.tokens; ++i) {
    const int t = tile.first + i;
    float* queries = qkv_ + static_cast<ptrdiff_t>(t) * qkv_stride_ + kv_head * group * dim;
    if (tile.writes)
      for (int h = 0; h < group; ++h)
        kernels_->rotate_head(queries + h * dim, layers_[index].q_norm, config_.rms_eps,
                              cos_ + t * (dim / 2), sin_ + t * (dim / 2), dim);
    kernels_->to_bf16(queries, group * dim, own.queries + static_cast<ptrdiff_t>(i) * group * dim);
    for (int h = 0; h < group; ++h) own.visible[i * group + h] = positions_[t] + 1;
  }
  const uint16_t** pointers =
      block_pointers_.data() + static_cast<size_t>(thread) * 2 * blocks_of_sequence_;
  const uint16_t** next_pointers = pointers + blocks_of_sequence_;
  const int num_blocks = blocks_of(index, unit, pointers);
  const bool is_last = unit + 1 == static_cast<int>(tiles_.size()) * config_.kv_heads;
  const int num_next = blocks_of(index, is_last ? unit : unit + 1, next_pointers);
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(dim));
  kernels_->attend({own.queries, tile.tokens * group, dim, own.visible, pointers, num_blocks,
                    next_pointers, num_next, scale, own.attended});
  const int width = group * dim;
  for (int i = 0; i < tile.tokens; ++i) {
    const int t = tile.first + i;
    const float* from = own.attended + static_cast<ptrdiff_t>(i) * width;
    if (dim % kBlock != 0) {
      std::copy_n(from, width, attended_ + static_cast<ptrdiff_t>(t) * q_width_ + kv_head * width);
      continue;
    }
    const Activations to = attended_codes_.row(t);
    const int block = kv_head * width / kBlock;
    kernels_->quantize(from, width, {to.codes + block * kBlock, to.scale + block,
                                     to.scaled_sum + block, to.offset + block, width / kBlock});
  }
}

}  // namespace headrace
