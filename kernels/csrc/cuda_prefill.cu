// Many tokens: a grouped matrix product on tensor cores. A block multiplies rows of one expert's matrix with a block of
// its tokens; weights are decoded in registers, scaled there (the values of a dequantized matrix, rounded once), and
// never go back to shared memory. Tokens are the columns of the product.
#include "cuda_prefill.cuh"

namespace mc {

template <class S>
MC_DEVICE void fill_stage(const S& shape, unsigned char* stage, const PrefillParams& p, const Descriptor& d,
                          const int* sources, int row_tile, int column_tile) {
  for (int i = threadIdx.x; i < shape.tokens() * 16; i += kThreads) {
    const int row = i / 16, chunk = i % 16, column = column_tile * kColumns + 8 * chunk, source = sources[row];
    const bool valid = source >= 0 && column < p.pitch;
    const unsigned short* from = static_cast<const unsigned short*>(p.rows);
    if (valid) from += static_cast<long long>(source) * p.pitch + column;
    copy_async(stage + chunk_offset(row, chunk), from, valid);
  }
  copy_tiles(shape, stage + shape.tokens() * kRowBytes, p.matrix, d, row_tile, column_tile);
}

// One block of 32 columns. kBlock: 0 or 1, its place in half `half` of the tiles.
template <class T, int kBits, int kGroups, int kBlock>
MC_DEVICE void prefill_block(const unsigned (&words)[kPair][kBits], Grid (&grids)[kPair], const unsigned char* tiles,
                             const unsigned char* tokens, const McMatrix& m, const Descriptor& d, int half, int lane,
                             float (&acc)[kPair][kGroups][4]) {
  unsigned a[kPair][8];
  const int block = 2 * half + kBlock;
#pragma unroll
  for (int r = 0; r < kPair; ++r)
    decode_block<T, kBits, kBlock>(words[r], grids[r], tiles + r * m.max_stride, d, half, lane, a[r]);
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
MC_DEVICE void prefill_loop(const Shape<kGroups>& shape, unsigned char* stages, const PrefillParams& p,
                            const Descriptor& d, const int* sources, int row_tile, float (&acc)[kPair][kGroups][4]) {
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

// blockIdx: (rows of the matrix, block of tokens); rows first, so that neighbours share their tokens.
template <class T, int kGroups>
MC_KERNEL(kThreads, 1) prefill(PrefillParams p) {
  MC_SHARED(shared);
  const Shape<kGroups> shape{p.across};
  run_block<T>(shape, p, shared, [&](auto width, unsigned char* stages, const Descriptor& d, const int* sources,
                                     int row_tile, auto& acc) {
    prefill_loop<T, decltype(width)::value, kGroups>(shape, stages, p, d, sources, row_tile, acc);
  });
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

int sum_partials(const McMoe& moe) {
  const SumParams p{moe.partial, moe.ids, moe.out, moe.tokens, moe.slots, moe.down.rows, moe.down.experts};
  const Launch l{(p.rows + 255) / 256, moe.tokens, 1, 256, 0, false};
  return moe.dtype == MC_BF16 ? launch(sum_slots<Bf16>, l, moe.stream, p) : launch(sum_slots<Fp16>, l, moe.stream, p);
}

template <class T, int kGroups>
static int run_shape(PrefillParams p, int across, void* stream, int room, int blocks) {
  const Shape<kGroups> shape{across};
  const int bytes = fit_stages(shape, p, shape.fixed_bytes(), room, 2);
  const Launch l{(p.matrix.row_tiles + shape.tiles() - 1) / shape.tiles(), blocks, 1, kThreads, bytes, false};
  return launch(prefill<T, kGroups>, l, stream, p);
}

// block: tokens of a block, 16, 64 or 128.
template <class T>
static int run_prefill(const PrefillParams& p, void* stream, int room, int block, int blocks) {
  if (block == 16) return run_shape<T, 2>(p, 1, stream, room, blocks);
  if (block == 64 || block == 128) return run_shape<T, 8>(p, block / 64, stream, room, blocks);
  return -1;
}

template <class T>
static int run_moe(const McMoe& moe, int room) {
  const Sorted s(moe);
  int error = sort_slots(moe);
  if (error) return error;
  error = run_prefill<T>(up_product(moe, s), moe.stream, room, moe.block, s.max_blocks);
  if (!error) error = run_prefill<T>(down_product(moe, s), moe.stream, room, moe.block, s.max_blocks);
  return error ? error : sum_partials(moe);
}

template <class T>
static int run_linear(const McLinear& l, int room) {
  return run_prefill<T>(linear_product(l), l.stream, room, l.block, (l.tokens + l.block - 1) / l.block);
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
