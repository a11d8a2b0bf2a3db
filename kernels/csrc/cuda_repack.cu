// Records of the native format to tiles, and back byte for byte.
#include "cuda_args.cuh"
#include "cuda_layout.cuh"

namespace mc {

constexpr int kRepackThreads = 128;

MC_DEVICE Descriptor descriptor_of(const McRepack& p, int expert) {
  return static_cast<const Descriptor*>(p.table)[static_cast<long long>(expert) * p.matrices + p.which];
}

// The record of this block's expert, or null when it has another layout.
MC_DEVICE unsigned char* record_of(const McRepack& p, int expert) {
  const int* slot = static_cast<const int*>(p.slot_map) + 2 * expert;
  return slot[0] == p.kind ? static_cast<unsigned char*>(p.records) + slot[1] * p.row_bytes : nullptr;
}

MC_DEVICE unsigned stored_code(const unsigned* stream, int bits, int column) {
  const int bit = column * bits, word = bit / 32, shift = bit % 32;
  unsigned code = stream[word] >> shift;
  if (shift + bits > 32) code |= stream[word + 1] << (32 - shift);
  return code & ((1u << bits) - 1);
}

MC_DEVICE void copy_value(unsigned char* to, long long i, const unsigned char* from, long long j, int size) {
  for (int byte = 0; byte < size; ++byte) to[i * size + byte] = from ? from[j * size + byte] : 0;
}

// One warp writes one tile.
MC_KERNEL(kRepackThreads, 1) pack_tiles(McRepack p) {
  const int expert = p.first + blockIdx.y, lane = threadIdx.x % kLanes;
  const int index = blockIdx.x * (kRepackThreads / kLanes) + threadIdx.x / kLanes;
  const unsigned char* record = record_of(p, expert);
  if (!record || index >= p.row_tiles * p.column_tiles) return;
  const Descriptor d = descriptor_of(p, expert);
  const int row_tile = index / p.column_tiles, tile = index % p.column_tiles;
  unsigned char* out = static_cast<unsigned char*>(p.blob) + 16ll * d.offset + static_cast<long long>(index) * d.stride;
  const int row_words = (p.columns * p.bits + 31) / 32;
  unsigned words[16] = {};
  for (int i = 0; i < 32; ++i) {
    const int row = source_row(p.order, p.rows, row_tile, pair_row(lane, i));
    const unsigned* stream = reinterpret_cast<const unsigned*>(record + p.codes) + static_cast<long long>(row) * row_words;
    for (int half = 0; half < 2; ++half) {
      const int column = tile * kColumns + pair_column(lane, i) + half;
      const unsigned code = row < 0 || column >= p.columns ? 0 : stored_code(stream, p.bits, column);
      for (int bit = 0; bit < p.bits; ++bit) {
        const Place place = code_place(p.bits, i, bit);
        words[place.word] |= (code >> bit & 1) << (place.shift + 16 * half);
      }
    }
  }
  for (int w = 0; w < 2 * p.bits; ++w) *reinterpret_cast<unsigned*>(out + word_offset(p.bits, lane, w)) = words[w];
  const int scale_size = kind_bytes(p.scale_kind), zero_size = kind_bytes(p.zero_kind);
  unsigned char* scales = out + code_bytes(p.bits);
  unsigned char* zeros = scales + scale_bytes(d);
  for (int i = lane; i < kRows * d.groups; i += kLanes) {
    const int r = i / d.groups, part = i % d.groups, row = source_row(p.order, p.rows, row_tile, r);
    const int group = group_of(tile, part * kBlocks / d.groups, p.group, p.groups);
    const long long from = static_cast<long long>(row) * p.groups + group;
    const int to = scale_index(r, part, d.groups);
    copy_value(scales, to, row < 0 ? nullptr : record + p.scales, from, scale_size);
    if (zero_size) copy_value(zeros, to, row < 0 ? nullptr : record + p.zeros, from, zero_size);
  }
}

MC_DEVICE unsigned tile_code(const unsigned char* tile, int bits, int row, int column) {
  const int within = column % 32, lane = row % 8 * 4 + within / 8;
  const int i = column / 32 * 8 + within % 8 / 4 * 4 + within % 4 / 2 * 2 + row / 8, half = within % 2;
  unsigned code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const Place place = code_place(bits, i, bit);
    const unsigned word = *reinterpret_cast<const unsigned*>(tile + word_offset(bits, lane, place.word));
    code |= (word >> (place.shift + 16 * half) & 1) << bit;
  }
  return code;
}

// One thread writes 32 codes of one row, which are whole words, and the scales and zeros of groups that start there.
MC_KERNEL(kRepackThreads, 1) unpack_tiles(McRepack p) {
  const int expert = p.first + blockIdx.y, index = blockIdx.x * kRepackThreads + threadIdx.x;
  const int tile_rows = p.row_tiles * kRows, block = index / tile_rows, position = index % tile_rows;
  unsigned char* record = record_of(p, expert);
  if (!record || block * 32 >= p.columns) return;
  const int row_tile = position / kRows, r = position % kRows, row = source_row(p.order, p.rows, row_tile, r);
  if (row < 0) return;
  const Descriptor d = descriptor_of(p, expert);
  const int tile = block / kBlocks, row_words = (p.columns * p.bits + 31) / 32;
  const unsigned char* in = static_cast<const unsigned char*>(p.blob) + 16ll * d.offset +
                            (static_cast<long long>(row_tile) * p.column_tiles + tile) * d.stride;
  unsigned words[8] = {};
  for (int i = 0; i < 32 && block * 32 + i < p.columns; ++i) {
    const unsigned code = tile_code(in, p.bits, r, block % kBlocks * 32 + i);
    const int bit = i * p.bits;
    words[bit / 32] |= code << bit % 32;
    if (bit % 32 + p.bits > 32) words[bit / 32 + 1] |= code >> (32 - bit % 32);
  }
  unsigned* stream = reinterpret_cast<unsigned*>(record + p.codes) + static_cast<long long>(row) * row_words;
  for (int w = 0; w < p.bits && block * p.bits + w < row_words; ++w) stream[block * p.bits + w] = words[w];
  if (block * 32 % p.group) return;
  const int group = block * 32 / p.group;
  const int from = scale_index(r, block % kBlocks * d.groups / kBlocks, d.groups);
  const long long to = static_cast<long long>(row) * p.groups + group;
  const unsigned char* scales = in + code_bytes(p.bits);
  copy_value(record + p.scales, to, scales, from, kind_bytes(p.scale_kind));
  if (p.zero_kind) copy_value(record + p.zeros, to, scales + scale_bytes(d), from, kind_bytes(p.zero_kind));
}

}  // namespace mc

#define MC_API extern "C" __attribute__((visibility("default")))

MC_API int mc_cuda_abi() { return MC_CUDA_ABI; }

MC_API int mc_cuda_pack(const McRepack* p) {
  const int warps = mc::kRepackThreads / mc::kLanes;
  const mc::Launch l{(p->row_tiles * p->column_tiles + warps - 1) / warps, p->experts, 1, mc::kRepackThreads, 0, false};
  return mc::launch(mc::pack_tiles, l, p->stream, *p);
}

MC_API int mc_cuda_unpack(const McRepack* p) {
  const int items = p->row_tiles * mc::kRows * ((p->columns + 31) / 32);
  const mc::Launch l{(items + mc::kRepackThreads - 1) / mc::kRepackThreads, p->experts, 1, mc::kRepackThreads, 0, false};
  return mc::launch(mc::unpack_tiles, l, p->stream, *p);
}

#ifdef MC_SHIM
MC_API void mc_shim_set_order(int downwards) { mc_shim_order(downwards); }
#else
// 0 when the current device can run this library's code; facts: compute capability * 10, multiprocessors, shared bytes.
MC_API int mc_cuda_device(int* facts) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&facts[1], cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&facts[2], cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  facts[0] = 10 * major + minor;
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;  // fails where the library holds no code for the device
  return cudaFuncGetAttributes(&attributes, mc::pack_tiles);
}
MC_API const char* mc_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif
