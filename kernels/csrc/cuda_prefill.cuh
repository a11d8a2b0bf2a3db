// What the grouped products of prefill share, whatever instruction multiplies: parameters, copies of weights, a block
// of 32 columns decoded and scaled in registers, what becomes of the sums.
#pragma once

#include "cuda_activation.cuh"
#include "cuda_dequant.cuh"
#include "cuda_sort.cuh"

namespace mc {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kPair = 2;  // a warp has two row tiles: gate and up

enum Output : int { kActivation = 0, kWeighted = 1, kLinear = 2 };

struct PrefillParams {
  McMatrix matrix;
  McActivation activation;
  const void* rows;      // inputs [., pitch]
  const void* weights;   // float32 [slots], or null
  void* out;             // [., out_columns], a row per slot (or per token of a Linear)
  const int* order;      // null: tokens of a Linear in order
  const int* block_expert;
  const int* blocks;
  int count, per_row;    // slots (or tokens); slots that share an input row
  int pitch, out_columns, output;
  int channels;          // of a row of `out`; what is left of it becomes zero
  bool dealt;            // columns of `out` in the order of dealt_column()
  int stages, across;
};

inline PrefillParams up_product(const McMoe& moe, const Sorted& s) {
  PrefillParams p{moe.up, moe.activation, moe.hidden, nullptr, moe.middle, s.order, s.block_expert, s.blocks};
  p.count = s.slots, p.per_row = moe.slots, p.output = kActivation;
  p.pitch = moe.up.columns, p.out_columns = p.channels = moe.down.columns;
  return p;
}

inline PrefillParams down_product(const McMoe& moe, const Sorted& s) {
  PrefillParams p{moe.down, moe.activation, moe.middle, moe.weights, moe.partial, s.order, s.block_expert, s.blocks};
  p.count = s.slots, p.per_row = 1, p.output = kWeighted;
  p.pitch = moe.down.columns, p.out_columns = p.channels = moe.down.rows;
  return p;
}

inline PrefillParams linear_product(const McLinear& l) {
  PrefillParams p{l.matrix, {}, l.inputs, nullptr, l.out, nullptr, nullptr, nullptr};
  p.count = l.tokens, p.per_row = 1, p.output = kLinear;
  p.pitch = l.matrix.columns, p.out_columns = p.channels = l.matrix.rows;
  return p;
}

// Where a column lies in a row whose blocks of 32 are dealt to the lanes of the mma: pair p of lane q's four pairs
// (pair_column of cuda_layout.cuh) is pair 4 * p + q. A transposition of 4 x 4 pairs, so its own inverse.
MC_BOTH int dealt_column(int column) {
  const int pair = column % 32 / 2;
  return column - column % 32 + 2 * (pair % 4 * 4 + pair / 4) + column % 2;
}

// kGroups: groups of eight tokens a warp has. across: warps side by side along the tokens, 1 or 2.
template <int kGroups>
struct Shape {
  int across;
  MC_BOTH int tokens() const { return across * kGroups * kTokens; }
  MC_BOTH int tiles() const { return kWarps / across * kPair; }
  MC_BOTH int pitch() const { return tiles() * kRows + 4; }  // of a token's sums in shared memory
  MC_BOTH int stage_bytes(int stride) const { return tokens() * kRowBytes + tiles() * stride; }
  MC_BOTH int fixed_bytes() const { return 8 * tokens(); }
  MC_BOTH int sum_bytes() const { return tokens() * pitch() * 4; }
};

// Starts the copies of the block's tiles of one column tile, a warp for each tile in turn.
template <class S>
MC_DEVICE void copy_tiles(const S& shape, unsigned char* tiles, const McMatrix& m, const Descriptor& d, int row_tile,
                          int column_tile) {
  const int lane = threadIdx.x % kLanes;
  for (int tile = threadIdx.x / kLanes; tile < shape.tiles() && row_tile + tile < m.row_tiles; tile += kWarps) {
    const long long index = static_cast<long long>(row_tile + tile) * m.column_tiles + column_tile;
    const unsigned char* from = static_cast<const unsigned char*>(m.blob) + 16ll * d.offset + index * d.stride;
    for (int at = 16 * lane; at < d.stride; at += 16 * kLanes) copy_async(tiles + tile * m.max_stride + at, from + at);
  }
}

// The slots (or tokens) of this block and the rows of their inputs; -1 for padding.
template <class S>
MC_DEVICE void list_rows(const S& shape, const PrefillParams& p, int* sources, int* targets) {
  for (int i = threadIdx.x; i < shape.tokens(); i += kThreads) {
    const int at = blockIdx.y * shape.tokens() + i, slot = p.order ? p.order[at] : at;
    targets[i] = slot < p.count ? slot : -1;
    sources[i] = slot < p.count ? slot / p.per_row : -1;
  }
  block_sync();
}

// Scales and offsets of a lane's two rows: value = (u - middle - offset) * scale, rounded once. As packed pairs where
// 16 bits hold the scale and u - middle - offset, as float32 where they do not.
struct Grid {
  unsigned scale[2], offset[2];
};

template <class T>
MC_DEVICE bool needs_float(const Descriptor& d) {
  return d.scale == kF32 || (T::kMantissa < 10 && d.scale == kFp16) || d.zero > kU8;
}

template <class T>
MC_DEVICE Grid load_grid(const unsigned char* tile, const Descriptor& d, int lane, int group) {
  const Pair scale = load_scale(tile, d, lane, group), offset = load_offset(tile, d, lane, group);
  const float unit = d.mul * d.boost, first = scale.first * unit, second = scale.second * unit;
  if (needs_float<T>(d))
    return {{float_to_bits(first), float_to_bits(second)}, {float_to_bits(offset.first), float_to_bits(offset.second)}};
  return {{T::pack2(first, first), T::pack2(second, second)},
          {T::pack2(-offset.first, -offset.first), T::pack2(-offset.second, -offset.second)}};
}

template <class T>
MC_DEVICE void apply_grid(unsigned (&a)[8], const Grid& g, const Descriptor& d) {
  if (needs_float<T>(d)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = bits_to_float(g.scale[i & 1]), offset = bits_to_float(g.offset[i & 1]);
      const float low = T::to_float(static_cast<unsigned short>(a[i]));
      const float high = T::to_float(static_cast<unsigned short>(a[i] >> 16));
      a[i] = T::pack2((low - offset) * scale, (high - offset) * scale);
    }
    return;
  }
  if (has_offset(d)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = T::fma2(a[i], twice(float_bits<T>(1)), g.offset[i & 1]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i] = T::fma2(a[i], g.scale[i & 1], 0);
}

// The fragments of one block of 32 columns of a tile; `grid` is loaded where a group of scales begins. kBlock: 0 or 1,
// its place in half `half` of the tile.
template <class T, int kBits, int kBlock>
MC_DEVICE void decode_block(const unsigned (&words)[kBits], Grid& grid, const unsigned char* tile, const Descriptor& d,
                            int half, int lane, unsigned (&a)[8]) {
  const int block = 2 * half + kBlock;
  if ((block & (kBlocks / d.groups - 1)) == 0) grid = load_grid<T>(tile, d, lane, block * d.groups / kBlocks);
  fragments<T, kBits, kBlock>(words, a);
  apply_grid<T>(a, grid, d);
}

// Sums to shared memory [token, row of the block], then through bias, activation or weight to rows of `out`.
template <class T, int kGroups>
MC_DEVICE void write_results(const Shape<kGroups>& shape, float* sums, const PrefillParams& p, const Descriptor& d,
                             int expert, const int* targets, int row_tile, const float (&acc)[kPair][kGroups][4]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int pitch = shape.pitch();
  const float unit = 1.0f / d.boost;
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int t = 0; t < kPair; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = (warp % shape.across * kGroups + n) * kTokens + 2 * (lane % 4) + i % 2;
        const int row = (warp / shape.across * kPair + t) * kRows + lane / 4 + 8 * (i / 2);
        sums[token * pitch + row] = acc[t][n][i] * unit;
      }
  block_sync();
  McActivation a = p.activation;
  a.gated = a.gated && p.output == kActivation;
  const int width = shape.tiles() * kRows / (a.gated ? 2 : 1), first = row_tile * kRows / (a.gated ? 2 : 1);
#pragma unroll 1
  for (int i = threadIdx.x; i < shape.tokens() * width; i += kThreads) {
    const int token = i / width, place = i % width, target = targets[token];
    const int column = p.dealt ? dealt_column(place) : place, channel = first + column;
    if (target < 0 || first + place >= p.out_columns) continue;
    const long long to = static_cast<long long>(target) * p.out_columns + first + place;
    if (channel >= p.channels) {
      store_value<T>(p.out, to, 0.0f);
      continue;
    }
    const float* at = sums + token * pitch + (a.gated ? column / kRows * 2 * kRows + column % kRows : column);
    float value = at[0] + bias_of(p.matrix, a, expert, channel, 0);
    if (p.output == kActivation)
      value = activate(a, value, a.gated ? at[kRows] + bias_of(p.matrix, a, expert, channel, 1) : 0.0f);
    if (p.output == kWeighted) value *= static_cast<const float*>(p.weights)[target];
    store_value<T>(p.out, to, value);
  }
}

// A block: what it multiplies, `loop` over the columns for the width of its expert's matrix, what becomes of the sums.
template <class T, int kGroups, class Loop>
MC_DEVICE void run_block(const Shape<kGroups>& shape, const PrefillParams& p, unsigned char* shared, const Loop& loop) {
  if (p.blocks && static_cast<int>(blockIdx.y) >= *p.blocks) return;
  int* sources = reinterpret_cast<int*>(shared);
  int* targets = sources + shape.tokens();
  unsigned char* stages = shared + shape.fixed_bytes();
  list_rows(shape, p, sources, targets);
  const int expert = p.block_expert ? p.block_expert[blockIdx.y] : 0, row_tile = blockIdx.x * shape.tiles();
  const Descriptor d = static_cast<const Descriptor*>(p.matrix.table)[expert * p.matrix.matrices + p.matrix.which];
  float acc[kPair][kGroups][4] = {};
  for_width(d.bits, [&](auto width) { loop(width, stages, d, sources, row_tile, acc); });
  write_results<T, kGroups>(shape, reinterpret_cast<float*>(stages), p, d, expert, targets, row_tile, acc);
}

// The sum over slots of `partial`, the last step of a layer. Returns a CUDA error code.
int sum_partials(const McMoe& moe);

// As many stages, 4 at most, as fit into `room` bytes; fewer than `least` where these do not fit. Returns the bytes.
template <class S>
int fit_stages(const S& shape, PrefillParams& p, int fixed, int room, int least) {
  const int stage = shape.stage_bytes(p.matrix.max_stride), sums = shape.sum_bytes();
  p.across = shape.across;
  p.stages = 4;
  while (p.stages > least && fixed + p.stages * stage > room) --p.stages;
  return fixed + (p.stages * stage > sums ? p.stages * stage : sums);
}

}  // namespace mc
