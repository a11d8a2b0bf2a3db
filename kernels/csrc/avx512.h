// Float32 vectors of AVX-512 (F, BW, DQ, VL): 16 lanes are the 16 rows of a block.
#pragma once
#include <immintrin.h>

#include "activate.h"
#include "panel_f32.h"

namespace {

// Code -> value, as many times as the table has room for: bits above the code need no mask.
inline void fill_table(float* table, int bits, bool binary) {
  int count = 1 << bits;
  for (int i = 0; i < 16; ++i) {
    int code = i % count;
    table[i] = binary ? float(2 * code - 1) : float(code - count / 2);
  }
}

// Low three bits of the result: the pair that 3-bit lines keep in their top bits. `at` is 15 or 31.
template <int AT>
inline __m512i spread_code(__m512i a, __m512i b, __m512i c) {
  __m512i low = _mm512_and_si512(_mm512_srli_epi32(a, AT), _mm512_set1_epi32(1));
  low = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(b, AT - 1), _mm512_set1_epi32(2), 0xf8);   // a | (b & c)
  return _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(c, AT - 2), _mm512_set1_epi32(4), 0xf8);
}

struct V {
  static constexpr int LANES = 16, ROWS = 8;
  __m512 x;

  static V set(float value) { return {_mm512_set1_ps(value)}; }
  static V zero() { return {_mm512_setzero_ps()}; }
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static V load_bf16(const uint16_t* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static V load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v.x); }
  static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
  static V add(V a, V b) { return {_mm512_add_ps(a.x, b.x)}; }
  static V sub(V a, V b) { return {_mm512_sub_ps(a.x, b.x)}; }

  static __m512i line(const uint8_t* lines, int number) { return _mm512_loadu_si512(lines + number * LINE); }

  template <int B>
  struct Codes {
    __m512 table;
    explicit Codes(bool binary) {
      float values[16];
      fill_table(values, B, binary);
      table = _mm512_loadu_ps(values);
    }
    V decode(const uint8_t* lines, int c, int) const {
      __m512i index;
      if (B == 3 && c == 30)
        index = spread_code<15>(line(lines, 0), line(lines, 1), line(lines, 2));
      else if (B == 3 && c == 31)
        index = spread_code<31>(line(lines, 0), line(lines, 1), line(lines, 2));
      else
        index = _mm512_srli_epi32(line(lines, line_of(B, c)), unsigned(shift_of(B, c)));
      return {_mm512_permutexvar_ps(index, table)};
    }
  };
};

template <>
struct V::Codes<8> {
  explicit Codes(bool) {}
  V decode(const uint8_t* lines, int c, int) const {
    __m512i code = _mm512_srli_epi32(line(lines, line_of(8, c)), unsigned(shift_of(8, c)));
    code = _mm512_and_si512(code, _mm512_set1_epi32(255));
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128)))};
  }
};

template <>
struct V::Codes<16> {
  explicit Codes(bool) {}
  V decode(const uint8_t* lines, int c, int) const {
    __m512i pair = line(lines, c / 2);
    __m512i value = c & 1 ? _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000u))) : _mm512_slli_epi32(pair, 16);
    return {_mm512_castsi512_ps(value)};
  }
};

template <>
struct V::Codes<32> {
  explicit Codes(bool) {}
  V decode(const uint8_t* lines, int c, int) const { return load(reinterpret_cast<const float*>(lines + c * LINE)); }
};

}  // namespace
