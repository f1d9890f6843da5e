// Attention over the sub-bands of the Haar transform: arguments of the kernels, and the maths.
//
// Let T be the orthonormal Haar pyramid of a block of R x R pixels (R = 2^level), all channels
// alike, and diag(w) the matrix that multiplies each coefficient by the gain of its band. The
// operator (Q = T q, K = T k, V = T v for a block) is
//   S_ij = scale sum_b w_b <Q_b[i], K_b[j]> = scale <diag(w) T q_i, T k_j> = <q'_i, k_j>
//   with q'_i = scale M_w q_i, M_w = T^t diag(w) T,
//   out_i = T^t diag(g) sum_j A_ij T v_j = sum_j A_ij v'_j with v'_j = M_g v_j,
// since A mixes blocks and leaves the inside of one alone. So once q and v are folded, a block at a
// time, this is attention over (H/R)(W/R) tokens that are raw blocks of D = R R d numbers, and
// neither k nor the output is transformed at all.
//
// The softmax is taken to the base 2: log2(e) is part of the factor of q', and `lse` holds
// log2 sum_j 2^S_ij.
//
// Backward. With P = A recomputed from lse and delta_i = <dout_i, out_i>, attention over q', k, v':
//   dP_ij = <dout_i, v'_j>,  dS_ij = P_ij (dP_ij - delta_i),
//   dq'_i = sum_j dS_ij k_j,  dk_j = sum_i dS_ij q'_i,  dv'_j = sum_i P_ij dout_i.
// M is symmetric, so dq = scale M_w dq' and dv = M_g dv'. Both gains enter as <x, M_w y> =
// sum_b w_b <(T x)_b, (T y)_b>, hence
//   dw_b = scale sum_i <(T q_i)_b, (T dq'_i)_b>,  dg_b = sum_j <(T v_j)_b, (T dv'_j)_b>,
// and the mixed values before the gains are never needed.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace diffad {

// A tensor (N, heads, H, W, d) of the dtype of the call; strides in elements.
struct AttentionTensor {
  void* data;
  int64_t n, head, y, x, c;
};

constexpr int kAttentionMaxBands = 7;
// Rows of a matrix are processed in groups that divide this; buffers hold a multiple of it.
constexpr int64_t kAttentionRows = 8;
// Queries of a work item, and the unit that keys are split in: a multiple of the columns of the
// matrix kernels of every instruction set.
constexpr int64_t kAttentionQueries = 96;
constexpr int64_t kAttentionKeys = 48;

struct AttentionArgs {
  DType dtype;
  int level;
  int64_t heads, rows, cols, channels;  // rows and cols of blocks
  double scale;
  AttentionTensor q, k, v, out;
  // (heads, 1 + 3 level) or null, and (N, heads, tokens), of the type that is computed in.
  const void *logit_gain, *value_gain;
  void* lse;

  int64_t tokens() const { return rows * cols; }
  int64_t bands() const { return 1 + 3 * level; }
  int64_t items() const { return (tokens() + kAttentionQueries - 1) / kAttentionQueries; }
  int64_t block_size() const { return channels << 2 * level; }
  // From one token to the next in the kernels' own matrices: an odd number of cache lines, so that
  // a column of the matrix spreads over all sets of the cache.
  int64_t row_stride() const {
    const int64_t line = dtype == DType::kDouble ? 8 : 16;
    return ((block_size() + line - 1) / line | 1) * line;
  }
};

// `out` and `lse` are read. The keys of a head go in `chunks` chunks of `chunk_keys` (a multiple of
// kAttentionKeys), each with a part of dq' of its own.
struct AttentionBackwardArgs {
  AttentionArgs forward;
  AttentionTensor dout, dq, dk, dv;
  int64_t chunks, chunk_keys;
  void* dq_parts;          // (N, heads, chunks, dq_rows, row_stride)
  void* logit_gain_parts;  // (N, heads, items, bands), or null without a logit_gain
  void* value_gain_parts;  // (N, heads, chunks, bands), or null without a value_gain

  int64_t dq_rows() const {
    return (forward.tokens() + kAttentionRows - 1) / kAttentionRows * kAttentionRows;
  }
};

// Items: the groups of kAttentionQueries queries of all heads, (N, heads, items of a head).
DIFFAD_KERNEL(wavelet_attention, const AttentionArgs&, int64_t begin, int64_t end)
// Items: (N, heads, chunks). Writes dk, dv, the parts of dq' and of the gradient of value_gain.
DIFFAD_KERNEL(wavelet_attention_backward_keys, const AttentionBackwardArgs&, int64_t begin,
              int64_t end)
// Items as in the forward pass. Adds the parts of dq' up and writes dq.
DIFFAD_KERNEL(wavelet_attention_backward_queries, const AttentionBackwardArgs&, int64_t begin,
              int64_t end)

}  // namespace diffad
