// What the CPU kernels take, and the table of them that fits this processor. Plain C++: no torch.
//
// Every kernel file is compiled once per instruction set, in a namespace of its own; `kernels()` picks by cpuid.
// All strides count elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace pyalpaca::cpu {

enum class Dtype { kFloat, kBFloat16, kHalf };

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
};

const Kernels& kernels();

}  // namespace pyalpaca::cpu
