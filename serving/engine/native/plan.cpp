// What a step will do: its rows are checked and its attention is cut into tiles.
#include <algorithm>

#include "model.h"

namespace headrace {

const char* Model::check(int num_rows, const HrRow* rows, const int32_t* tokens,
                         const int32_t* blocks) {
  if (!ready()) return "a tensor has not been set";
  if (num_rows < 0 || num_rows > config_.rows_max) return "too many rows";
  int64_t total = 0;
  for (int i = 0; i < num_rows; ++i) {
    const HrRow& row = rows[i];
    if (row.tokens < 1 || row.tokens_first != total) return "a row's tokens do not follow";
    total += row.tokens;
    if (total > config_.batch_tokens_max) return "too many tokens in one step";
    if (row.position < 0 || row.position > config_.sequence_tokens_max - row.tokens)
      return "a row exceeds the longest sequence";
    if (row.blocks < whole(row.position + row.tokens, kPositions))
      return "a row's blocks do not cover its tokens";
    for (int b = 0; b < row.blocks; ++b) {
      const int32_t id = blocks[row.blocks_first + b];
      if (id < 0 || id >= config_.kv_blocks) return "a block id is outside the pool";
    }
    for (int t = 0; t < row.tokens; ++t) {
      const int32_t id = tokens[row.tokens_first + t];
      if (id < 0 || id >= config_.vocab) return "a token id is outside the vocabulary";
    }
  }
  return nullptr;
}

void Model::plan(int num_rows, const HrRow* rows) {
  num_tokens_ = 0;
  positions_.clear();
  tiles_.clear();
  writes_.clear();
  sampled_.clear();
  for (int i = 0; i < num_rows; ++i) {
    const HrRow& row = rows[i];
    for (int t = 0; t < row.tokens; ++t) positions_.push_back(row.position + t);
    // Tiles end where KV blocks end: all their queries see the same number of blocks, so that a
    // token is computed in the same order of operations alone and within a chunk.
    for (int t = 0; t < row.tokens;) {
      const int count = std::min(row.tokens - t, kPositions - (row.position + t) % kPositions);
      tiles_.push_back({i, row.tokens_first + t, count, row.tokens == 1});
      if (row.tokens > 1) writes_.push_back(tiles_.back());
      t += count;
    }
    num_tokens_ += row.tokens;
    if (row.samples) sampled_.push_back(num_tokens_ - 1);
  }
  // The longest contexts first: what is left for the end is short.
  std::sort(tiles_.begin(), tiles_.end(), [this](const QueryTile& a, const QueryTile& b) {
    const int pa = positions_[a.first] / kPositions;
    const int pb = positions_[b.first] / kPositions;
    return pa * a.tokens != pb * b.tokens ? pa * a.tokens > pb * b.tokens : a.first < b.first;
  });
}

}  // namespace headrace
