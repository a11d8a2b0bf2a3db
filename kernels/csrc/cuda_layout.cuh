// The device layout of packed weights: self-contained tiles of 16 rows x 128 columns.
//
// A tile holds the codes in the order of the A operand of mma.m16n8k16, then its scales, then its zero points, so a
// warp streams one contiguous run per row tile and no lane ever exchanges data after decoding. Columns inside each
// block of 32 are permuted (the same way for both operands) so that a lane's activations are 16 contiguous bytes.
#pragma once

#include "cuda_platform.cuh"

namespace mc {

constexpr int kRows = 16;       // rows of a tile
constexpr int kColumns = 128;   // columns of a tile: eight steps of the mma, four blocks of 32
constexpr int kBlocks = 4;      // blocks of 32 columns in a tile: the finest group that is served
constexpr int kTokens = 8;      // columns of one mma: tokens
constexpr int kLanes = 32;
constexpr int kDescriptor = 8;  // 32-bit words of a descriptor

enum Kind : int { kNone = 0, kU8 = 1, kBf16 = 2, kFp16 = 3, kF32 = 4 };

MC_BOTH int kind_bytes(int kind) { return kind == kNone ? 0 : kind == kU8 ? 1 : kind == kF32 ? 4 : 2; }

// One matrix of one expert. Value of code u: (u - z) * s * mul; z = 2^(bits-1) + centre where there is no zero point.
struct Descriptor {
  unsigned offset;  // of the first tile from the blob's start, in units of 16 bytes
  int stride;       // bytes of a tile
  unsigned char bits, scale, zero, groups;  // code width, Kind of scales and zeros, groups per tile: 1, 2 or 4
  float mul;        // 2 for binary codes, else 1
  float boost;      // a power of two that brings the largest weight near 1: keeps float16 products normal
  float centre;     // -0.5 for binary codes, else 0
  int unused[2];
};
static_assert(sizeof(Descriptor) == 4 * kDescriptor, "the table is made in Python as int32 [E, matrices, 8]");

MC_BOTH int code_bytes(int bits) { return kRows * kColumns * bits / 8; }
MC_BOTH int scale_bytes(const Descriptor& d) { return kRows * d.groups * kind_bytes(d.scale); }

// Where a code lies. A lane has 64 codes of a tile: 32 pairs, one 32-bit register of the mma each; pair i belongs to
// step i / 4 and is register a(i % 4). The two codes of a pair are 16 bits apart.
MC_BOTH int pair_row(int lane, int i) { return lane / 4 + 8 * (i & 1); }
MC_BOTH int pair_column(int lane, int i) {  // of the first of its two columns
  return 32 * (i / 8) + 8 * (lane % 4) + 4 * (i / 4 % 2) + 2 * (i / 2 % 2);
}

// Byte of word `w` of a lane: planes of 16 bytes a lane, and one of 8 where two words are left (1 and 3 bits).
MC_BOTH int word_offset(int bits, int lane, int w) {
  const int full = 2 * bits / 4;
  return w / 4 < full ? 512 * (w / 4) + 16 * lane + 4 * (w % 4) : 512 * full + 8 * lane + 4 * (w % 4);
}

struct Place {
  int word, shift;
};

// Bit `bit` of the low code of pair i. Three bits: 16 pairs in three words, five pairs a word in bits 0..14, and the
// three bits of the sixteenth pair in bit 15 of the three words.
MC_BOTH Place code_place(int bits, int i, int bit) {
  if (bits != 3) {
    const int per = 16 / bits;
    return {i / per, i % per * bits + bit};
  }
  const int set = i / 16 * 3, r = i % 16;
  if (r < 15) return {set + r / 5, r % 5 * 3 + bit};
  return {set + bit, 15};
}

// Index of (row of the tile, group of the tile) among its scales or zeros: the two rows of a lane are neighbours.
MC_BOTH int scale_index(int row, int group, int groups) { return (row % 8 * groups + group) * 2 + row / 8; }

// The quantization group that block `block` (of 32 columns) of tile `tile` belongs to.
MC_BOTH int group_of(int tile, int block, int group_size, int groups) {
  const int group = (tile * kColumns + block * 32) / group_size;
  return group < groups ? group : groups - 1;
}

// The matrix row behind row r of row tile `tile`, or -1 for padding. Gate and up tiles alternate in gated matrices.
enum Order : int { kPlain = 0, kHalves = 1, kInterleaved = 2 };
MC_BOTH int source_row(int order, int rows, int tile, int r) {
  if (order == kPlain) return tile * kRows + r < rows ? tile * kRows + r : -1;
  const int width = rows / 2, channel = tile / 2 * kRows + r;
  if (channel >= width) return -1;
  return order == kHalves ? tile % 2 * width + channel : 2 * channel + tile % 2;
}

// A token's columns of a tile in shared memory: 16 chunks of 16 bytes. Odd rows swap halves, so that eight lanes that
// read two rows meet no bank twice.
constexpr int kRowBytes = kColumns * 2;
MC_BOTH int chunk_offset(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 1) << 2) * 16; }

MC_BOTH float load_value(const void* p, int kind, long long i) {
  if (kind == kU8) return static_cast<const unsigned char*>(p)[i];
  if (kind == kF32) return static_cast<const float*>(p)[i];
  const unsigned short bits = static_cast<const unsigned short*>(p)[i];
  return kind == kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

}  // namespace mc
