// What both decode kernels share: a warp streams tiles through its own ring in shared memory and multiplies them with
// up to eight tokens. Integers are exact in 16 bits; scales are applied in float32 after each group.
#pragma once

#include "cuda_activation.cuh"
#include "cuda_dequant.cuh"

namespace mc {

// Block kBlock, 0 or 1, of half a tile: two steps of the mma for each of kTiles row tiles.
template <class T, int kBits, int kTiles, int kBlock>
MC_DEVICE void multiply_block(const unsigned (&words)[kTiles][kBits], const Word4& x, float (&acc)[kTiles][4],
                              float (&sums)[4], bool with_sums) {
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    unsigned a[8];
    fragments<T, kBits, kBlock>(words[r], a);
    T::mma(acc[r], a, x.x, x.y);
    T::mma(acc[r], a + 4, x.z, x.w);
  }
  if (with_sums) {  // every row of this product is the tokens' sum over the columns
    const unsigned one = twice(float_bits<T>(1));
    const unsigned ones[4] = {one, one, one, one};
    T::mma(sums, ones, x.x, x.y);
    T::mma(sums, ones, x.z, x.w);
  }
}

// total += weight of the column * scale of the row * (acc - offset of the row * sum of the column); clears acc, sums.
template <int kTiles>
MC_DEVICE void close_group(const unsigned char* tiles, int pitch, const Descriptor& d, int lane, int group,
                           float weight0, float weight1, float (&acc)[kTiles][4], float (&sums)[4],
                           float (&total)[kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    const Pair scale = load_scale(tiles + r * pitch, d, lane, group);
    if (has_offset(d)) {
      const Pair offset = load_offset(tiles + r * pitch, d, lane, group);
      acc[r][0] -= offset.first * sums[0];
      acc[r][1] -= offset.first * sums[1];
      acc[r][2] -= offset.second * sums[0];
      acc[r][3] -= offset.second * sums[1];
    }
    total[r][0] += weight0 * scale.first * acc[r][0];
    total[r][1] += weight1 * scale.first * acc[r][1];
    total[r][2] += weight0 * scale.second * acc[r][2];
    total[r][3] += weight1 * scale.second * acc[r][3];
    acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = 0.0f;
  }
  sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
}

// A lane's share of its token's columns of a block; zeros without a token.
MC_DEVICE Word4 load_row(const unsigned char* rows, int tokens, int block, int lane) {
  if (lane / 4 >= tokens) return Word4{0, 0, 0, 0};
  return load_shared(rows + chunk_offset(lane / 4, 4 * block + lane % 4));
}

// tiles: kTiles staged tiles, `pitch` bytes apart, and behind them the rows of `tokens` tokens.
template <class T, int kBits, int kTiles>
MC_DEVICE void multiply_tile(const unsigned char* tiles, int pitch, const Descriptor& d, int tokens, int lane,
                             float weight0, float weight1, float (&total)[kTiles][4]) {
  const unsigned char* rows = tiles + kTiles * pitch;
  float acc[kTiles][4] = {}, sums[4] = {};
  const bool with_sums = has_offset(d);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned words[kTiles][kBits];
#pragma unroll
    for (int r = 0; r < kTiles; ++r) load_words<kBits>(tiles + r * pitch, lane, half, words[r]);
    multiply_block<T, kBits, kTiles, 0>(words, load_row(rows, tokens, 2 * half, lane), acc, sums, with_sums);
    if (d.groups == 4) close_group(tiles, pitch, d, lane, 2 * half, weight0, weight1, acc, sums, total);
    multiply_block<T, kBits, kTiles, 1>(words, load_row(rows, tokens, 2 * half + 1, lane), acc, sums, with_sums);
    if (half == 1 || d.groups > 1)
      close_group(tiles, pitch, d, lane, (half + 1) * d.groups / 2 - 1, weight0, weight1, acc, sums, total);
  }
}

template <class T, int kTiles>
MC_DEVICE void multiply_any(const unsigned char* tiles, int pitch, const Descriptor& d, int tokens, int lane,
                            float weight0, float weight1, float (&total)[kTiles][4]) {
  weight0 *= d.mul;
  weight1 *= d.mul;
  for_width(d.bits, [&](auto width) {
    multiply_tile<T, decltype(width)::value, kTiles>(tiles, pitch, d, tokens, lane, weight0, weight1, total);
  });
}

// Start copying kTiles tiles, the same column of neighbouring row tiles, into a slot of the ring.
template <int kTiles>
MC_DEVICE void stage_tiles(unsigned char* to, int pitch, const McMatrix& m, const Descriptor& d, int row_tile,
                           int column_tile, int lane) {
  const unsigned long long policy = evict_first();
  const unsigned char* blob = static_cast<const unsigned char*>(m.blob) + 16ll * d.offset;
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    const long long tile = static_cast<long long>(row_tile + r) * m.column_tiles + column_tile;
    const unsigned char* from = blob + tile * d.stride;
    for (int at = 16 * lane; at < d.stride; at += 16 * kLanes) stream_async(to + r * pitch + at, from + at, policy);
  }
}

// Start copying the tokens' columns of a tile behind the tiles of a slot. row_of: token to row of the inputs, -1: zeros.
template <class RowOf>
MC_DEVICE void stage_rows(unsigned char* to, const void* inputs, int columns, int column_tile, int tokens, int lane,
                          RowOf row_of) {
  const unsigned short* from = static_cast<const unsigned short*>(inputs);
  for (int i = lane; i < tokens * 16; i += kLanes) {
    const int token = i / 16, chunk = i % 16, column = column_tile * kColumns + 8 * chunk;
    const long long row = row_of(token);
    const bool valid = row >= 0 && column < columns;
    copy_async(to + chunk_offset(token, chunk), valid ? from + row * columns + column : from, valid);
  }
}

// Sum of the warps' accumulators for (row, token) of row tile r; every thread of the block has written its own.
template <int kWarps, int kTiles>
MC_DEVICE float reduced(const float* parts, int r, int row, int token) {
  const int lane = row % 8 * 4 + token / 2, at = row / 8 * 2 + token % 2;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[((warp * kTiles + r) * 4 + at) * kLanes + lane];
  return sum;
}

template <int kTiles>
MC_DEVICE void write_parts(float* parts, int warp, int lane, const float (&total)[kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kTiles; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[((warp * kTiles + r) * 4 + i) * kLanes + lane] = total[r][i];
}

MC_BOTH int smaller(int a, int b) { return a < b ? a : b; }

// All but the newest stages - 1 groups of copies have landed: the oldest slot of the ring can be read.
MC_DEVICE void wait_for_stage(int stages) {
  if (stages == 4) {
    copy_wait<3>();
  } else if (stages == 3) {
    copy_wait<2>();
  } else {
    copy_wait<1>();
  }
}

}  // namespace mc
