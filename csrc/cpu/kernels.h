// What the CPU kernels take, and the table of them that fits this processor. Plain C++: no torch.
//
// Every kernel file is compiled once per instruction set, in a namespace of its own; `kernels()` picks by cpuid.
// All strides count elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace pyalpaca::cpu {

enum class Dtype { kFloat, kBFloat16, kHalf };

enum class Storage { kFloat, kBFloat16, kHalf, kInt8, kInt4 };
constexpr int64_t kInt4Block = 32;  // numbers in 16 bytes: byte j holds number j in its low half and 16 + j in its high

// Lines of numbers, `stride` elements (of int4: bytes) apart. As an operand of a product its lines run along what is
// summed over or, transposed, across it. An integer stands for itself (of int4: less 8) times its group's scale.
struct Matrix {
  Storage storage;
  const void* data;
  int64_t stride;
  bool transposed = false;
  const float* scales = nullptr;  // (lines, groups)
  int64_t group = 1, groups = 0;  // a group: so many numbers of a line, the last one perhaps fewer
};

// y = weight * h * rstd, rstd = 1 / sqrt(mean(h^2) + eps), row by row; h = x, or x + residual rounded to their type.
struct RmsNorm {
  Dtype dtype;  // of x, residual, y and sum
  const void* x;
  int64_t x_stride;      // between rows
  const void* residual;  // null: there is none, and no sum
  int64_t residual_stride;
  const float* weight;  // (width)
  void* y;              // (rows, width)
  void* sum;            // h, (rows, width)
  float* rstd;          // (rows)
  int64_t rows, width;
  float eps;
};

struct RmsNormBackward {
  Dtype dtype;    // of x, dy, dsum and dx
  const void* x;  // h of the forward pass
  int64_t x_stride;
  const void* dy;
  int64_t dy_stride;
  const void* dsum;  // added to dx; null: there is none
  int64_t dsum_stride;
  const float* weight;
  const float* rstd;
  void* dx;        // (rows, width)
  float* dweight;  // (parts, width): each part of the rows sums on its own; row 0 receives the total
  int64_t rows, width, parts;
};

// y = silu(gate) * up, silu(x) = x / (1 + exp(-x))
struct Swiglu {
  Dtype dtype;
  const void *gate, *up;
  int64_t gate_stride, up_stride;  // between rows
  void* y;                         // (rows, width)
  int64_t rows, width;
};

struct SwigluBackward {
  Dtype dtype;
  const void *dy, *gate, *up;
  int64_t dy_stride, gate_stride, up_stride;
  void *dgate, *dup;  // (rows, width)
  int64_t rows, width;
};

// Heads of every token: (batch, tokens, heads, head_dim), from x to y.
struct RopeHeads {
  const void* x;
  int64_t x_batch, x_token, x_head;
  void* y;        // contiguous
  int64_t heads;  // 0: there are none
};

// What goes to row slots[token] of the caches: k as turned, and v as it is. A negative slot stores nothing.
struct RopeStore {
  const int64_t* slots;  // (batch, tokens); null: nothing is stored
  const void* v;
  int64_t v_batch, v_token, v_head;
  void *k_cache, *v_cache;  // (slots, heads of k, head_dim)
};

// Rotates the pairs (x[i], x[i + head_dim / 2]) of q and k by the angle of token and i, or back if `inverse`.
struct Rope {
  Dtype dtype;
  RopeHeads q, k;
  const float *cos, *sin;    // (tokens, head_dim / 2) per batch entry, or (positions, head_dim / 2)
  int64_t angle_batch;       // 0: the same angles for the whole batch
  const int64_t* positions;  // (batch, tokens), the angles' row of each token; null: the token itself
  int64_t batch, tokens, head_dim;
  bool inverse;
  RopeStore store;
};

// Lists of tensors are worked on in pieces of so many elements, whatever the number of threads.
constexpr int64_t kPiece = 32768;
inline constexpr int64_t pieces_of(int64_t count) { return (count + kPiece - 1) / kPiece; }

struct AdamwTensor {
  float *weight, *mean, *square;  // the fp32 weight and its two moments
  const void* gradient;
  Dtype gradient_type;
  void* copy;  // the weight again in copy_type, or null
  Dtype copy_type;
  int64_t count;
  double decay;
};

// One step of AdamW on each tensor; `step` counts from 1.
struct Adamw {
  const AdamwTensor* tensors;
  int64_t count, step;
  double rate, beta1, beta2, eps;
  float gradient_scale;  // gradients are multiplied by it
};

struct Flat {
  const void* data;
  Dtype dtype;
  int64_t count;
};

struct SumOfSquares {
  const Flat* tensors;
  int64_t count;
  double* parts;  // a number for each piece of each tensor
  double* total;
};

struct LoraFactors {
  const float* b;  // (rows, rank)
  const float* a;  // (rank, columns)
  int64_t rank;
  float scale;
};

// out = weight + scale * (b a) for one pair of factors after the other, rounded after each.
struct LoraMerge {
  Dtype dtype;  // of weight and out
  const void* weight;
  int64_t weight_stride;  // between rows
  const LoraFactors* factors;
  int64_t count;  // of factors, at least 1
  void* out;      // (rows, columns)
  int64_t rows, columns;
};

// out = a b^T: of `rows` and `columns` lines of `depth` numbers each, none of the three 0.
struct Linear {
  Matrix a, b;  // a is of floats
  Dtype dtype;  // of out
  void* out;    // (rows, columns)
  bool add;     // out += a b^T instead
  int64_t rows, columns, depth;
  float* panels;  // working memory, panel_floats(rows, depth)
};

// A product as above, or one of several whose sum goes to `out`, of a half type; all but the last leave the upper 16
// bits of the sum's fp32 numbers in `out` and the others in `lower`.
struct ProductSum {
  Linear product;
  uint16_t* lower;  // (rows, columns)
  bool last;
};

// Logits of tokens, those of the vocabulary from `start` on.
struct LogitRows {
  Dtype dtype;
  void* logits;           // (rows, columns)
  const int64_t* labels;  // (rows), of the whole vocabulary; one that has no column here has no logit here
  int64_t start, rows, columns;
};

// Of each row the largest logit, the sum of exp(logit - largest), and the label's logit or 0.
struct LogitSums {
  LogitRows rows;
  float *top, *total, *target;  // (rows)
};

// The loss log(total) + top - target of each row, 0 where its label is kIgnored; then, if `gradient`, its logits become
// scale * (exp(logit - top) / total - [their column is the label]), or 0 too.
struct LogitLoss {
  LogitRows rows;
  const float *top, *total, *target;  // (rows)
  float scale;
  bool gradient;
  float* losses;  // (rows)
};
constexpr int64_t kIgnored = -100;

constexpr int64_t kBlockRows = 378;  // of a product: whole panels, which for so many fit the cache that all cores share

// fp32 numbers that the panels of a product's first operand take: a panel has at most 14 rows.
constexpr int64_t panel_floats(int64_t rows, int64_t depth) {
  return ((rows < kBlockRows ? rows : kBlockRows) + 13) * (depth + depth % 2);
}

struct Strided {
  const void* data;
  int64_t batch, token, head;
};

struct AttentionShape {
  int64_t batch, queries, keys, heads, kv_heads, head_dim;  // packed: how many sequences, and the longest's
  bool causal;                                              // query i sees keys j <= i + q_offset
  int64_t q_offset;                                         // packed: keys - queries of each sequence instead
  float scale;
};

// Sequences side by side in one batch entry: sequence b has the queries and keys from starts[b] to starts[b + 1].
struct Packed {
  const int64_t *q_starts, *kv_starts;  // null: a batch of sequences of one length
  const int64_t* order;                 // in which the sequences are worked on
};

// What keys and values are kept as; int8 has a factor a token and head.
enum class CacheDtype { kFloat, kBFloat16, kHalf, kInt8 };

struct FlashAttention {
  Dtype dtype;             // of q and out
  CacheDtype cache_dtype;  // of k and v
  AttentionShape shape;
  Strided q, k, v, k_scales, v_scales;  // scales: fp32 if k and v are int8, else no data
  void* out;                            // (batch, queries, heads, head_dim)
  float* lse;                           // (batch, heads, queries)
  int64_t lse_head;                     // elements from head to head
  Packed packed;
};

// Rounds keys or values (batch, tokens, heads, head_dim) to what the cache is kept as; int8: to the nearest of 255
// steps of a scale, the largest magnitude of a token and head over 127.
struct StoreCache {
  Dtype dtype;  // of x
  CacheDtype cache_dtype;
  Strided x, cache, scales;  // the last two are written to
  int64_t batch, tokens, heads, head_dim;
};

struct FlashAttentionBackward {
  Dtype dtype;
  AttentionShape shape;
  Strided q, k, v, out, dout;
  const float* lse;
  int64_t lse_head;
  void *dq, *dk, *dv;  // like q, k, v, contiguous
  Packed packed;
};

struct Kernels {
  const char* name;
  void (*rms_norm)(const RmsNorm&);
  void (*rms_norm_backward)(const RmsNormBackward&);
  void (*rope)(const Rope&);
  void (*swiglu)(const Swiglu&);
  void (*swiglu_backward)(const SwigluBackward&);
  void (*adamw)(const Adamw&);
  void (*sum_of_squares)(const SumOfSquares&);
  void (*flash_attention)(const FlashAttention&);
  void (*flash_attention_backward)(const FlashAttentionBackward&);
  void (*store_cache)(const StoreCache&);
  void (*lora_merge)(const LoraMerge&);
  void (*linear)(const Linear&);
  void (*product_sum)(const ProductSum&);
  void (*logit_sums)(const LogitSums&);
  void (*logit_loss)(const LogitLoss&);
};

const Kernels& kernels();

}  // namespace pyalpaca::cpu
