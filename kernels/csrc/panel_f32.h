// A panel times float32 rows, for any vector type V that the including source defines:
//   V::LANES; V::zero(), set(float), load(const float*), store(float*, V), fma(a, b, c), add(a, b), mul(a, b);
//   V::Codes<B>(binary): decode(lines, c, part) gives column c of the V::LANES rows from 16-row block line `part`,
//   as code minus 2^(B-1) (binary: -1 or 1).
// Everything is in an anonymous namespace, as in numbers.h.
#pragma once
#include "mc_cpu.h"
#include "numbers.h"

// Columns of a tile are unrolled where decode() wants a constant column; MC_NO_UNROLL where it does not.
#if defined(MC_NO_UNROLL)
#define MC_UNROLL(n)
#else
#define MC_UNROLL(n) _Pragma("GCC unroll 32")
#endif

namespace {

constexpr int line_of(int bits, int c) { return bits == 3 ? c / 10 : c * bits / 32; }
constexpr int shift_of(int bits, int c) { return 16 * (c & 1) + bits * (c % (bits == 3 ? 10 : 32 / bits) / 2); }

template <class V>
inline V grid_f32(const uint8_t* at, int64_t type, int64_t offset) {
  if (type == MC_F32) return V::load(reinterpret_cast<const float*>(at) + offset);
  if (type == MC_BF16) return V::load_bf16(reinterpret_cast<const uint16_t*>(at) + offset);
  return V::load_u8(at + offset);
}

template <class V>
struct F32 {
  static constexpr int PARTS = PANEL / V::LANES, BLOCK_PARTS = BLOCK / V::LANES;

  // What a group of a panel counts: totals += scale * (dot + lift * sum), with lift = 2^(B-1) - zero.
  struct Grid {
    V scale[PARTS], lift[PARTS];
    int64_t group;

    Grid(const PanelCall& call, int64_t g) : group(g) {
      const McMatrix& m = *call.matrix;
      V centre = V::set(m.bits < 16 ? float(1 << (m.bits - 1)) : 0.0f);
      for (int part = 0; part < PARTS; ++part) {
        int64_t at = g * PANEL + part * V::LANES;
        scale[part] = call.scales ? grid_f32<V>(call.scales, m.dtype, at) : V::set(1.0f);
        if (call.zeros)
          lift[part] = V::sub(centre, grid_f32<V>(call.zeros, m.values == MC_INT ? int64_t(MC_U8) : m.dtype, at));
      }
    }

    // The N rows from `first`. Unrolled, or the dots of the caller would live in memory; so the zeros are asked for once.
    template <int N>
    void close(const PanelCall& call, int64_t first, V (&dots)[N][PARTS]) const {
      if (call.zeros) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
          for (int part = 0; part < PARTS; ++part)
            dots[i][part] = V::fma(lift[part], V::set(call.sums[first + i][group]), dots[i][part]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
        for (int part = 0; part < PARTS; ++part) {
          float* out = call.out + (first + i) * PANEL + part * V::LANES;
          V::store(out, V::fma(dots[i][part], scale[part], V::load(out)));
        }
    }
  };

  template <int B, int N>
  static void fused(const PanelCall& call, int64_t first) {
    const McMatrix& m = *call.matrix;
    typename V::template Codes<B> codes(m.values == MC_BINARY);
    const uint8_t* at = call.codes;
    const float* x[N];
    for (int i = 0; i < N; ++i) x[i] = static_cast<const float*>(call.x[first + i]);
    for (int64_t g = 0; g < m.groups; ++g) {
      V dots[N][PARTS];
      for (int i = 0; i < N; ++i)
        for (int part = 0; part < PARTS; ++part) dots[i][part] = V::zero();
      for (int64_t t = 0; t < m.padded / TILE; ++t, at += 2 * B * LINE) {
        MC_UNROLL(32)
        for (int c = 0; c < TILE; ++c) {
          V w[PARTS];
          for (int part = 0; part < PARTS; ++part)
            w[part] = codes.decode(at + part / BLOCK_PARTS * B * LINE, c, part % BLOCK_PARTS);
          for (int i = 0; i < N; ++i) {
            V value = V::set(x[i][c]);
            for (int part = 0; part < PARTS; ++part) dots[i][part] = V::fma(w[part], value, dots[i][part]);
          }
        }
        for (int i = 0; i < N; ++i) x[i] += TILE;
      }
      Grid(call, g).close(call, first, dots);
    }
  }

  template <int N>
  static void blocked(const PanelCall& call, int64_t first, const float* w, int64_t column, int64_t columns, int64_t g) {
    V dots[N][PARTS];
    const float* x[N];
    for (int i = 0; i < N; ++i) {
      x[i] = static_cast<const float*>(call.x[first + i]) + column;
      for (int part = 0; part < PARTS; ++part) dots[i][part] = V::zero();
    }
    for (int64_t c = 0; c < columns; ++c)
      for (int i = 0; i < N; ++i) {
        V value = V::set(x[i][c]);
        for (int part = 0; part < PARTS; ++part)
          dots[i][part] = V::fma(V::load(w + c * PANEL + part * V::LANES), value, dots[i][part]);
      }
    Grid(call, g).close(call, first, dots);
  }

  // Many rows: a group (or as much of it as fits) is expanded once into the scratch and used by all of them. A group in
  // several pieces closes once per piece; its sum belongs to the first.
  template <int B>
  static void expanded(const PanelCall& call) {
    constexpr int64_t most = SCRATCH / 2 / (PANEL * 4);
    constexpr int N = V::ROWS;
    const McMatrix& m = *call.matrix;
    typename V::template Codes<B> codes(m.values == MC_BINARY);
    float* w = reinterpret_cast<float*>(call.scratch);
    const uint8_t* at = call.codes;
    for (int64_t g = 0; g < m.groups; ++g)
      for (int64_t from = 0; from < m.padded; from += most) {
        int64_t columns = m.padded - from < most ? m.padded - from : most;
        for (int64_t t = 0; t < columns / TILE; ++t, at += 2 * B * LINE)
          MC_UNROLL(32)
          for (int c = 0; c < TILE; ++c)
            for (int part = 0; part < PARTS; ++part)
              V::store(w + (t * TILE + c) * PANEL + part * V::LANES,
                       codes.decode(at + part / BLOCK_PARTS * B * LINE, c, part % BLOCK_PARTS));
        PanelCall piece = call;
        if (from) piece.zeros = nullptr;
        int64_t i = 0;
        for (; i + N <= call.n; i += N) blocked<N>(piece, i, w, g * m.padded + from, columns, g);
        for (; i < call.n; ++i) blocked<1>(piece, i, w, g * m.padded + from, columns, g);
      }
  }

  template <int B>
  static void panel_bits(const PanelCall& call) {
    for (int64_t i = 0; i < call.n * PANEL; ++i) call.out[i] = 0.0f;
    switch (call.n) {
      case 1: return fused<B, 1>(call, 0);
      default: return expanded<B>(call);
    }
  }

  static void panel(const PanelCall& call) {
    switch (call.matrix->bits) {
      case 1: return panel_bits<1>(call);
      case 2: return panel_bits<2>(call);
      case 3: return panel_bits<3>(call);
      case 4: return panel_bits<4>(call);
      case 8: return panel_bits<8>(call);
      case 16: return panel_bits<16>(call);
      default: return panel_bits<32>(call);
    }
  }
};

}  // namespace
