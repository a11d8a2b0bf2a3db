// Arguments of the C interface; the same structures are declared in kernels/cuda.py. Plain pointers and 32-bit integers.
#pragma once

// Bump with every change of a structure, a layout or a meaning.
#define MC_CUDA_ABI 2

enum McDtype { MC_BF16 = 2, MC_FP16 = 3, MC_F32 = 4 };  // Kind of cuda_layout.cuh
enum McFunction { MC_SILU = 0, MC_GELU = 1, MC_GELU_TANH = 2, MC_RELU = 3, MC_RELU2 = 4, MC_IDENTITY = 5 };

struct McActivation {
  int function, gated, interleaved;
  float alpha, limit, shift;  // limit: infinity for none
};

// One matrix of all experts. rows, columns: of one expert. which: its place among `matrices` in the table.
struct McMatrix {
  const void* blob;
  const void* table;  // Descriptor [experts, matrices]
  const void* bias;   // [experts, rows] of bias_dtype, or null
  int rows, columns, row_tiles, column_tiles;
  int which, matrices, experts, bias_dtype, max_stride;
};

// T tokens, K slots each. ids: int64 [T, K]; anything outside 0..experts-1 skips the slot. weights: float32 [T, K].
struct McMoe {
  const void* hidden;   // [T, columns of up], dtype
  const void* ids;
  const void* weights;
  void* middle;         // workspace [T * K, columns of down], dtype
  void* partial;        // workspace [T * K, rows of down], dtype; prefill only
  void* sorted;         // workspace of the sort, int32; prefill only
  void* out;            // [T, rows of down], dtype
  void* stream;
  int tokens, slots, dtype, block;  // block: tokens of a prefill tile
  McActivation activation;
  McMatrix up, down;
};

struct McLinear {
  const void* inputs;  // [T, columns]
  void* out;           // [T, rows]
  void* dealt;         // workspace [T, columns in whole blocks of 32], dtype; wgmma only
  void* stream;
  int tokens, dtype, block, unused;
  McMatrix matrix;
};

// One matrix of all records of one kind, to or from tiles.
struct McRepack {
  void* blob;
  const void* table;
  void* records;         // uint8 [n, row_bytes]; written when unpacking
  const void* slot_map;  // int32 [experts, 2]: (kind, row); rows of another kind are left alone
  void* stream;
  long long row_bytes, codes, scales, zeros;  // offsets of a record's parts
  int kind, experts, which, matrices, first, unused;  // first, experts: the range of experts to handle
  int rows, columns, row_tiles, column_tiles, order, bits, group, groups, scale_kind, zero_kind;
};
