// AMX tiles for int8 activations: 16 rows x 64 columns of them times 64 columns x 16 rows of codes per instruction, whose
// int32 totals are those of panel_int.h, bit for bit. Few rows, and float activations, take other paths.
#include "mc_cpu.h"

#if defined(MC_AMX_EMULATED)
#include "amx_emulated.h"
#define MC_AMX
#elif defined(__AMX_INT8__) && defined(__AMX_TILE__)
#define MC_AMX
#endif

#if defined(MC_AMX) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vnni.h"

namespace {

constexpr int64_t ROWS = 16, STEP = 64;  // of a tile: rows of activations; columns
constexpr int64_t FEW = 4;               // up to so many rows the tiles would be mostly empty

// 0, 1: totals of the two blocks of a panel. 2, 4, 5: activations and codes of STEP columns. 3, 6, 7: of half as many.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 32, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 8, 8};
};

// One group's piece for up to 16 rows: adds to totals [16][PANEL].
void multiply(const int8_t* x, const uint8_t* codes, int64_t columns, int32_t* totals) {
  constexpr int64_t across = PANEL * 4;  // bytes from a quad, and from a row of totals, to the next
  _tile_loadd(0, totals, across);
  _tile_loadd(1, totals + BLOCK, across);
  int64_t c = 0;
  for (; c + STEP <= columns; c += STEP) {
    _tile_loadd(2, x + c, Int<W>::PIECE);
    _tile_loadd(4, codes + c / 4 * across, across);
    _tile_loadd(5, codes + c / 4 * across + LINE, across);
    _tile_dpbsud(0, 2, 4);
    _tile_dpbsud(1, 2, 5);
  }
  if (c < columns) {
    _tile_loadd(3, x + c, Int<W>::PIECE);
    _tile_loadd(6, codes + c / 4 * across, across);
    _tile_loadd(7, codes + c / 4 * across + LINE, across);
    _tile_dpbsud(0, 3, 6);
    _tile_dpbsud(1, 3, 7);
  }
  _tile_stored(0, totals, across);
  _tile_stored(1, totals + BLOCK, across);
}

void rows(const PanelCall& call, int64_t column, int64_t columns, int64_t g, bool begins, bool ends) {
  alignas(64) int8_t x[ROWS * Int<W>::PIECE];
  int32_t* totals = reinterpret_cast<int32_t*>(call.scratch + Int<W>::TOTALS);
  if (begins) std::memset(totals, 0, (call.n + ROWS - 1) / ROWS * ROWS * PANEL * 4);
  for (int64_t first = 0; first < call.n; first += ROWS) {
    for (int64_t i = 0; i < ROWS; ++i)
      if (first + i < call.n)
        std::memcpy(x + i * Int<W>::PIECE, static_cast<const int8_t*>(call.x[first + i]) + column, columns);
      else
        std::memset(x + i * Int<W>::PIECE, 0, columns);
    multiply(x, call.scratch, columns, totals + first * PANEL);
  }
  Int<W>::Grid grid(call, g);
  for (int64_t i = 0; ends && i < call.n; ++i) {
    W dots[1][Int<W>::PARTS];
    for (int part = 0; part < Int<W>::PARTS; ++part) dots[0][part] = W::load(totals + i * PANEL + part * W::LANES);
    grid.close(call, i, dots);
  }
}

void integers(const PanelCall& call) {
  if (call.n <= FEW) return Int<W>::panel(call);
  for (int64_t i = 0; i < call.n * PANEL; ++i) call.out[i] = 0.0f;
  TileShapes shapes;
  _tile_loadconfig(&shapes);
  switch (call.matrix->bits) {
    case 1: Int<W>::expanded<1>(call, rows); break;
    case 2: Int<W>::expanded<2>(call, rows); break;
    case 3: Int<W>::expanded<3>(call, rows); break;
    case 4: Int<W>::expanded<4>(call, rows); break;
    default: Int<W>::expanded<8>(call, rows);
  }
  _tile_release();
}

void panel(const PanelCall& call) { isa_avx512_bf16()->panel(call); }
void offset_sums(const void* row, const McInput& form, float* out) { isa_avx512_bf16()->offset_sums(row, form, out); }

const Isa ISA = {"AMX", true, panel, offset_sums, "AMX", integers, activate};

}  // namespace

const Isa* isa_amx() { return &ISA; }
#else
const Isa* isa_amx() { return nullptr; }
#endif
