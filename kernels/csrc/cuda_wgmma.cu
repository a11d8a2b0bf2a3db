// Many tokens of an expert on compute capability 9.0: products of cuda_prefill.cu by warp groups. A block multiplies 256
// rows with 64 or 128 tokens. A warp decodes its tiles in registers as there, and their fragments are one operand
// of wgmma as they are; tokens are the other, in shared memory, 128 bytes of each one swizzled (PTX ISA, 9.7.15.5.1.2).
// While a product of 32 columns runs, the next one's weights are decoded.
//
// The order of columns in a block of 32 is that of the tiles, which takes four bytes from each of four runs of 16. So
// inputs are dealt once (dealt_column), a pass over tokens x columns, and the first product writes the second's inputs
// dealt. All threads copy them, 16 bytes at a time, since rows are gathered, which a tensor map cannot do.
#include "cuda_prefill.cuh"
#ifdef MC_SHIM
#include "cuda_wgmma_shim.cuh"
#else
#include "cuda_wgmma_ptx.cuh"
#endif

namespace mc {

constexpr int kPattern = 1024;          // bytes after which the swizzle repeats: eight tokens of kSpan bytes
constexpr int kSpan = 128;              // bytes of a token that are swizzled together: half a tile's columns
constexpr int kLeast = 3;               // stages: one in use, one whose last product may still run, one being filled
constexpr int kGroupTiles = 4 * kPair;  // row tiles of a warp group

MC_BOTH int dealt_pitch(int columns) { return (columns + 31) / 32 * 32; }

// Where chunk 0..15 of a token's columns of a tile lies: halves of a tile one after the other, in each one the tokens.
MC_BOTH int swizzled_offset(int tokens, int row, int chunk) {
  return (chunk / 8 * tokens + row) * kSpan + (chunk % 8 ^ row % 8) * 16;
}

// The matrix descriptor of tokens at `at` (9.7.15.5.1.2.2), in units of 16 bytes: start address, a leading offset (not
// used by swizzled K-major layouts), the stride from eight tokens to the next; no base offset, a swizzle of 128 bytes.
MC_DEVICE unsigned long long token_descriptor(const unsigned char* at) {
  const unsigned long long start = (shared_address(at) & 0x3ffff) >> 4;
  return start | 1ull << 16 | static_cast<unsigned long long>(kPattern >> 4) << 32 | 1ull << 62;
}

// Where stages are: the tokens of all of them, at a multiple of the swizzle's pattern, then the tiles.
struct Ring {
  unsigned char *tokens, *tiles;
  int token_bytes, tile_bytes;
};

template <class S>
MC_DEVICE Ring make_ring(const S& shape, const PrefillParams& p, unsigned char* stages) {
  unsigned char* start = stages + (0u - shared_address(stages)) % kPattern;
  const int tokens = shape.tokens() * kRowBytes;
  return {start, start + p.stages * tokens, tokens, shape.tiles() * p.matrix.max_stride};
}

template <class S>
MC_DEVICE void fill_stage(const S& shape, const Ring& ring, int stage, const PrefillParams& p, const Descriptor& d,
                          const int* sources, int row_tile, int column_tile) {
  constexpr int step = kThreads / 16;  // rows that are copied at once
  static_assert(step % 8 == 0, "a thread's chunks are swizzled alike");
  const int first = threadIdx.x / 16, chunk = threadIdx.x % 16, column = column_tile * kColumns + 8 * chunk;
  const bool inside = column < p.pitch;
  const unsigned char* from = static_cast<const unsigned char*>(p.rows) + (inside ? 2 * column : 0);
  unsigned char* to = ring.tokens + stage * ring.token_bytes + swizzled_offset(shape.tokens(), first, chunk);
#pragma unroll 4
  for (int i = 0; i < shape.tokens() / step; ++i) {
    const int source = sources[first + i * step], row = source < 0 ? 0 : source;
    copy_async(to + i * step * kSpan, from + static_cast<long long>(row) * (2 * p.pitch), inside && source >= 0);
  }
  copy_tiles(shape, ring.tiles + stage * ring.tile_bytes, p.matrix, d, row_tile, column_tile);
}

// A block of 32 columns of both row tiles. Each one's two products are a group, and one group runs while the next is
// decoded, so the fragments `a` of a row tile are free when its next block comes.
template <class T, int kBits, int kGroups, int kBlock>
MC_DEVICE void multiply_block(const unsigned (&words)[kPair][kBits], Grid (&grids)[kPair], const unsigned char* tiles,
                              unsigned long long tokens, const McMatrix& m, const Descriptor& d, int half, int lane,
                              unsigned (&a)[kPair][8], float (&acc)[kPair][kGroups][4]) {
#pragma unroll
  for (int r = 0; r < kPair; ++r) {
    decode_block<T, kBits, kBlock>(words[r], grids[r], tiles + r * m.max_stride, d, half, lane, a[r]);
    wgmma_fence();
    wgmma(T{}, acc[r], a[r], tokens + 4 * kBlock);
    wgmma(T{}, acc[r], a[r] + 4, tokens + 4 * kBlock + 2);
    wgmma_commit();
    wgmma_wait<1>();
  }
}

template <class T, int kBits, int kGroups>
MC_DEVICE void multiply_loop(const Shape<kGroups>& shape, unsigned char* stages, const PrefillParams& p,
                             const Descriptor& d, const int* sources, int row_tile, float (&acc)[kPair][kGroups][4]) {
  const McMatrix& m = p.matrix;
  const Ring ring = make_ring(shape, p, stages);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, ahead = p.stages - 2;
  const bool works = row_tile + warp / 4 * kGroupTiles < m.row_tiles;  // the same for all warps of a group
  for (int i = 0; i < ahead; ++i) {
    if (i < m.column_tiles) fill_stage(shape, ring, i, p, d, sources, row_tile, i);
    copy_commit();
  }
  unsigned a[kPair][8];
  int used = 0, free = ahead;
  for (int tile = 0; tile < m.column_tiles; ++tile) {
    if (p.stages == 4) {
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    async_proxy_fence();
    block_sync();  // here every product but each group's last is complete: the stage before `used` is not free yet
    const unsigned char* tiles = ring.tiles + used * ring.tile_bytes + warp * kPair * m.max_stride;
    const unsigned long long tokens = token_descriptor(ring.tokens + used * ring.token_bytes);
    Grid grids[kPair];
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (works) {
        unsigned words[kPair][kBits];
#pragma unroll
        for (int r = 0; r < kPair; ++r) load_words<kBits>(tiles + r * m.max_stride, lane, half, words[r]);
        const unsigned long long part = tokens + half * (shape.tokens() * kSpan >> 4);
        multiply_block<T, kBits, kGroups, 0>(words, grids, tiles, part, m, d, half, lane, a, acc);
        multiply_block<T, kBits, kGroups, 1>(words, grids, tiles, part, m, d, half, lane, a, acc);
      }
      if (half) continue;
      if (tile + ahead < m.column_tiles)  // while products run, not while they wait for these copies to be issued
        fill_stage(shape, ring, free, p, d, sources, row_tile, tile + ahead);
      copy_commit();
    }
    used = used + 1 == p.stages ? 0 : used + 1;
    free = free + 1 == p.stages ? 0 : free + 1;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kPair * kGroups * 4; ++i) wgmma_result(acc[i / 4 / kGroups][i / 4 % kGroups][i % 4]);
  copy_wait<0>();
  block_sync();
}

// blockIdx: (rows of the matrix, block of tokens); rows first, so that neighbours share their tokens.
template <class T, int kGroups>
MC_KERNEL(kThreads, 1) group_prefill(PrefillParams p) {
  MC_SHARED(shared);
  constexpr Shape<kGroups> shape{1};
  run_block<T>(shape, p, shared, [&](auto width, unsigned char* stages, const Descriptor& d, const int* sources,
                                     int row_tile, auto& acc) {
    multiply_loop<T, decltype(width)::value, kGroups>(shape, stages, p, d, sources, row_tile, acc);
  });
}

struct DealParams {
  const void* from;  // [rows, columns]
  void* to;          // [rows, dealt_pitch(columns)]
  int rows, columns;
};

MC_KERNEL(256, 1) deal_rows(DealParams p) {  // a thread writes 16 bytes
  const int chunks = dealt_pitch(p.columns) / 8;
  const long long i = blockIdx.x * 256ll + threadIdx.x, row = i / chunks;
  if (row >= p.rows) return;
  const unsigned* pairs = static_cast<const unsigned*>(p.from) + row * (p.columns / 2);
  unsigned words[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int column = dealt_column(static_cast<int>(i % chunks) * 8 + 2 * q);
    words[q] = column < p.columns ? pairs[column / 2] : 0;
  }
  static_cast<Word4*>(p.to)[i] = {words[0], words[1], words[2], words[3]};
}

static int run_deal(const DealParams& p, void* stream) {
  const long long threads = static_cast<long long>(p.rows) * (dealt_pitch(p.columns) / 8);
  return launch(deal_rows, Launch{static_cast<int>((threads + 255) / 256), 1, 1, 256, 0, false}, stream, p);
}

template <class T, int kGroups>
static int run_shape(PrefillParams p, void* stream, int room, int blocks) {
  const Shape<kGroups> shape{1};
  const int bytes = fit_stages(shape, p, shape.fixed_bytes() + kPattern, room, kLeast);
  if (bytes > room) return -1;
  const Launch l{(p.matrix.row_tiles + shape.tiles() - 1) / shape.tiles(), blocks, 1, kThreads, bytes, false};
  return launch(group_prefill<T, kGroups>, l, stream, p);
}

// block: tokens of a block, 64 or 128.
template <class T>
static int run_product(const PrefillParams& p, void* stream, int room, int block, int blocks) {
  if (block == 64) return run_shape<T, 8>(p, stream, room, blocks);
  if (block == 128) return run_shape<T, 16>(p, stream, room, blocks);
  return -1;
}

template <class T>
static int run_moe(const McMoe& moe, int room) {
  const Sorted s(moe);
  PrefillParams up = up_product(moe, s), down = down_product(moe, s);
  up.rows = moe.partial, up.pitch = dealt_pitch(moe.up.columns), up.dealt = true;
  up.out_columns = down.pitch = dealt_pitch(moe.down.columns);
  int error = sort_slots(moe);
  if (!error) error = run_deal({moe.hidden, moe.partial, moe.tokens, moe.up.columns}, moe.stream);
  if (!error) error = run_product<T>(up, moe.stream, room, moe.block, s.max_blocks);
  if (!error) error = run_product<T>(down, moe.stream, room, moe.block, s.max_blocks);
  return error ? error : sum_partials(moe);
}

template <class T>
static int run_linear(const McLinear& l, int room) {
  PrefillParams p = linear_product(l);
  p.rows = l.dealt, p.pitch = dealt_pitch(l.matrix.columns);
  const int error = run_deal({l.inputs, l.dealt, l.tokens, l.matrix.columns}, l.stream);
  return error ? error : run_product<T>(p, l.stream, room, l.block, (l.tokens + l.block - 1) / l.block);
}

}  // namespace mc

#define MC_API extern "C" __attribute__((visibility("default")))

// As mc_cuda_prefill, in blocks of 64 or 128 tokens. middle: [T * K, columns of down in whole blocks of 32]; partial:
// room for [T, columns of up in whole blocks of 32] as well.
MC_API int mc_cuda_wgmma(const McMoe* moe, int room) {
  return moe->dtype == MC_BF16 ? mc::run_moe<mc::Bf16>(*moe, room) : mc::run_moe<mc::Fp16>(*moe, room);
}

MC_API int mc_cuda_linear_wgmma(const McLinear* p, int room) {
  return p->dtype == MC_BF16 ? mc::run_linear<mc::Bf16>(*p, room) : mc::run_linear<mc::Fp16>(*p, room);
}

#ifdef MC_SHIM
MC_API long long mc_shim_products() { return mc::shim::count(); }
#endif
