// A panel times int8 rows, in integers, for any vector type W of 32-bit lanes that the including source defines:
//   W::LANES, ROWS, CHAINS; zero(), set(int32_t), load(const void*), store(void*, W), load_u8(const uint8_t*);
//   right<N>(W), left<N>(W), mask(W, uint32_t), pick(uint32_t bits, W a, W b): bits of a where set, else of b;
//   add(a, b), sub(a, b), mul(a, b) of int32; dot<B>(sum, codes, inputs): sum + the four products of unsigned codes below
//   2^B and signed bytes of a lane, exactly;
//   broadcast(const int8_t*): four bytes in every lane; W::V: float lanes of the same number, to_float(W),
//   fma(V, V, V) rounded once.
// Sums over a group are exact, so neither the instruction set nor the number of rows changes a bit of the result: per
// group one int32 total per row becomes float32 (rounded) and is added, times its scale, with one rounding.
// Everything is in an anonymous namespace, as in numbers.h.
#pragma once
#include "mc_cpu.h"
#include "panel_f32.h"

namespace {

constexpr int QUADS = TILE / 4;

template <class W>
struct Int {
  using V = typename W::V;
  static constexpr int PARTS = PANEL / W::LANES, BLOCK_PARTS = BLOCK / W::LANES;
  static constexpr int64_t PIECE = 512;  // columns expanded at a time: 16 KB, half of the first cache
  static constexpr int64_t TOTALS = SCRATCH / 2;  // where the scratch keeps totals of groups of several pieces
  static_assert(PIECE * PANEL <= TOTALS && MANY * PANEL * 4 <= SCRATCH - TOTALS, "the scratch holds both");

  static W line(const uint8_t* lines, int number, int part) { return W::load(lines + number * LINE + part * W::LANES * 4); }

  // Quad q of a tile: codes of four columns in the bytes of each lane, in the order of quad_place.
  template <int B>
  static W quad(const uint8_t* lines, int q, int part) {
    constexpr int per = 8 / B;
    W w = line(lines, q / per, part);
    if (B == 8) return w;
    switch (q % per * B) {
      case 1: w = W::template right<1>(w); break;
      case 2: w = W::template right<2>(w); break;
      case 3: w = W::template right<3>(w); break;
      case 4: w = W::template right<4>(w); break;
      case 5: w = W::template right<5>(w); break;
      case 6: w = W::template right<6>(w); break;
      case 7: w = W::template right<7>(w); break;
    }
    return W::mask(w, 0x01010101u * ((1u << B) - 1));
  }

  // Three bits: a half word's codes are at bits 0, 3, 6, 9, 12, and bit 15 of three lines is one more.
  static W quad3(const uint8_t* lines, int q, int part) {
    constexpr uint32_t LOW = 0x00ff00ff, ALL = 0x07070707;
    if (q < 6) {
      W w = line(lines, q / 2, part);
      if (q % 2 == 0) return W::mask(W::pick(LOW, w, W::template right<1>(w)), ALL);
      return W::mask(W::pick(LOW, W::template right<3>(w), W::template right<4>(w)), ALL);
    }
    W first = line(lines, 0, part), second = line(lines, 1, part), third = line(lines, 2, part);
    if (q == 6) return W::mask(W::pick(LOW, W::template right<6>(first), W::template left<2>(second)), ALL);
    W spread = W::pick(0x02000200, W::template right<6>(second), W::template right<7>(first));
    spread = W::pick(0x04000400, W::template right<5>(third), spread);
    return W::mask(W::pick(LOW, W::template right<6>(third), spread), ALL);
  }

  template <int B>
  static W codes(const uint8_t* lines, int q, int part) {
    return B == 3 ? quad3(lines, q, part) : quad<B == 3 ? 4 : B>(lines, q, part);
  }

  // What a group of a panel counts: totals += scale * (dot - zero * sum), the difference in integers but for float zeros.
  struct Grid {
    V scale[PARTS], minus[PARTS];  // minus: float zero points, negated
    W zero[PARTS];
    int64_t group;

    Grid(const PanelCall& call, int64_t g) : group(g) {
      const McMatrix& m = *call.matrix;
      for (int part = 0; part < PARTS; ++part) {
        int64_t at = g * PANEL + part * W::LANES;
        scale[part] = grid_f32<V>(call.scales, m.dtype, at);
        zero[part] = W::set(m.values == MC_SYMMETRIC ? 1 << (m.bits - 1) : m.values == MC_BINARY ? 1 : 0);
        if (m.values == MC_INT) zero[part] = W::load_u8(call.zeros + at);
        if (m.values == MC_FLOAT) minus[part] = V::sub(V::zero(), grid_f32<V>(call.zeros, m.dtype, at));
      }
    }

    // The N rows from `first`; unrolled as in panel_f32.h.
    template <int N>
    void close(const PanelCall& call, int64_t first, W (&dots)[N][PARTS]) const {
      const McMatrix& m = *call.matrix;
      if (m.values == MC_FLOAT) return store<N, true>(call, first, dots);
      bool twice = m.values == MC_BINARY;
      MC_UNROLL(16)
      for (int i = 0; i < N; ++i)
        for (int part = 0; part < PARTS; ++part) {
          if (twice) dots[i][part] = W::add(dots[i][part], dots[i][part]);
          dots[i][part] = W::sub(dots[i][part], W::mul(zero[part], W::set(int32_t(call.sums[first + i][group]))));
        }
      store<N, false>(call, first, dots);
    }

    template <int N, bool FLOAT>
    void store(const PanelCall& call, int64_t first, const W (&dots)[N][PARTS]) const {
      MC_UNROLL(16)
      for (int i = 0; i < N; ++i)
        for (int part = 0; part < PARTS; ++part) {
          V value = W::to_float(dots[i][part]);
          if (FLOAT) value = W::fma(minus[part], V::set(float(int32_t(call.sums[first + i][group]))), value);
          float* out = call.out + (first + i) * PANEL + part * W::LANES;
          V::store(out, W::fma(value, scale[part], V::load(out)));
        }
    }
  };

  template <int B, int N>
  static void fused(const PanelCall& call) {
    constexpr int CHAINS = W::CHAINS / N;
    const McMatrix& m = *call.matrix;
    const uint8_t* at = call.codes;
    const int8_t* x[N];
    for (int i = 0; i < N; ++i) x[i] = static_cast<const int8_t*>(call.x[i]);
    for (int64_t g = 0; g < m.groups; ++g) {
      W dots[N][CHAINS][PARTS];
      for (int i = 0; i < N; ++i)
        for (int k = 0; k < CHAINS; ++k)
          for (int part = 0; part < PARTS; ++part) dots[i][k][part] = W::zero();
      for (int64_t t = 0; t < m.padded / TILE; ++t, at += 2 * B * LINE) {
        fetch_ahead<B == 3 ? AHEAD : NEAR>(call, at, 2 * B);
        MC_UNROLL(8)
        for (int q = 0; q < QUADS; ++q)
          for (int part = 0; part < PARTS; ++part) {
            W w = codes<B>(at + part / BLOCK_PARTS * B * LINE, q, part % BLOCK_PARTS);
            for (int i = 0; i < N; ++i) {
              W& sum = dots[i][q % CHAINS][part];
              sum = W::template dot<B>(sum, w, W::broadcast(x[i] + 4 * q));
            }
          }
        for (int i = 0; i < N; ++i) x[i] += TILE;
      }
      W totals[N][PARTS];
      for (int i = 0; i < N; ++i)
        for (int part = 0; part < PARTS; ++part) {
          totals[i][part] = dots[i][0][part];
          for (int k = 1; k < CHAINS; ++k) totals[i][part] = W::add(totals[i][part], dots[i][k][part]);
        }
      Grid(call, g).close(call, 0, totals);
    }
  }

  // Rows first..first+N times one expanded piece. Totals of a group that goes on are kept.
  template <int B, int N>
  static void blocked(const PanelCall& call, int64_t first, int64_t column, int64_t columns, int64_t g, bool begins,
                      bool ends) {
    int32_t* totals = reinterpret_cast<int32_t*>(call.scratch + TOTALS) + first * PANEL;
    W dots[N][PARTS];
    const int8_t* x[N];
    MC_UNROLL(16)
    for (int i = 0; i < N; ++i) {
      x[i] = static_cast<const int8_t*>(call.x[first + i]) + column;
      for (int part = 0; part < PARTS; ++part) dots[i][part] = W::zero();
    }
    for (int64_t q = 0; q < columns / 4; ++q) {
      const uint8_t* w = call.scratch + q * PANEL * 4;
      MC_UNROLL(16)
      for (int i = 0; i < N; ++i) {
        W value = W::broadcast(x[i] + 4 * q);
        for (int part = 0; part < PARTS; ++part)
          dots[i][part] = W::template dot<B>(dots[i][part], W::load(w + part * W::LANES * 4), value);
      }
    }
    if (begins && ends) return Grid(call, g).close(call, first, dots);
    for (int i = 0; i < N; ++i)
      for (int part = 0; part < PARTS; ++part) {
        int32_t* total = totals + i * PANEL + part * W::LANES;
        if (!begins) dots[i][part] = W::add(dots[i][part], W::load(total));
        W::store(total, dots[i][part]);
      }
    if (ends) Grid(call, g).close(call, first, dots);
  }

  // n rows, at most N.
  template <int B, int N>
  static void some(const PanelCall& call, int64_t first, int64_t n, int64_t column, int64_t columns, int64_t g,
                   bool begins, bool ends) {
    if constexpr (N > 1)
      if (n < N) return some<B, N - 1>(call, first, n, column, columns, g, begins, ends);
    blocked<B, N>(call, first, column, columns, g, begins, ends);
  }

  // All rows times one expanded piece, at most W::ROWS at a time, in blocks of equal sizes. B: any below 8, or 8.
  template <int B>
  static void rows(const PanelCall& call, int64_t column, int64_t columns, int64_t g, bool begins, bool ends) {
    int64_t blocks = (call.n + W::ROWS - 1) / W::ROWS;
    for (int64_t k = 0; k < blocks; ++k) {
      int64_t first = call.n * k / blocks;
      some<B, W::ROWS>(call, first, call.n * (k + 1) / blocks - first, column, columns, g, begins, ends);
    }
  }

  using Rows = void (*)(const PanelCall&, int64_t, int64_t, int64_t, bool, bool);

  // Many rows: pieces of a group are expanded once into the scratch ([quad][row] of four bytes) and used by all rows.
  template <int B>
  static void expanded(const PanelCall& call, Rows multiply) {
    const McMatrix& m = *call.matrix;
    const uint8_t* at = call.codes;
    for (int64_t g = 0; g < m.groups; ++g)
      for (int64_t from = 0; from < m.padded; from += PIECE) {
        int64_t columns = m.padded - from < PIECE ? m.padded - from : PIECE;
        for (int64_t t = 0; t < columns / TILE; ++t, at += 2 * B * LINE) {
          fetch_ahead<AHEAD>(call, at, 2 * B);
          MC_UNROLL(8)
          for (int q = 0; q < QUADS; ++q)
            for (int part = 0; part < PARTS; ++part)
              W::store(call.scratch + ((t * QUADS + q) * PANEL + part * W::LANES) * 4,
                       codes<B>(at + part / BLOCK_PARTS * B * LINE, q, part % BLOCK_PARTS));
        }
        multiply(call, g * m.padded + from, columns, g, from == 0, from + columns == m.padded);
      }
  }

  template <int B>
  static void panel_bits(const PanelCall& call) {
    for (int64_t i = 0; i < call.n * PANEL; ++i) call.out[i] = 0.0f;
    switch (call.n) {
      case 1: return fused<B, 1>(call);
      case 2: return fused<B, 2>(call);
      default: return expanded<B>(call, rows<B < 8 ? 4 : 8>);
    }
  }

  static void panel(const PanelCall& call) {
    switch (call.matrix->bits) {
      case 1: return panel_bits<1>(call);
      case 2: return panel_bits<2>(call);
      case 3: return panel_bits<3>(call);
      case 4: return panel_bits<4>(call);
      default: return panel_bits<8>(call);
    }
  }
};

}  // namespace
