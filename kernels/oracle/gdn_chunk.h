// The chunk program of Gated DeltaNet, row by row, with a GPU's bits: what flash-linear-attention's
// chunk_gated_delta_rule computes on Hopper, every intermediate included. A row depends on the rows before it in its
// chunk and on the state at the chunk's start, so prefill appends many rows and decode appends one; it is the same
// code.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/oracle/special_functions.h"
#include "kernels/oracle/tensor_core.h"

namespace lockstep::oracle {

constexpr int kGdnChunk = 64;

// Widths of one head; multiples of 16.
struct GdnHeadShape {
  int key_dim;
  int value_dim;
};

// One row of one value head.
struct GdnRow {
  const uint16_t* q;  // [key_dim] bf16, l2-normalised
  const uint16_t* k;  // [key_dim] bf16, l2-normalised
  const uint16_t* v;  // [value_dim] bf16
  float g;            // log-decay
  uint16_t beta;      // bf16
};

// One head's open chunk. Vectors of rows are [kGdnChunk, width]; rows [0, rows()) are filled.
class GdnChunk {
 public:
  // state: [key_dim, value_dim] at the chunk's start; null is zero. scale: of q, key_dim^-0.5 in fp32.
  GdnChunk(GdnHeadShape shape, const float* state, float scale, Function exp2 = Exp2Approx);

  void Append(const GdnRow& row);  // at most kGdnChunk rows
  int rows() const { return rows_; }

  // The state after the rows so far, [key_dim, value_dim]; for a full chunk, the next one's start.
  std::vector<float> NextState() const;

  std::vector<float> decay;     // G [kGdnChunk]: log2 of the decay since the chunk's start
  std::vector<float> gram;      // A [kGdnChunk, kGdnChunk], columns j < i
  std::vector<float> merge;     // X: the first product of each merge of 16x16 blocks, columns of the earlier blocks
  std::vector<float> inverse;   // (I + A)^-1 [kGdnChunk, kGdnChunk] in fp32; T is its bf16
  std::vector<uint16_t> u;      // [kGdnChunk, value_dim]
  std::vector<uint16_t> w;      // [kGdnChunk, key_dim]
  std::vector<uint16_t> score;  // P [kGdnChunk, kGdnChunk], columns j <= i
  std::vector<float> delta;     // v' [kGdnChunk, value_dim] in fp32; its bf16 enters o
  std::vector<uint16_t> o;      // [kGdnChunk, value_dim]

 private:
  void AppendDecay();
  void AppendGram(const GdnRow& row);
  void AppendDiagonalInverse();
  void AppendMergedInverse();
  void AppendDelta(const GdnRow& row);
  void AppendOutput(const GdnRow& row);

  GdnHeadShape shape_;
  float scale_;
  Function exp2_;
  int rows_ = 0;
  std::vector<float> state_;      // [key_dim, value_dim]
  std::vector<float> log_decay_;  // g [kGdnChunk]
  FactorMatrix state_image_;      // bf16 state, [value_dim][key_dim]
  FactorMatrix k_;                // [kGdnChunk][key_dim]
  FactorMatrix beta_v_;           // bf16(beta v), [value_dim][kGdnChunk]
  FactorMatrix beta_k_;           // bf16(bf16(beta k) * exp2(G)), [key_dim][kGdnChunk]
  FactorMatrix delta_image_;      // bf16 v', [value_dim][kGdnChunk]
};

// Rows of a sequence from a chunk's start on, all heads. Value head h reads key head h / (value_heads / key_heads).
struct GdnSequence {
  int rows;
  int key_heads;
  int value_heads;
  GdnHeadShape head;
  const uint16_t* q;     // [rows, key_heads, key_dim] bf16, l2-normalised
  const uint16_t* k;     // [rows, key_heads, key_dim] bf16, l2-normalised
  const uint16_t* v;     // [rows, value_heads, value_dim] bf16
  const float* g;        // [rows, value_heads]
  const uint16_t* beta;  // [rows, value_heads] bf16
};

// o: [rows, value_heads, value_dim]. state: [value_heads, key_dim, value_dim], at the first row's chunk start; becomes
// the one at the start of the chunk that is still open after the last row.
void GdnForward(const GdnSequence& sequence, float* state, uint16_t* o);

}  // namespace lockstep::oracle
