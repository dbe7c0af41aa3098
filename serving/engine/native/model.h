// A decoder: packed weights, a pool of KV blocks, and the step that advances rows of tokens.
#pragma once

#include <memory>
#include <vector>

#include "api.h"
#include "crew.h"
#include "kernels.h"
#include "memory.h"
#include "pack.h"

namespace headrace {

// value / part, rounded up.
inline int whole(int value, int part) { return (value + part - 1) / part; }

// Steps of at most so many tokens are normed by each thread for itself: less work than a phase.
constexpr int kLocalNormTokens = 2;
constexpr int kOptional = -1;
constexpr int kHeadDimMax = 512;

struct Layer {
  float* attn_norm = nullptr;
  float* mlp_norm = nullptr;
  float* q_norm = nullptr;  // null where the model has none, as is k_norm
  float* k_norm = nullptr;
  Matrix qkv;
  Matrix o;
  Matrix gate_up;
  Matrix down;
};

// What one thread works in; nobody else touches it while a step runs.
struct Scratch {
  float* gate;       // [kTileRows][kPanel]
  float* up;         // [kTileRows][kPanel]
  uint16_t* queries; // bf16 [query rows of a tile][head_dim]
  float* attended;   // [query rows of a tile][head_dim]
  int* visible;      // [query rows of a tile]
  Activations input; // norm and quantise of a few rows, done by each thread for itself
  int64_t input_serial = -1;
};

class Model final : private Job {
 public:
  // Throws std::bad_alloc, or std::runtime_error with a sentence.
  explicit Model(const HrConfig& config);

  // Sentence on failure, null on success.
  const char* set(const char* name, int layer, const void* data, int64_t data_bytes,
                  const void* scale, int64_t scale_bytes, const void* low, int64_t low_bytes);
  bool ready() const { return tensors_left_ == 0; }
  int64_t bytes(int which) const;
  const char* step(int num_rows, const HrRow* rows, const int32_t* tokens, const int32_t* blocks,
                   float* logits);

 private:
  // Where a tensor of the weights file goes.
  struct Want {
    Matrix* matrix = nullptr;  // or
    float* vector = nullptr;
    int outputs = 0;
    int inputs = 0;
    Placement placement;
    int slot = 0;  // among the tensors of its layer; kOptional: may be absent
  };
  // Queries of one row that lie in one KV block, for all heads of a KV head.
  struct QueryTile {
    int row;
    int first;  // token of the batch
    int tokens;
    bool writes;  // a row of one token: it rotates and stores its own key and value
  };
  enum Op { kEmbed, kNorm, kQkv, kRotate, kAttend, kQuantizeAttended, kOut, kMlpNorm, kGateUp, kDown,
            kFinalNorm, kHead };

  void allocate_weights(Arena& arena);
  void allocate_buffers(Arena& arena);
  bool find(const char* name, int layer, Want* want);
  const char* check(int num_rows, const HrRow* rows, const int32_t* tokens, const int32_t* blocks);
  void plan(int num_rows, const HrRow* rows);

  int phases() const override { return 2 + 9 * config_.layers + 1; }
  int units(int phase) const override;
  void execute(int phase, int unit, int thread) noexcept override;
  Op op_of(int phase, int* layer) const;

  void embed(int unit);
  void norm(const float* weight, int unit);
  const Activations& normed(const float* weight, int phase, int thread);
  void multiply(const Matrix& matrix, const Activations& input, int rows, int panel, float* out,
                ptrdiff_t stride, int columns, Store store);
  void gate_up(const Layer& layer, const Activations& input, int panel, int thread);
  void rotate(int layer, int unit);
  void attend(int layer, int unit, int thread);
  int blocks_of(int layer, int unit, const uint16_t** out) const;
  void store_token(int layer, const HrRow& row, int token, int kv_head);
  uint16_t* block_at(int layer, int block, int kv_head) const;

  const HrConfig config_;
  const Kernels* kernels_;
  // Derived: widths of q and of k (or v), padded widths of the buffers.
  const int q_width_;
  const int kv_width_;
  int hidden_stride_;
  int qkv_stride_;
  size_t block_values_;  // bf16 numbers of one KV block, one layer, one KV head

  Arena weights_;
  std::vector<Layer> layers_;
  Matrix embed_;
  Matrix head_;  // embed_ where tied
  float* final_norm_ = nullptr;
  float* inv_freq_ = nullptr;
  std::vector<bool> seen_;  // [layer + 1][16]
  int tensors_left_ = 0;

  Mapping pool_;
  Arena buffers_;
  float* x_;         // [tokens][hidden_stride]
  float* qkv_;       // [tokens][qkv_stride]
  float* attended_;  // [tokens][q_width]; only where heads are not whole blocks
  float* cos_;       // [tokens][head_dim / 2]
  float* sin_;
  Activations normed_;
  Activations attended_codes_;
  Activations mlp_;
  std::vector<Scratch> scratch_;
  std::vector<const uint16_t*> block_pointers_;  // [thread][this task, next][blocks of a sequence]
  int blocks_of_sequence_;

  // The step that runs.
  int num_tokens_ = 0;
  const HrRow* rows_ = nullptr;
  const int32_t* token_ids_ = nullptr;
  const int32_t* block_ids_ = nullptr;
  float* logits_ = nullptr;
  std::vector<int> positions_;  // of each token
  std::vector<int> row_of_;     // of each token
  std::vector<int> sampled_;    // token of the batch whose logits are wanted
  std::vector<QueryTile> tiles_;
  std::vector<QueryTile> writes_;  // tiles of rows of many tokens: keys and values to store
  int64_t serial_ = 0;

  Crew crew_;
};

const Kernels* choose_kernels(int wanted);

}  // namespace headrace
