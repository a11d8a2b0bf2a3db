// Many tokens: a grouped matrix product on tensor cores. A block multiplies rows of one expert's matrix with a block of
// its tokens; weights are decoded in registers, scaled there (the values of a dequantized matrix, rounded once), and
// never go back to shared memory. Tokens are the columns of the product.
#include "cuda_activation.cuh"
#include "cuda_dequant.cuh"
#include "cuda_sort.cuh"

namespace mc {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kPair = 2;  // a warp has two row tiles: gate and up

enum Output : int { kActivation = 0, kWeighted = 1, kLinear = 2 };

struct PrefillParams {
  McMatrix matrix;
  McActivation activation;
  const void* rows;      // inputs [., columns]
  const void* weights;   // float32 [slots], or null
  void* out;             // [., out_columns], a row per slot (or per token of a Linear)
  const int* order;      // null: tokens of a Linear in order
  const int* block_expert;
  const int* blocks;
  int count, per_row;    // slots (or tokens); slots that share an input row
  int out_columns, output, stages, across;
};

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

template <class S>
MC_DEVICE void fill_stage(const S& shape, unsigned char* stage, const PrefillParams& p, const Descriptor& d, const int* sources,
                          int row_tile, int column_tile) {
  const McMatrix& m = p.matrix;
  for (int i = threadIdx.x; i < shape.tokens() * 16; i += kThreads) {
    const int row = i / 16, chunk = i % 16, column = column_tile * kColumns + 8 * chunk, source = sources[row];
    const bool valid = source >= 0 && column < m.columns;
    const unsigned short* from = static_cast<const unsigned short*>(p.rows);
    if (valid) from += static_cast<long long>(source) * m.columns + column;
    copy_async(stage + chunk_offset(row, chunk), from, valid);
  }
  unsigned char* tiles = stage + shape.tokens() * kRowBytes;
  const unsigned char* blob = static_cast<const unsigned char*>(m.blob) + 16ll * d.offset;
  const int chunks = d.stride / 16;
  for (int i = threadIdx.x; i < shape.tiles() * chunks; i += kThreads) {
    const int tile = i / chunks, at = i % chunks * 16;
    if (row_tile + tile >= m.row_tiles) break;
    const long long index = static_cast<long long>(row_tile + tile) * m.column_tiles + column_tile;
    copy_async(tiles + tile * m.max_stride + at, blob + index * d.stride + at);
  }
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

// One block of 32 columns. kBlock: 0 or 1, its place in half `half` of the tiles.
template <class T, int kBits, int kGroups, int kBlock>
MC_DEVICE void prefill_block(const unsigned (&words)[kPair][kBits], Grid (&grids)[kPair], const unsigned char* tiles,
                             const unsigned char* tokens, const McMatrix& m, const Descriptor& d, int half, int lane,
                             float (&acc)[kPair][kGroups][4]) {
  unsigned a[kPair][8];
  const int block = 2 * half + kBlock;
#pragma unroll
  for (int r = 0; r < kPair; ++r) {
    if ((block & (kBlocks / d.groups - 1)) == 0)
      grids[r] = load_grid<T>(tiles + r * m.max_stride, d, lane, block * d.groups / kBlocks);
    fragments<T, kBits, kBlock>(words[r], a[r]);
    apply_grid<T>(a[r], grids[r], d);
  }
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const Word4 x = load_shared(tokens + chunk_offset(n * kTokens + lane / 4, 4 * block + lane % 4));
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      T::mma(acc[r][n], a[r], x.x, x.y);
      T::mma(acc[r][n], a[r] + 4, x.z, x.w);
    }
  }
}

template <class T, int kBits, int kGroups>
MC_DEVICE void prefill_loop(const Shape<kGroups>& shape, unsigned char* stages, const PrefillParams& p, const Descriptor& d, const int* sources,
                            int row_tile, float (&acc)[kPair][kGroups][4]) {
  const McMatrix& m = p.matrix;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, stage_bytes = shape.stage_bytes(m.max_stride);
  const int pair = warp / shape.across * kPair, side = warp % shape.across;
  const bool works = row_tile + pair < m.row_tiles;
  for (int i = 0; i < p.stages - 1; ++i) {
    if (i < m.column_tiles) fill_stage(shape, stages + i * stage_bytes, p, d, sources, row_tile, i);
    copy_commit();
  }
  int used = 0, free = p.stages - 1;
  for (int tile = 0; tile < m.column_tiles; ++tile) {
    if (p.stages == 4) {
      copy_wait<2>();
    } else if (p.stages == 3) {
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    block_sync();
    if (tile + p.stages - 1 < m.column_tiles)
      fill_stage(shape, stages + free * stage_bytes, p, d, sources, row_tile, tile + p.stages - 1);
    copy_commit();
    if (works) {
      const unsigned char* tokens = stages + used * stage_bytes + side * kGroups * kTokens * kRowBytes;
      const unsigned char* tiles = stages + used * stage_bytes + shape.tokens() * kRowBytes + pair * m.max_stride;
      Grid grids[kPair];
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        unsigned words[kPair][kBits];
#pragma unroll
        for (int r = 0; r < kPair; ++r) load_words<kBits>(tiles + r * m.max_stride, lane, half, words[r]);
        prefill_block<T, kBits, kGroups, 0>(words, grids, tiles, tokens, m, d, half, lane, acc);
        prefill_block<T, kBits, kGroups, 1>(words, grids, tiles, tokens, m, d, half, lane, acc);
      }
    }
    used = used + 1 == p.stages ? 0 : used + 1;
    free = free + 1 == p.stages ? 0 : free + 1;
  }
  copy_wait<0>();
  block_sync();
}

// Sums to shared memory [token, row of the block], then through bias, activation or weight to rows of `out`.
template <class T, int kGroups>
MC_DEVICE void write_results(const Shape<kGroups>& shape, float* sums, const PrefillParams& p, const Descriptor& d, int expert, const int* targets,
                             int row_tile, const float (&acc)[kPair][kGroups][4]) {
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
    const int token = i / width, column = i % width, target = targets[token], channel = first + column;
    if (target < 0 || channel >= p.out_columns) continue;
    const float* at = sums + token * pitch + (a.gated ? column / kRows * 2 * kRows + column % kRows : column);
    float value = at[0] + bias_of(p.matrix, a, expert, channel, 0);
    if (p.output == kActivation)
      value = activate(a, value, a.gated ? at[kRows] + bias_of(p.matrix, a, expert, channel, 1) : 0.0f);
    if (p.output == kWeighted) value *= static_cast<const float*>(p.weights)[target];
    store_value<T>(p.out, static_cast<long long>(target) * p.out_columns + channel, value);
  }
}

// blockIdx: (rows of the matrix, block of tokens); rows first, so that neighbours share their tokens.
template <class T, int kGroups>
MC_KERNEL(kThreads, 1) prefill(PrefillParams p) {
  const Shape<kGroups> shape{p.across};
  MC_SHARED(shared);
  if (p.blocks && static_cast<int>(blockIdx.y) >= *p.blocks) return;
  int* sources = reinterpret_cast<int*>(shared);
  int* targets = sources + shape.tokens();
  unsigned char* stages = shared + shape.fixed_bytes();
  for (int i = threadIdx.x; i < shape.tokens(); i += kThreads) {
    const int at = blockIdx.y * shape.tokens() + i, slot = p.order ? p.order[at] : at;
    targets[i] = slot < p.count ? slot : -1;
    sources[i] = slot < p.count ? slot / p.per_row : -1;
  }
  block_sync();
  const int expert = p.block_expert ? p.block_expert[blockIdx.y] : 0, row_tile = blockIdx.x * shape.tiles();
  const Descriptor d = static_cast<const Descriptor*>(p.matrix.table)[expert * p.matrix.matrices + p.matrix.which];
  float acc[kPair][kGroups][4] = {};
  for_width(d.bits, [&](auto width) {
    prefill_loop<T, decltype(width)::value, kGroups>(shape, stages, p, d, sources, row_tile, acc);
  });
  write_results<T, kGroups>(shape, reinterpret_cast<float*>(stages), p, d, expert, targets, row_tile, acc);
}

struct SumParams {
  const void* partial;  // [tokens * slots, rows]
  const void* ids;
  void* out;
  int tokens, slots, rows, experts;
};

template <class T>
MC_KERNEL(256, 1) sum_slots(SumParams p) {  // in the order of the slots; skipped ones were never written
  const int row = blockIdx.x * 256 + threadIdx.x, token = blockIdx.y;
  if (row >= p.rows) return;
  float sum = 0.0f;
  for (int i = 0; i < p.slots; ++i) {
    const long long at = static_cast<long long>(token) * p.slots + i, id = static_cast<const long long*>(p.ids)[at];
    if (id >= 0 && id < p.experts) sum += T::to_float(static_cast<const unsigned short*>(p.partial)[at * p.rows + row]);
  }
  store_value<T>(p.out, static_cast<long long>(token) * p.rows + row, sum);
}

template <class T, int kGroups>
int run_shape(PrefillParams p, int across, void* stream, int room, int blocks) {
  const Shape<kGroups> shape{across};
  const int stage = shape.stage_bytes(p.matrix.max_stride), fixed = shape.fixed_bytes(), sums = shape.sum_bytes();
  p.across = across;
  p.stages = 4;
  while (p.stages > 2 && fixed + p.stages * stage > room) --p.stages;
  const int ring = p.stages * stage;
  const Launch l{(p.matrix.row_tiles + shape.tiles() - 1) / shape.tiles(), blocks, 1, kThreads,
                 fixed + (ring > sums ? ring : sums), false};
  return launch(prefill<T, kGroups>, l, stream, p);
}

// block: tokens of a block, 16, 64 or 128.
template <class T>
int run_prefill(const PrefillParams& p, void* stream, int room, int block, int blocks) {
  if (block == 16) return run_shape<T, 2>(p, 1, stream, room, blocks);
  if (block == 64 || block == 128) return run_shape<T, 8>(p, block / 64, stream, room, blocks);
  return -1;
}

template <class T>
int run_moe(const McMoe& moe, int room) {
  const Sorted s(moe);
  int error = sort_slots(moe);
  if (error) return error;
  PrefillParams up{moe.up, moe.activation, moe.hidden, nullptr, moe.middle, s.order, s.block_expert, s.blocks,
                   s.slots, moe.slots, moe.down.columns, kActivation, 0, 0};
  error = run_prefill<T>(up, moe.stream, room, moe.block, s.max_blocks);
  if (error) return error;
  PrefillParams down{moe.down, moe.activation, moe.middle, moe.weights, moe.partial, s.order, s.block_expert, s.blocks,
                     s.slots, 1, moe.down.rows, kWeighted, 0, 0};
  error = run_prefill<T>(down, moe.stream, room, moe.block, s.max_blocks);
  if (error) return error;
  const SumParams sum{moe.partial, moe.ids, moe.out, moe.tokens, moe.slots, moe.down.rows, moe.down.experts};
  return launch(sum_slots<T>, Launch{(sum.rows + 255) / 256, moe.tokens, 1, 256, 0, false}, moe.stream, sum);
}

template <class T>
int run_linear(const McLinear& l, int room) {
  PrefillParams p{l.matrix, {}, l.inputs, nullptr, l.out, nullptr, nullptr, nullptr,
                  l.tokens, 1, l.matrix.rows, kLinear, 0, 0};
  return run_prefill<T>(p, l.stream, room, l.block, (l.tokens + l.block - 1) / l.block);
}

}  // namespace mc

#define MC_API extern "C" __attribute__((visibility("default")))

MC_API int mc_cuda_prefill(const McMoe* moe, int room) {
  return moe->dtype == MC_BF16 ? mc::run_moe<mc::Bf16>(*moe, room) : mc::run_moe<mc::Fp16>(*moe, room);
}

MC_API int mc_cuda_linear_prefill(const McLinear* p, int room) {
  return p->dtype == MC_BF16 ? mc::run_linear<mc::Bf16>(*p, room) : mc::run_linear<mc::Fp16>(*p, room);
}

// Shared memory that prefill needs at least, for the largest tile stride.
MC_API int mc_cuda_prefill_room(int stride) {
  int most = 0;
  for (int across = 1; across <= 2; ++across) {
    const mc::Shape<8> shape{across};
    const int ring = 2 * shape.stage_bytes(stride), sums = shape.sum_bytes();
    const int needed = shape.fixed_bytes() + (ring > sums ? ring : sums);
    most = needed > most ? needed : most;
  }
  return most;
}
