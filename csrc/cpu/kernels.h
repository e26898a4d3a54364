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

// y = weight * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps), row by row.
struct RmsNorm {
  Dtype dtype;  // of x and y
  const void* x;
  int64_t x_stride;     // between rows
  const float* weight;  // (width)
  void* y;              // (rows, width)
  float* rstd;          // (rows)
  int64_t rows, width;
  float eps;
};

struct RmsNormBackward {
  Dtype dtype;  // of x, dy and dx
  const void* x;
  int64_t x_stride;
  const void* dy;
  int64_t dy_stride;
  const float* weight;
  const float* rstd;
  void* dx;        // (rows, width)
  float* dweight;  // (parts, width): each part of the rows sums on its own; row 0 receives the total
  int64_t rows, width, parts;
};

// Rotates the pairs (x[i], x[i + head_dim / 2]) by the angle of token and i, or back if `inverse`.
struct Rope {
  Dtype dtype;
  const void* x;
  int64_t x_batch, x_token, x_head;
  const float *cos, *sin;  // (tokens, head_dim / 2) per batch entry
  int64_t angle_batch;     // 0: the same angles for the whole batch
  void* y;                 // (batch, tokens, heads, head_dim)
  int64_t batch, tokens, heads, head_dim;
  bool inverse;
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
  int64_t rows, columns, depth;
  float* panels;  // working memory, panel_floats(rows, depth)
};

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
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  bool causal;  // query i sees keys j <= i + q_offset
  int64_t q_offset;
  float scale;
};

struct FlashAttention {
  Dtype dtype;
  AttentionShape shape;
  Strided q, k, v;
  void* out;   // (batch, queries, heads, head_dim)
  float* lse;  // (batch, heads, queries)
};

struct FlashAttentionBackward {
  Dtype dtype;
  AttentionShape shape;
  Strided q, k, v, out, dout;
  const float* lse;
  void *dq, *dk, *dv;  // like q, k, v, contiguous
};

struct Kernels {
  const char* name;
  void (*rms_norm)(const RmsNorm&);
  void (*rms_norm_backward)(const RmsNormBackward&);
  void (*rope)(const Rope&);
  void (*flash_attention)(const FlashAttention&);
  void (*flash_attention_backward)(const FlashAttentionBackward&);
  void (*lora_merge)(const LoraMerge&);
  void (*linear)(const Linear&);
};

const Kernels& kernels();

}  // namespace pyalpaca::cpu
