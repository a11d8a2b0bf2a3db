// Codes of two neighbouring columns as bf16 pairs of 16 rows, and a tile of them times one or two bf16 rows.
#pragma once
#include "avx512.h"

namespace {

constexpr int PAIRS = TILE / 2;

inline __m512 dot(__m512 sum, __m512i weights, __m512i values) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)values);
}

inline __m512i pair_at(const void* row, int64_t pair) {
  int32_t both;
  std::memcpy(&both, static_cast<const uint8_t*>(row) + 4 * pair, 4);
  return _mm512_set1_epi32(both);
}

// pair(lines, p): columns 2p and 2p+1 of 16 rows as bf16. vpermw looks at 5 bits of each half word; the table repeats.
template <int B>
struct Pairs {
  __m512i table;
  explicit Pairs(bool binary) {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      int code = i % (1 << B);
      values[i] = to_bf16(binary ? float(2 * code - 1) : float(code - (1 << B) / 2));
    }
    table = _mm512_loadu_si512(values);
  }
  __m512i pair(const uint8_t* lines, int p) const {
    __m512i index;
    if (B == 3 && p == 15) {
      index = _mm512_srli_epi16(V::line(lines, 0), 15);
      index = _mm512_ternarylogic_epi32(index, _mm512_srli_epi16(V::line(lines, 1), 14), _mm512_set1_epi16(2), 0xf8);
      index = _mm512_ternarylogic_epi32(index, _mm512_srli_epi16(V::line(lines, 2), 13), _mm512_set1_epi16(4), 0xf8);
    } else {
      index = _mm512_srli_epi16(V::line(lines, line_of(B, 2 * p)), unsigned(shift_of(B, 2 * p)));
    }
    return _mm512_permutexvar_epi16(index, table);
  }
};

template <>
struct Pairs<8> {
  explicit Pairs(bool) {}
  __m512i pair(const uint8_t* lines, int p) const {
    __m512i code = _mm512_srli_epi16(V::line(lines, p / 2), unsigned(8 * (p & 1)));
    __m512i centre = _mm512_set1_epi32(128);
    __m512i even = _mm512_and_si512(code, _mm512_set1_epi32(255));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(code, 16), _mm512_set1_epi32(255));
    __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(even, centre)));
    __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(odd, centre)));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);  // |code - 128| fits 8 bits
  }
};

// Eight bits when few rows are multiplied: two products through tables, of the lower four bits and of 16 times (the upper
// four, minus 8), take half the time of making one bf16 number.
struct Nibbles {
  __m512i low, high;
  Nibbles() {
    uint16_t lows[32], highs[32];
    for (int i = 0; i < 32; ++i) lows[i] = to_bf16(float(i % 16)), highs[i] = to_bf16(16.0f * float(i % 16 - 8));
    low = _mm512_loadu_si512(lows), high = _mm512_loadu_si512(highs);
  }
  __m512 dot_pair(__m512 sum, const uint8_t* lines, int p, __m512i value) const {
    __m512i line = V::line(lines, p / 2);
    unsigned at = 8 * (p & 1);
    sum = dot(sum, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, at), low), value);
    return dot(sum, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, at + 4), high), value);
  }
};

template <>
struct Pairs<16> {
  explicit Pairs(bool) {}
  __m512i pair(const uint8_t* lines, int p) const { return V::line(lines, p); }
};

template <int N, int CHAINS>
using Sums = __m512[N][2][CHAINS];

// Products of pair p of both blocks with N rows.
template <int N, int CHAINS>
inline void add_pair(Sums<N, CHAINS>& sums, int p, __m512i first, __m512i second, const uint8_t* const (&x)[N]) {
  for (int i = 0; i < N; ++i) {
    __m512i value = pair_at(x[i], p);
    sums[i][0][p % CHAINS] = dot(sums[i][0][p % CHAINS], first, value);
    sums[i][1][p % CHAINS] = dot(sums[i][1][p % CHAINS], second, value);
  }
}

template <int B, int N, int CHAINS>
struct Tile {
  Pairs<B> codes;
  explicit Tile(bool binary) : codes(binary) {}
  void add(const uint8_t* at, const uint8_t* const (&x)[N], Sums<N, CHAINS>& sums) const {
#pragma GCC unroll 16
    for (int p = 0; p < PAIRS; ++p) add_pair(sums, p, codes.pair(at, p), codes.pair(at + B * LINE, p), x);
  }
};

template <int N, int CHAINS>
struct Tile<8, N, CHAINS> {
  Nibbles codes;
  explicit Tile(bool) {}
  void add(const uint8_t* at, const uint8_t* const (&x)[N], Sums<N, CHAINS>& sums) const {
#pragma GCC unroll 16
    for (int p = 0; p < PAIRS; ++p)
      for (int i = 0; i < N; ++i)
        for (int block = 0; block < 2; ++block) {
          __m512& sum = sums[i][block][p % CHAINS];
          sum = codes.dot_pair(sum, at + block * 8 * LINE, p, pair_at(x[i], p));
        }
  }
};

// Three bits are bound by arithmetic, so their pairs cost less of it. Of the five pairs of a line two are read where they
// are, one by the table and one as mantissa of 16 + code, two more after one shift, and the last after another. Rows come
// with what the added 20 = 16 + 4 amounts to (offset_sums). The pair of the top bits is put together from what the lines
// were shifted to, and its table knows where its bits are.
constexpr float OFFSET = 20.0f;
constexpr bool has_offset(int p) { return p < 15 && (p % 5 == 1 || p % 5 == 3); }

template <int N, int CHAINS>
struct Tile<3, N, CHAINS> {
  __m512i low, next, top;  // tables by bits 0-2, bits 1-3, and bits 4, 3, 2 of a half word
  explicit Tile(bool) {
    uint16_t lows[32], nexts[32], tops[32];
    for (int i = 0; i < 32; ++i) {
      lows[i] = to_bf16(float(i % 8 - 4)), nexts[i] = to_bf16(float(i / 2 % 8 - 4));
      tops[i] = to_bf16(float(i / 16 + i / 8 % 2 * 2 + i / 4 % 2 * 4 - 4));
    }
    low = _mm512_loadu_si512(lows), next = _mm512_loadu_si512(nexts), top = _mm512_loadu_si512(tops);
  }

  // The broadcast is an operand: the compiler would make one for both products, which here costs more than two loads.
  static void add_pair(Sums<N, CHAINS>& sums, int p, __m512i first, __m512i second, const uint8_t* const (&x)[N]) {
    for (int i = 0; i < N; ++i) {
      const int32_t(&both)[PAIRS] = *reinterpret_cast<const int32_t(*)[PAIRS]>(x[i]);
      asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums[i][0][p % CHAINS]) : "v"(first), "m"(both[p]));
      asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums[i][1][p % CHAINS]) : "v"(second), "m"(both[p]));
    }
  }
  static __m512i mantissa(__m512i word) {  // 16 + code at bits 3-5
    return _mm512_ternarylogic_epi32(word, _mm512_set1_epi16(0x38), _mm512_set1_epi16(0x4180), 0xea);  // (a & b) | c
  }
  static __m512i select(int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(short(mask)), a, b, 0xca);
  }

  void add(const uint8_t* at, const uint8_t* const (&x)[N], Sums<N, CHAINS>& sums) const {
    __m512i tops[2];
#pragma GCC unroll 3
    for (int line = 0; line < 3; ++line) {
      __m512i word[2], middle[2], last[2];
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block) {
        word[block] = V::line(at + block * 3 * LINE, line);
        asm("" : "+v"(word[block]));  // one load: the compiler would load for every use
        middle[block] = _mm512_srli_epi16(word[block], 6);
        last[block] = _mm512_srli_epi16(word[block], line == 0 ? 11 : 12);
        tops[block] = line == 0   ? last[block]
                      : line == 1 ? select(0x10, tops[block], last[block])
                                  : select(0x18, tops[block], _mm512_srli_epi16(word[block], 13));
      }
      add_pair(sums, 5 * line, table(low, word[0]), table(low, word[1]), x);
      add_pair(sums, 5 * line + 1, mantissa(word[0]), mantissa(word[1]), x);
      add_pair(sums, 5 * line + 2, table(low, middle[0]), table(low, middle[1]), x);
      add_pair(sums, 5 * line + 3, mantissa(middle[0]), mantissa(middle[1]), x);
      __m512i by = line == 0 ? next : low;
      add_pair(sums, 5 * line + 4, table(by, last[0]), table(by, last[1]), x);
    }
    add_pair(sums, 15, table(top, tops[0]), table(top, tops[1]), x);
  }
  static __m512i table(__m512i values, __m512i index) { return _mm512_permutexvar_epi16(index, values); }
};

// Minus the offset times the sum of the values that meet it, for each group of a row.
void offset_sums(const void* row, const McInput& form, float* out) {
  uint16_t factors[TILE];
  for (int c = 0; c < TILE; ++c) factors[c] = to_bf16(has_offset(c / 2) ? -OFFSET : 0.0f);
  __m512i factor = _mm512_loadu_si512(factors);
  auto* at = static_cast<const uint8_t*>(row);
  for (int64_t g = 0; g < form.groups; ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < form.padded / TILE; ++t, at += 2 * TILE) sum = dot(sum, factor, _mm512_loadu_si512(at));
    out[g] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace
