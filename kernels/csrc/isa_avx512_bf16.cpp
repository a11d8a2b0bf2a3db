// AVX-512 with bf16 dot products: codes become bf16 through a table (exactly: they are small integers) and are multiplied
// by pairs of bf16 activations; float32 activations take the path of isa_avx512.cpp, int8 that of isa_avx512_vnni.cpp.
#include "mc_cpu.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "avx512.h"
#include "pairs.h"

namespace {

// One or two rows: weights go straight from memory into the products. CHAINS independent sums hide the latency.
template <int B, int N>
void fused(const PanelCall& call, int64_t first) {
  constexpr int CHAINS = N == 1 ? 4 : 2;
  const McMatrix& m = *call.matrix;
  Tile<B, N, CHAINS> tile(m.values == MC_BINARY);
  const uint8_t* at = call.codes;
  const uint8_t* x[N];
  for (int i = 0; i < N; ++i) x[i] = static_cast<const uint8_t*>(call.x[first + i]);
  for (int64_t g = 0; g < m.groups; ++g) {
    Sums<N, CHAINS> sums;
    for (int i = 0; i < N; ++i)
      for (int k = 0; k < CHAINS; ++k)
        sums[i][0][k] = sums[i][1][k] = _mm512_set1_ps(B == 3 && k == 0 ? call.offsets[first + i][g] : 0.0f);
    for (int64_t t = 0; t < m.padded / TILE; ++t, at += 2 * B * LINE) {
      fetch_ahead<AHEAD>(call, at, 2 * B);
      tile.add(at, x, sums);
      for (int i = 0; i < N; ++i) x[i] += TILE * 2;
    }
    V dots[N][2];
    for (int i = 0; i < N; ++i)
      for (int b = 0; b < 2; ++b) {
        dots[i][b] = {sums[i][b][0]};
        for (int k = 1; k < CHAINS; ++k) dots[i][b].x = _mm512_add_ps(dots[i][b].x, sums[i][b][k]);
      }
    F32<V>::Grid(call, g).close(call, first, dots);
  }
}

template <int N>
void blocked(const PanelCall& call, int64_t first, const uint8_t* w, int64_t column, int64_t columns, int64_t g) {
  V dots[N][2];
  const uint8_t* x[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    x[i] = static_cast<const uint8_t*>(call.x[first + i]) + 2 * column;
    dots[i][0] = dots[i][1] = V::zero();
  }
  for (int64_t p = 0; p < columns / 2; ++p) {
    __m512i a = _mm512_load_si512(w + 2 * p * LINE), b = _mm512_load_si512(w + (2 * p + 1) * LINE);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      __m512i value = pair_at(x[i], p);
      dots[i][0].x = dot(dots[i][0].x, a, value);
      dots[i][1].x = dot(dots[i][1].x, b, value);
    }
  }
  F32<V>::Grid(call, g).close(call, first, dots);
}

// n rows, at most N.
template <int N>
void some(const PanelCall& call, int64_t i, int64_t n, const uint8_t* w, int64_t at, int64_t columns, int64_t g) {
  if constexpr (N > 1)
    if (n < N) return some<N - 1>(call, i, n, w, at, columns, g);
  blocked<N>(call, i, w, at, columns, g);
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
        fetch_ahead<AHEAD>(call, at, 2 * B);
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
        some<N>(piece, i, call.n * (k + 1) / blocks - i, w, g * m.padded + from, columns, g);
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

const Isa ISA = {"AVX-512 BF16", true, panel, offset_sums, "AVX-512 VNNI", integers, activate};

}  // namespace

const Isa* isa_avx512_bf16() { return &ISA; }
#else
const Isa* isa_avx512_bf16() { return nullptr; }
#endif
