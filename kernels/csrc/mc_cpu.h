// Shared by all CPU sources: the table that Python writes, and what one instruction set offers to the driver.
//
// Runtime layout of a matrix. Rows are taken 32 at a time (a panel: two blocks of 16) and columns 32 at a time (a tile);
// every group of columns is padded to whole tiles. A tile of b bits is b lines of 64 bytes per block, lane r of a line
// (32 bits) belonging to row r of the block: its low half holds codes of even columns, its high half of odd columns, in
// order from the lowest bit. So line words shifted right by s*b hold the columns 2s and 2s+1 side by side, which is what
// a bf16 dot product of pairs reads. Three bits: five codes per half word in each of three lines; the three top bits left
// over are the last pair. Eight bits: two codes per half word. Matrices without codes are lines of bf16 pairs (b = 16) or
// of float32 columns (b = 32). Order in memory: panel, tile, block, line; scales and zeros: panel, group, row.
//
// Integer products read a lane four bytes at a time: a quad is four columns whose codes become the bytes of a lane by the
// same shift and mask, and a tile is eight quads, in an order that depends on b (quad_place). int8 input rows are kept in
// that order.
#pragma once
#include <cstddef>
#include <cstdint>

enum : int64_t { MC_RAW = 0, MC_SYMMETRIC = 1, MC_BINARY = 2, MC_INT = 3, MC_FLOAT = 4 };  // McMatrix.values
enum : int64_t { MC_F32 = 0, MC_BF16 = 1, MC_F16 = 2, MC_U8 = 3, MC_I8 = 4 };              // element types
enum : int64_t { MC_PLAIN = 0, MC_GATED = 1, MC_INTERLEAVED = 2 };                         // McMatrix.order of rows
enum : int64_t { MC_SILU = 0, MC_GELU = 1, MC_GELU_TANH = 2, MC_RELU = 3, MC_RELU2 = 4 };  // McLayer.function
enum { MC_OK = 0, MC_BAD_ID = 1, MC_NO_MEMORY = 2, MC_BAD_ARGUMENT = 3 };

constexpr int PANEL = 32, BLOCK = 16, TILE = 32, LINE = 64;

struct McMatrix {         // all int64: Python packs it
  int64_t codes, scales, zeros;              // byte offsets in the blob; -1 = none
  int64_t rows, columns, bits;               // bits: 1, 2, 3, 4, 8, 16 (bf16 pairs), 32 (float32)
  int64_t group, padded, groups;             // columns of a group, the same padded to whole tiles, their number
  int64_t values, dtype, order, panels;      // dtype: of scales as kept in the blob (MC_F32 or MC_BF16)
  int64_t input;                             // index of the form its inputs take (McInput)
  int64_t rec_codes, rec_scales, rec_zeros;  // byte offsets in the native record
  int64_t rec_stride, rec_dtype;             // bytes per packed row; dtype of scales there
  int64_t kind;                              // which record layout; for Python
};

struct McInput {          // a form of input rows: rounded or not, padded for one group size, with sums or not
  int64_t rounding;       // 0, 4, 8
  double factor;          // clip / (2^(rounding-1) - 1)
  int64_t group, padded, groups;
  int64_t sums;           // 1: sums over groups are needed (zero points)
  int64_t dtype;          // MC_F32: always float32; MC_BF16: bf16 when the instruction set multiplies it
  int64_t offsets;        // 1: for 3-bit matrices and float rows, see offset_sums
  int64_t order;          // of int8 rows: bits of the matrices that they are multiplied with; 0: floats
};

struct McLayer {
  int64_t experts, matrices;                 // matrices per expert: 2, or 1 for a Linear
  int64_t hidden, width;                     // H; I (inputs of the second matrix)
  int64_t function, gated;
  double alpha, limit, shift;                // limit: infinity = none
  int64_t bias_up, bias_down;                // float32 in the blob, padded like panels; -1 = none
  int64_t inputs;                            // number of McInput; they follow, then the McMatrix table
};

inline const McInput* inputs_of(const McLayer* l) { return reinterpret_cast<const McInput*>(l + 1); }
inline const McMatrix* matrices_of(const McLayer* l) {
  return reinterpret_cast<const McMatrix*>(inputs_of(l) + l->inputs);
}
inline int64_t tile_bytes(const McMatrix& m) { return 2 * m.bits * LINE; }  // of one panel
inline int64_t panel_bytes(const McMatrix& m) { return m.groups * (m.padded / TILE) * tile_bytes(m); }
// Where column c of a tile of `bits` bits is among the bytes of its quads.
constexpr int quad_place(int bits, int c) {
  int half = c & 1;
  if (bits == 3) {
    if (c >= 30) return 4 * 7 + 2 * half + 1;
    int line = c / 10, i = c % 10 / 2;
    if (i == 2) return 4 * (line == 2 ? 7 : 6) + 2 * half + (line == 1);
    return 4 * (2 * line + i % 3) + 2 * half + i / 3;
  }
  int line = c * bits / 32, i = c % (32 / bits) / 2, per_byte = 8 / bits;
  return 4 * (line * per_byte + i % per_byte) + 2 * half + i / per_byte;
}

inline int64_t element_bytes(int64_t type) { return type == MC_F32 ? 4 : type == MC_U8 || type == MC_I8 ? 1 : 2; }

// One panel of a matrix times n input rows: out[n][32] (float32, overwritten).
struct PanelCall {
  const uint8_t* codes;       // of this panel
  const uint8_t* end;         // of the panels that this thread reads one after another
  const uint8_t* next;        // the codes that it reads then, or null
  const uint8_t* scales;      // of this panel, or null
  const uint8_t* zeros;       // of this panel, or null
  const McMatrix* matrix;
  int64_t x_type;             // MC_F32 or MC_BF16; MC_I8: for `integers`
  const void* const* x;       // n rows
  const float* const* sums;   // n rows of [groups], or null; of int8 rows: whole numbers
  const float* const* offsets;  // n rows of [groups]: what offset_sums made of bf16 rows; read for 3-bit matrices only
  int64_t n;                  // at most MANY
  float* out;
  uint8_t* scratch;           // SCRATCH bytes, aligned to 64
};
constexpr int64_t SCRATCH = 64 * 1024, MANY = 96;

// Codes are fetched far ahead into the second cache: the first one has too few places for lines under way to keep memory
// busy. Only where arithmetic is so light that it waits for memory all the time is the first cache better, a little ahead.
// (Measured on Zen 4, where bf16 products read up to a fifth slower with NEAR, int8 products of four bits with AHEAD; those
// of three do more for a code.) What lies behind the panels of this thread is of no use to it, but what it reads then is.
constexpr int64_t AHEAD = 16384, NEAR = 2048;
template <int64_t DISTANCE>
inline void fetch_ahead(const PanelCall& call, const uint8_t* at, int64_t lines) {
  const uint8_t* from = at + DISTANCE;
  if (from >= call.end) {
    if (!call.next) return;
    from = call.next + (from - call.end);
  }
  for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(from + line * LINE, 0, DISTANCE == NEAR ? 3 : 2);
}

struct ActivationCall {       // dst[i] = f of n rows of a panel: [16] when gated, [32] when not
  const float* panel;         // [n][32]; gated: 16 gates then 16 ups
  float* const* dst;
  int64_t n, keep;            // keep: values per row that exist (the last panel may be padded)
  const McLayer* layer;
};

struct Isa {
  const char* name;
  bool bf16;                  // whether panel() multiplies it
  void (*panel)(const PanelCall&);
  void (*offset_sums)(const void* row, const McInput& form, float* out);  // [groups]; null: panel() wants none
  const char* int8;           // the instructions of integers()
  void (*integers)(const PanelCall&);  // int8 rows; the same bits on every instruction set
  void (*activate)(const ActivationCall&);
};

// nullptr where this build does not contain the instruction set
const Isa* isa_scalar();
const Isa* isa_avx2();
const Isa* isa_avx512();
const Isa* isa_avx512_vnni();
const Isa* isa_avx512_bf16();
const Isa* isa_amx();

// pool.cpp
using Task = void (*)(void* context, int64_t index);
int pool_threads(int wanted);                                          // wanted, within affinity and limits
void pool_run(int threads, int64_t tasks, Task task, void* context);   // returns when all tasks are done
void pool_use_openmp(void* gomp_parallel);                             // its threads instead of our own; null: own
// layout.cpp
void layout_pack(const McMatrix& m, const uint8_t* record, uint8_t* blob, int64_t panel);
void layout_unpack(const McMatrix& m, const uint8_t* blob, uint8_t* record, int64_t panel);
int64_t source_row(const McMatrix& m, int64_t panel, int64_t row);     // -1: padding
