// AVX-512 with bf16 dot products: codes become bf16 through a table (exactly: they are small integers) and are multiplied
// by pairs of bf16 activations; float32 activations take the path of isa_avx512.cpp, int8 that of isa_avx512_vnni.cpp.
#include "mc_cpu.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
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

// One or two rows: weights go straight from memory into the products. CHAINS independent sums hide the latency.
template <int B, int N>
void fused(const PanelCall& call, int64_t first) {
  constexpr int CHAINS = N == 1 ? 4 : 2;
  const McMatrix& m = *call.matrix;
  Pairs<B> codes(m.values == MC_BINARY);
  Nibbles nibbles;
  const uint8_t* at = call.codes;
  const uint8_t* x[N];
  for (int i = 0; i < N; ++i) x[i] = static_cast<const uint8_t*>(call.x[first + i]);
  for (int64_t g = 0; g < m.groups; ++g) {
    __m512 sums[N][2][CHAINS];
    for (int i = 0; i < N; ++i)
      for (int k = 0; k < CHAINS; ++k) sums[i][0][k] = sums[i][1][k] = _mm512_setzero_ps();
    for (int64_t t = 0; t < m.padded / TILE; ++t, at += 2 * B * LINE) {
      for (int line = 0; line < 2 * B; ++line) fetch_ahead(at + line * LINE);
#pragma GCC unroll 16
      for (int p = 0; p < PAIRS; ++p) {
        __m512i pairs[2];
        for (int block = 0; block < 2 && B != 8; ++block) pairs[block] = codes.pair(at + block * B * LINE, p);
        for (int i = 0; i < N; ++i) {
          __m512i value = pair_at(x[i], p);
          for (int block = 0; block < 2; ++block) {
            __m512& sum = sums[i][block][p % CHAINS];
            sum = B == 8 ? nibbles.dot_pair(sum, at + block * B * LINE, p, value) : dot(sum, pairs[block], value);
          }
        }
      }
      for (int i = 0; i < N; ++i) x[i] += TILE * 2;
    }
    for (int i = 0; i < N; ++i) {
      V dots[2] = {{sums[i][0][0]}, {sums[i][1][0]}};
      for (int k = 1; k < CHAINS; ++k)
        for (int b = 0; b < 2; ++b) dots[b].x = _mm512_add_ps(dots[b].x, sums[i][b][k]);
      F32<V>::close_group(call, g, first + i, dots);
    }
  }
}

template <int N>
void blocked(const PanelCall& call, int64_t first, const uint8_t* w, int64_t column, int64_t columns, int64_t g) {
  __m512 sums[N][2];
  const uint8_t* x[N];
  for (int i = 0; i < N; ++i) {
    x[i] = static_cast<const uint8_t*>(call.x[first + i]) + 2 * column;
    sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < columns / 2; ++p) {
    __m512i a = _mm512_load_si512(w + 2 * p * LINE), b = _mm512_load_si512(w + (2 * p + 1) * LINE);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      __m512i value = pair_at(x[i], p);
      sums[i][0] = dot(sums[i][0], a, value);
      sums[i][1] = dot(sums[i][1], b, value);
    }
  }
  for (int i = 0; i < N; ++i) {
    V dots[2] = {{sums[i][0]}, {sums[i][1]}};
    F32<V>::close_group(call, g, first + i, dots);
  }
}

void blocked_any(const PanelCall& call, int64_t i, int64_t n, const uint8_t* w, int64_t at, int64_t columns, int64_t g) {
  switch (n) {
    case 1: return blocked<1>(call, i, w, at, columns, g);
    case 2: return blocked<2>(call, i, w, at, columns, g);
    case 3: return blocked<3>(call, i, w, at, columns, g);
    case 4: return blocked<4>(call, i, w, at, columns, g);
    case 5: return blocked<5>(call, i, w, at, columns, g);
    case 6: return blocked<6>(call, i, w, at, columns, g);
    case 7: return blocked<7>(call, i, w, at, columns, g);
    case 8: return blocked<8>(call, i, w, at, columns, g);
    case 9: return blocked<9>(call, i, w, at, columns, g);
    default: return blocked<10>(call, i, w, at, columns, g);
  }
}

// Many rows: as in panel_f32.h, with pairs.
template <int B>
void expanded(const PanelCall& call) {
  constexpr int64_t most = 256;  // columns at a time: 16 KB, half of the first cache
  constexpr int64_t N = 10;  // rows at a time at most: 20 sums and 3 operands in 32 registers
  static_assert(most * PANEL * 2 <= SCRATCH, "the scratch holds a piece");
  const McMatrix& m = *call.matrix;
  Pairs<B> codes(m.values == MC_BINARY);
  uint8_t* w = call.scratch;
  const uint8_t* at = call.codes;
  for (int64_t g = 0; g < m.groups; ++g)
    for (int64_t from = 0; from < m.padded; from += most) {
      int64_t columns = m.padded - from < most ? m.padded - from : most;
      for (int64_t t = 0; t < columns / TILE; ++t, at += 2 * B * LINE) {
        for (int line = 0; line < 2 * B; ++line) fetch_ahead(at + line * LINE);
#pragma GCC unroll 16
        for (int p = 0; p < PAIRS; ++p) {
          _mm512_store_si512(w + 2 * (t * PAIRS + p) * LINE, codes.pair(at, p));
          _mm512_store_si512(w + (2 * (t * PAIRS + p) + 1) * LINE, codes.pair(at + B * LINE, p));
        }
      }
      PanelCall piece = call;
      if (from) piece.zeros = nullptr;
      int64_t blocks = (call.n + N - 1) / N;  // of equal sizes: a small rest would run at a fraction of the speed
      for (int64_t k = 0; k < blocks; ++k) {
        int64_t i = call.n * k / blocks;
        blocked_any(piece, i, call.n * (k + 1) / blocks - i, w, g * m.padded + from, columns, g);
      }
    }
}

template <int B>
void panel_bits(const PanelCall& call) {
  for (int64_t i = 0; i < call.n * PANEL; ++i) call.out[i] = 0.0f;
  switch (call.n) {
    case 1: return fused<B, 1>(call, 0);
    case 2: return fused<B, 2>(call, 0);
    default: return expanded<B>(call);
  }
}

void panel(const PanelCall& call) {
  if (call.x_type == MC_F32) return isa_avx512()->panel(call);
  switch (call.matrix->bits) {
    case 1: return panel_bits<1>(call);
    case 2: return panel_bits<2>(call);
    case 3: return panel_bits<3>(call);
    case 4: return panel_bits<4>(call);
    case 8: return panel_bits<8>(call);
    default: return panel_bits<16>(call);
  }
}

void integers(const PanelCall& call) { isa_avx512_vnni()->integers(call); }

const Isa ISA = {"AVX-512 BF16", true, panel, "AVX-512 VNNI", integers, activate};

}  // namespace

const Isa* isa_avx512_bf16() { return &ISA; }
#else
const Isa* isa_avx512_bf16() { return nullptr; }
#endif
