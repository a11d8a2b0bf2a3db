// Native records to the runtime layout and back (mc_cpu.h says what it looks like).
#include <cstring>

#include "mc_cpu.h"
#include "numbers.h"

namespace {

// Neighbouring fields of `width` bits inside every 4 * width bits change places: abcd -> acbd. Twice is nothing.
inline uint32_t swapped(uint32_t word, int width, uint32_t low) {
  uint32_t moving = (word ^ (word >> width)) & low;
  return word ^ moving ^ (moving << width);
}

// The codes of a word of a stream: even columns to the low half, odd ones to the high half; and back.
template <int B>
inline uint32_t halves(uint32_t word) {
  if (B <= 1) word = swapped(word, 1, 0x22222222);
  if (B <= 2) word = swapped(word, 2, 0x0c0c0c0c);
  if (B <= 4) word = swapped(word, 4, 0x00f000f0);
  return B <= 8 ? swapped(word, 8, 0x0000ff00) : word;
}
template <int B>
inline uint32_t joined(uint32_t word) {
  if (B <= 8) word = swapped(word, 8, 0x0000ff00);
  if (B <= 4) word = swapped(word, 4, 0x00f000f0);
  if (B <= 2) word = swapped(word, 2, 0x0c0c0c0c);
  return B <= 1 ? swapped(word, 1, 0x22222222) : word;
}

// Every other one of ten 3-bit codes, next to each other; and back.
inline uint32_t every_other(uint32_t codes) {
  codes &= 0x071c71c7;
  codes = (codes | codes >> 3) & 0x0703f03f;
  codes = (codes | codes >> 6) & 0x07000fff;
  return (codes | codes >> 12) & 0x7fff;
}
inline uint32_t apart(uint32_t codes) {
  codes = (codes & 0x0fff) | (codes & 0x7000) << 12;
  codes = (codes | codes << 6) & 0x0703f03f;
  return (codes | codes << 3) & 0x071c71c7;
}

// 32 codes of a stream of 4 * B bytes, or 32 bf16 numbers (B = 16), as lanes of the B lines of a tile; and back.
template <int B>
inline void to_lanes(const uint8_t* stream, uint32_t* lanes) {
  std::memcpy(lanes, stream, 4 * B);
  if (B != 3) {
    for (int i = 0; i < B; ++i) lanes[i] = halves<B>(lanes[i]);
    return;
  }
  uint64_t low = lanes[0] | uint64_t(lanes[1]) << 32, top = lanes[2];  // bits 0 to 63, 64 to 95
  uint32_t tens[3] = {uint32_t(low), uint32_t(low >> 30), uint32_t(low >> 60 | top << 4)}, last = uint32_t(top >> 26);
  for (int i = 0; i < 3; ++i) {
    lanes[i] = every_other(tens[i]) | every_other(tens[i] >> 3) << 16;
    lanes[i] |= (last >> i & 1) << 15 | (last >> (i + 3) & 1) << 31;
  }
}
template <int B>
inline void from_lanes(const uint32_t* lanes, uint8_t* stream) {
  uint32_t words[B];
  if (B != 3) {
    for (int i = 0; i < B; ++i) words[i] = joined<B>(lanes[i]);
  } else {
    uint64_t tens[3], last = 0;
    for (int i = 0; i < 3; ++i) {
      tens[i] = apart(lanes[i] & 0x7fff) | apart(lanes[i] >> 16 & 0x7fff) << 3;
      last |= uint64_t(lanes[i] >> 15 & 1) << i | uint64_t(lanes[i] >> 31) << (i + 3);
    }
    uint64_t low = tens[0] | tens[1] << 30 | tens[2] << 60;
    words[0] = uint32_t(low), words[1 % B] = uint32_t(low >> 32), words[2 % B] = uint32_t(tens[2] >> 4 | last << 26);
  }
  std::memcpy(stream, words, 4 * B);
}

// One code of a row's stream; its `column` need not be a multiple of 8 when groups are odd.
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

// The rows of a panel in the record; null: padding.
template <class Byte>
void rows_of(const McMatrix& m, int64_t panel, Byte* record, Byte** rows) {
  for (int64_t row = 0; row < PANEL; ++row) {
    int64_t source = source_row(m, panel, row);
    rows[row] = source < 0 ? nullptr : record + m.rec_codes + source * m.rec_stride;
  }
}

template <int B>
void pack_codes(const McMatrix& m, const uint8_t* record, uint8_t* blob, int64_t panel) {
  const uint8_t* rows[PANEL];
  rows_of(m, panel, record, rows);
  uint8_t* at = blob + m.codes + panel * panel_bytes(m);
  for (int64_t g = 0; g < m.groups; ++g)
    for (int64_t t = 0; t < m.padded / TILE; ++t, at += tile_bytes(m)) {
      int64_t first = g * m.group + t * TILE, there = m.group - t * TILE;
      bool whole = there >= TILE && first * B % 8 == 0;
      for (int64_t row = 0; row < PANEL; ++row) {
        uint32_t lanes[B] = {};
        if (rows[row] && whole) {
          to_lanes<B>(rows[row] + first * B / 8, lanes);
        } else if (rows[row]) {
          uint8_t stream[4 * B] = {};
          for (int64_t i = 0; i < there && i < TILE; ++i) put_code(stream, i, B, code_at(rows[row], first + i, B));
          to_lanes<B>(stream, lanes);
        }
        for (int i = 0; i < B; ++i) std::memcpy(at + (row / BLOCK * B + i) * LINE + row % BLOCK * 4, &lanes[i], 4);
      }
    }
}

template <int B>
void unpack_codes(const McMatrix& m, const uint8_t* blob, uint8_t* record, int64_t panel) {
  uint8_t* rows[PANEL];
  rows_of(m, panel, record, rows);
  const uint8_t* at = blob + m.codes + panel * panel_bytes(m);
  for (int64_t g = 0; g < m.groups; ++g)
    for (int64_t t = 0; t < m.padded / TILE; ++t, at += tile_bytes(m)) {
      int64_t first = g * m.group + t * TILE, there = m.group - t * TILE;
      for (int64_t row = 0; row < PANEL; ++row) {
        if (!rows[row]) continue;
        uint32_t lanes[B];
        for (int i = 0; i < B; ++i) std::memcpy(&lanes[i], at + (row / BLOCK * B + i) * LINE + row % BLOCK * 4, 4);
        uint8_t stream[4 * B];
        from_lanes<B>(lanes, stream);
        if (there >= TILE && first * B % 8 == 0)
          std::memcpy(rows[row] + first * B / 8, stream, 4 * B);
        else
          for (int64_t i = 0; i < there && i < TILE; ++i) put_code(rows[row], first + i, B, code_at(stream, i, B));
      }
    }
}

// Matrices without codes: bf16 stays (pairs per lane), float16 becomes float32 (exactly).
void raw(const McMatrix& m, const uint8_t* record, uint8_t* blob, uint8_t* back, int64_t panel) {
  int64_t bytes = element_bytes(m.rec_dtype);
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
void grid(const McMatrix& m, int64_t type, int64_t rec_type, const uint8_t* record, uint8_t* blob, uint8_t* back,
          int64_t panel) {
  int64_t bytes = element_bytes(type), rec_bytes = element_bytes(rec_type);
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

void grids(const McMatrix& m, const uint8_t* record, uint8_t* blob, uint8_t* back, int64_t panel) {
  if (m.scales >= 0)
    grid(m, m.dtype, m.rec_dtype, record + m.rec_scales, blob + m.scales, back ? back + m.rec_scales : nullptr, panel);
  if (m.zeros >= 0) {
    bool whole = m.values == MC_INT;
    grid(m, whole ? MC_U8 : m.dtype, whole ? MC_U8 : m.rec_dtype, record + m.rec_zeros, blob + m.zeros,
         back ? back + m.rec_zeros : nullptr, panel);
  }
}

// Whether the rows of a matrix without codes are streams of whole tiles that stay as they are.
bool streams(const McMatrix& m) { return m.bits == 16 && m.rec_dtype == MC_BF16 && m.columns % TILE == 0; }

}  // namespace

int64_t source_row(const McMatrix& m, int64_t panel, int64_t row) {
  int64_t half = row / BLOCK, i = m.order == MC_PLAIN ? panel * PANEL + row : panel * BLOCK + row % BLOCK;
  if (m.order == MC_PLAIN) return i < m.rows ? i : -1;
  if (i >= m.rows / 2) return -1;
  return m.order == MC_GATED ? half * (m.rows / 2) + i : 2 * i + half;
}

void layout_pack(const McMatrix& m, const uint8_t* record, uint8_t* blob, int64_t panel) {
  switch (m.bits) {
    case 1: pack_codes<1>(m, record, blob, panel); break;
    case 2: pack_codes<2>(m, record, blob, panel); break;
    case 3: pack_codes<3>(m, record, blob, panel); break;
    case 4: pack_codes<4>(m, record, blob, panel); break;
    case 8: pack_codes<8>(m, record, blob, panel); break;
    default: streams(m) ? pack_codes<16>(m, record, blob, panel) : raw(m, record, blob, nullptr, panel);
  }
  grids(m, record, blob, nullptr, panel);
}

void layout_unpack(const McMatrix& m, const uint8_t* blob, uint8_t* record, int64_t panel) {
  uint8_t* from = const_cast<uint8_t*>(blob);  // read only: with `back` the blob is the source
  switch (m.bits) {
    case 1: unpack_codes<1>(m, blob, record, panel); break;
    case 2: unpack_codes<2>(m, blob, record, panel); break;
    case 3: unpack_codes<3>(m, blob, record, panel); break;
    case 4: unpack_codes<4>(m, blob, record, panel); break;
    case 8: unpack_codes<8>(m, blob, record, panel); break;
    default: streams(m) ? unpack_codes<16>(m, blob, record, panel) : raw(m, nullptr, from, record, panel);
  }
  grids(m, record, from, record, panel);
}
