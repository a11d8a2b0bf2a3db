// Native records to the runtime layout and back (mc_cpu.h says what it looks like).
#include <cstring>

#include "mc_cpu.h"
#include "numbers.h"

namespace {

// 32 codes of b bits from a little-endian stream that starts at a byte.
template <int B>
inline void take(const uint8_t* stream, uint8_t* codes) {
  uint64_t words[(32 * B + 63) / 64] = {};
  std::memcpy(words, stream, 4 * B);
  for (int i = 0; i < 32; ++i) {
    int bit = i * B;
    uint64_t value = words[bit / 64] >> (bit % 64);
    if (bit % 64 + B > 64) value |= words[bit / 64 + 1] << (64 - bit % 64);
    codes[i] = uint8_t(value & ((1u << B) - 1));
  }
}

template <int B>
inline void give(const uint8_t* codes, uint8_t* stream) {
  uint64_t words[(32 * B + 63) / 64] = {};
  for (int i = 0; i < 32; ++i) {
    int bit = i * B;
    words[bit / 64] |= uint64_t(codes[i]) << (bit % 64);
    if (bit % 64 + B > 64) words[bit / 64 + 1] |= uint64_t(codes[i]) >> (64 - bit % 64);
  }
  std::memcpy(stream, words, 4 * B);
}

// Where column c of a tile is: line and lowest bit inside the lane. Three bits: columns 30 and 31 are spread.
template <int B>
constexpr int line_of(int c) {
  return B == 3 ? c / 10 : c * B / 32;
}
template <int B>
constexpr int shift_of(int c) {
  return 16 * (c & 1) + B * (c % (B == 3 ? 10 : 32 / B) / 2);
}

template <int B>
inline void to_lanes(const uint8_t* codes, uint32_t* lanes) {
  for (int i = 0; i < B; ++i) lanes[i] = 0;
  for (int c = 0; c < (B == 3 ? 30 : 32); ++c) lanes[line_of<B>(c)] |= uint32_t(codes[c]) << shift_of<B>(c);
  if (B == 3)
    for (int c = 30; c < 32; ++c)
      for (int i = 0; i < 3; ++i) lanes[i] |= uint32_t(codes[c] >> i & 1) << (15 + 16 * (c & 1));
}

template <int B>
inline void from_lanes(const uint32_t* lanes, uint8_t* codes) {
  for (int c = 0; c < (B == 3 ? 30 : 32); ++c)
    codes[c] = uint8_t(lanes[line_of<B>(c)] >> shift_of<B>(c) & ((1u << B) - 1));
  if (B == 3)
    for (int c = 30; c < 32; ++c) {
      codes[c] = 0;
      for (int i = 0; i < 3; ++i) codes[c] |= uint8_t((lanes[i] >> (15 + 16 * (c & 1)) & 1) << i);
    }
}

// The row's stream is read 32 codes at a time; `column` need not be a multiple of 8 when groups are odd.
inline uint8_t code_at(const uint8_t* row, int64_t column, int bits) {
  int64_t bit = column * bits;
  uint32_t word = row[bit / 8];
  if (bit % 8 + bits > 8) word |= uint32_t(row[bit / 8 + 1]) << 8;
  return uint8_t(word >> (bit % 8) & ((1u << bits) - 1));
}

inline void put_code(uint8_t* row, int64_t column, int bits, uint8_t code) {
  int64_t bit = column * bits;
  row[bit / 8] |= uint8_t(code << (bit % 8));
  if (bit % 8 + bits > 8) row[bit / 8 + 1] |= uint8_t(code >> (8 - bit % 8));
}

template <int B>
void pack_codes(const McMatrix& m, const uint8_t* record, uint8_t* blob) {
  uint8_t codes[TILE];
  uint32_t lanes[B];
  for (int64_t panel = 0; panel < m.panels; ++panel) {
    uint8_t* at = blob + m.codes + panel * panel_bytes(m);
    for (int64_t g = 0; g < m.groups; ++g)
      for (int64_t t = 0; t < m.padded / TILE; ++t, at += tile_bytes(m)) {
        int64_t first = g * m.group + t * TILE, there = m.group - t * TILE;
        bool whole = there >= TILE && first * B % 8 == 0;
        for (int64_t row = 0; row < PANEL; ++row) {
          int64_t source = source_row(m, panel, row);
          const uint8_t* stream = record + m.rec_codes + source * m.rec_stride;
          if (source >= 0 && whole) {
            take<B>(stream + first * B / 8, codes);
          } else {
            std::memset(codes, 0, TILE);
            for (int64_t i = 0; source >= 0 && i < there && i < TILE; ++i) codes[i] = code_at(stream, first + i, B);
          }
          to_lanes<B>(codes, lanes);
          for (int i = 0; i < B; ++i)
            std::memcpy(at + (row / BLOCK * B + i) * LINE + row % BLOCK * 4, &lanes[i], 4);
        }
      }
  }
}

template <int B>
void unpack_codes(const McMatrix& m, const uint8_t* blob, uint8_t* record) {
  uint8_t codes[TILE];
  uint32_t lanes[B];
  for (int64_t panel = 0; panel < m.panels; ++panel) {
    const uint8_t* at = blob + m.codes + panel * panel_bytes(m);
    for (int64_t g = 0; g < m.groups; ++g)
      for (int64_t t = 0; t < m.padded / TILE; ++t, at += tile_bytes(m)) {
        int64_t first = g * m.group + t * TILE, there = m.group - t * TILE;
        for (int64_t row = 0; row < PANEL; ++row) {
          int64_t source = source_row(m, panel, row);
          if (source < 0) continue;
          for (int i = 0; i < B; ++i)
            std::memcpy(&lanes[i], at + (row / BLOCK * B + i) * LINE + row % BLOCK * 4, 4);
          from_lanes<B>(lanes, codes);
          uint8_t* stream = record + m.rec_codes + source * m.rec_stride;
          if (there >= TILE && first * B % 8 == 0)
            give<B>(codes, stream + first * B / 8);
          else
            for (int64_t i = 0; i < there && i < TILE; ++i) put_code(stream, first + i, B, codes[i]);
        }
      }
  }
}

// Matrices without codes: bf16 stays (pairs per lane), float16 becomes float32 (exactly).
void raw(const McMatrix& m, const uint8_t* record, uint8_t* blob, uint8_t* back) {
  int64_t bytes = element_bytes(m.rec_dtype);
  for (int64_t panel = 0; panel < m.panels; ++panel)
    for (int64_t row = 0; row < PANEL; ++row) {
      int64_t source = source_row(m, panel, row);
      for (int64_t c = 0; c < m.padded; ++c) {
        bool there = source >= 0 && c < m.columns;
        uint8_t* at = blob + m.codes + panel * panel_bytes(m) + c / TILE * tile_bytes(m) + row / BLOCK * m.bits * LINE;
        at += m.bits == 16 ? c % TILE / 2 * LINE + row % BLOCK * 4 + c % 2 * 2 : c % TILE * LINE + row % BLOCK * 4;
        int64_t offset = m.rec_codes + (source * m.columns + c) * bytes;
        if (back) {
          uint16_t half;
          if (there && m.rec_dtype == MC_F16) {
            float value;
            std::memcpy(&value, at, 4);
            half = to_f16(value);
            std::memcpy(back + offset, &half, 2);
          } else if (there) {
            std::memcpy(back + offset, at, bytes);
          }
        } else if (!there) {
          std::memset(at, 0, m.bits == 16 ? 2 : 4);
        } else if (m.rec_dtype == MC_F16) {
          uint16_t half;
          std::memcpy(&half, record + offset, 2);
          float value = from_f16(half);
          std::memcpy(at, &value, 4);
        } else {
          std::memcpy(at, record + offset, bytes);
        }
      }
    }
}

// Scales, or zero points: [rows, groups] in the record, [panel, group, 32] in the blob; float16 is kept as float32.
void grid(const McMatrix& m, int64_t type, int64_t rec_type, const uint8_t* record, uint8_t* blob, uint8_t* back) {
  int64_t bytes = element_bytes(type), rec_bytes = element_bytes(rec_type);
  for (int64_t panel = 0; panel < m.panels; ++panel)
    for (int64_t g = 0; g < m.groups; ++g)
      for (int64_t row = 0; row < PANEL; ++row) {
        int64_t source = source_row(m, panel, row);
        uint8_t* at = blob + ((panel * m.groups + g) * PANEL + row) * bytes;
        int64_t offset = (source * m.groups + g) * rec_bytes;
        if (source < 0) {
          if (!back) std::memset(at, 0, bytes);
        } else if (type == rec_type) {
          std::memcpy(back ? back + offset : at, back ? at : record + offset, bytes);
        } else if (back) {
          float value;
          std::memcpy(&value, at, 4);
          uint16_t half = to_f16(value);
          std::memcpy(back + offset, &half, 2);
        } else {
          uint16_t half;
          std::memcpy(&half, record + offset, 2);
          float value = from_f16(half);
          std::memcpy(at, &value, 4);
        }
      }
}

void grids(const McMatrix& m, const uint8_t* record, uint8_t* blob, uint8_t* back) {
  if (m.scales >= 0)
    grid(m, m.dtype, m.rec_dtype, record + m.rec_scales, blob + m.scales, back ? back + m.rec_scales : nullptr);
  if (m.zeros >= 0) {
    bool whole = m.values == MC_INT;
    grid(m, whole ? MC_U8 : m.dtype, whole ? MC_U8 : m.rec_dtype, record + m.rec_zeros, blob + m.zeros,
         back ? back + m.rec_zeros : nullptr);
  }
}

}  // namespace

int64_t source_row(const McMatrix& m, int64_t panel, int64_t row) {
  int64_t half = row / BLOCK, i = m.order == MC_PLAIN ? panel * PANEL + row : panel * BLOCK + row % BLOCK;
  if (m.order == MC_PLAIN) return i < m.rows ? i : -1;
  if (i >= m.rows / 2) return -1;
  return m.order == MC_GATED ? half * (m.rows / 2) + i : 2 * i + half;
}

void layout_pack(const McMatrix& m, const uint8_t* record, uint8_t* blob) {
  switch (m.bits) {
    case 1: pack_codes<1>(m, record, blob); break;
    case 2: pack_codes<2>(m, record, blob); break;
    case 3: pack_codes<3>(m, record, blob); break;
    case 4: pack_codes<4>(m, record, blob); break;
    case 8: pack_codes<8>(m, record, blob); break;
    default: raw(m, record, blob, nullptr);
  }
  grids(m, record, blob, nullptr);
}

void layout_unpack(const McMatrix& m, const uint8_t* blob, uint8_t* record) {
  uint8_t* from = const_cast<uint8_t*>(blob);  // read only: with `back` the blob is the source
  switch (m.bits) {
    case 1: unpack_codes<1>(m, blob, record); break;
    case 2: unpack_codes<2>(m, blob, record); break;
    case 3: unpack_codes<3>(m, blob, record); break;
    case 4: unpack_codes<4>(m, blob, record); break;
    case 8: unpack_codes<8>(m, blob, record); break;
    default: raw(m, nullptr, from, record);
  }
  grids(m, record, from, record);
}
