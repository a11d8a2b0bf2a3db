// Few tokens: a pair of kernels that read every weight of the chosen experts once for up to eight tokens.
//
// The first gives a block to (16 output channels, an expert): gate and up are neighbours, so the activation needs no
// second pass. The second gives a block to 16 output rows and walks through all experts of the tokens, so the sum over
// experts stays in registers. No sort, no atomics, no host: results do not depend on timing, and a graph can hold it.
#include "cuda_decode.cuh"

namespace mc {

constexpr int kUpWarps = 8, kDownWarps = 16, kMaxSlots = 32;

struct UpParams {
  McMoe moe;
  int stages, group;
};

MC_DEVICE long long id_at(const void* ids, long long i) { return static_cast<const long long*>(ids)[i]; }

// blockIdx: (row tile, or pair of them; slot among the tokens of the group; group of eight tokens).
template <class T, int kTiles>
MC_KERNEL(32 * kUpWarps, 3) decode_up(UpParams p) {
  allow_next();
  MC_SHARED(shared);
  const McMoe& moe = p.moe;
  const McMatrix& m = moe.up;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int first = blockIdx.z * p.group, tokens = smaller(p.group, moe.tokens - first);
  const int slot = blockIdx.y, slots = tokens * moe.slots;
  if (slot >= slots) return;
  const long long base = static_cast<long long>(first) * moe.slots;
  const long long expert = id_at(moe.ids, base + slot);
  if (expert < 0 || expert >= m.experts) return;
  bool seen = false;  // an earlier slot of the group has this expert: its block does the work
  for (int i = threadIdx.x; i < slot; i += 32 * kUpWarps) seen |= id_at(moe.ids, base + i) == expert;
  if (block_any(seen)) return;

  const Descriptor d = static_cast<const Descriptor*>(m.table)[expert * m.matrices + m.which];
  const int pitch = m.max_stride, slot_bytes = kTiles * pitch + tokens * kRowBytes, row_tile = blockIdx.x * kTiles;
  unsigned char* ring = shared + warp * p.stages * slot_bytes;
  const int begin = warp * m.column_tiles / kUpWarps, end = (warp + 1) * m.column_tiles / kUpWarps;
  const auto stage = [&](int slot, int tile) {
    unsigned char* to = ring + slot * slot_bytes;
    if (tile < end) {
      stage_tiles<kTiles>(to, pitch, m, d, row_tile, tile, lane);
      stage_rows(to + kTiles * pitch, moe.hidden, m.columns, tile, tokens, lane, [&](int token) { return first + token; });
    }
    copy_commit();
  };
  for (int i = 0; i < p.stages - 1; ++i) stage(i, begin + i);
  float total[kTiles][4] = {};
  int filled = p.stages - 1, used = 0;
  for (int tile = begin; tile < end; ++tile) {
    stage(filled, tile + p.stages - 1);  // into the slot that the warp left at the end of the last turn
    filled = filled + 1 == p.stages ? 0 : filled + 1;
    wait_for_stage(p.stages);
    warp_sync();
    multiply_any<T, kTiles>(ring + used * slot_bytes, pitch, d, tokens, lane, 1.0f, 1.0f, total);
    used = used + 1 == p.stages ? 0 : used + 1;
    warp_sync();
  }
  copy_wait<0>();
  block_sync();  // the rings are free
  float* parts = reinterpret_cast<float*>(shared);
  write_parts<kTiles>(parts, warp, lane, total);
  block_sync();
  const int width = moe.down.columns, channel = blockIdx.x * kRows + threadIdx.x % kRows, column = threadIdx.x / kRows;
  if (column >= tokens || channel >= width) return;
  const int e = static_cast<int>(expert), r = threadIdx.x % kRows;
  const float gate = reduced<kUpWarps, kTiles>(parts, 0, r, column) + bias_of(m, moe.activation, e, channel, 0);
  float up = 0.0f;
  if constexpr (kTiles == 2) up = reduced<kUpWarps, 2>(parts, 1, r, column) + bias_of(m, moe.activation, e, channel, 1);
  const float value = activate(moe.activation, gate, up);
  for (int i = 0; i < moe.slots; ++i) {
    const long long at = base + column * moe.slots + i;
    if (id_at(moe.ids, at) == expert) store_value<T>(moe.middle, at * width + channel, value);
  }
}

struct DownParams {
  McMatrix matrix;
  const void* rows;     // [tokens * slots, columns], dtype
  const void* ids;      // null: one expert, one slot, weight 1 (a Linear)
  const void* weights;  // float32 [tokens, slots]
  void* out;            // [tokens, rows]
  int tokens, slots, stages, group;
};

// The experts of eight tokens, each once: in shared memory after the parts of a block.
struct Chosen {
  int* number;            // [1]
  int* expert;            // [n]
  Descriptor* described;  // [n]
  int* row;               // [n, 8]: the row of the token's input, -1 for none
  float* weight;          // [n, 8]: sum of its routing weights
  int* first;             // [n] slots: 1 where a slot is the first of its expert
};

MC_BOTH int chosen_bytes(int slots) { return (16 + slots * (4 + 32 + 32 + 32 + 4) + 127) / 128 * 128; }

MC_DEVICE Chosen chosen_at(unsigned char* at, int slots) {
  Chosen c;
  c.described = reinterpret_cast<Descriptor*>(at);
  c.row = reinterpret_cast<int*>(at + 32 * slots);
  c.weight = reinterpret_cast<float*>(at + 64 * slots);
  c.expert = reinterpret_cast<int*>(at + 96 * slots);
  c.first = reinterpret_cast<int*>(at + 100 * slots);
  c.number = reinterpret_cast<int*>(at + 104 * slots);
  return c;
}

MC_DEVICE void find_chosen(const DownParams& p, const Chosen& c, int first, int tokens) {
  const int slots = tokens * p.slots, threads = 32 * kDownWarps, thread = threadIdx.x;
  const long long base = static_cast<long long>(first) * p.slots;
  const Descriptor* table = static_cast<const Descriptor*>(p.matrix.table);
  if (thread == 0) *c.number = 0;
  for (int i = thread; i < slots; i += threads) {
    const long long expert = p.ids ? id_at(p.ids, base + i) : 0;
    bool leads = expert >= 0 && expert < p.matrix.experts;
    for (int j = 0; j < i && leads; ++j) leads = (p.ids ? id_at(p.ids, base + j) : 0) != expert;
    c.first[i] = leads;
  }
  block_sync();
  for (int i = thread; i < slots; i += threads) {
    if (!c.first[i]) continue;
    int at = 0;
    for (int j = 0; j < i; ++j) at += c.first[j];
    const long long expert = p.ids ? id_at(p.ids, base + i) : 0;
    c.expert[at] = static_cast<int>(expert);
    c.described[at] = table[expert * p.matrix.matrices + p.matrix.which];
    add_shared(c.number, 1);
  }
  block_sync();
  for (int i = thread; i < *c.number * kTokens; i += threads) {
    const int token = i % kTokens;
    int row = -1;
    float weight = 0.0f;
    for (int j = 0; j < p.slots && token < tokens; ++j) {
      const long long at = base + token * p.slots + j;
      if (p.ids && id_at(p.ids, at) != c.expert[i / kTokens]) continue;
      row = static_cast<int>(at);
      weight += p.weights ? static_cast<const float*>(p.weights)[at] : 1.0f;
    }
    c.row[i] = row;
    c.weight[i] = weight;
  }
  block_sync();
}

// blockIdx: (row tile, group of eight tokens). Units of work are (expert, column tile), dealt to warps in runs.
template <class T>
MC_KERNEL(32 * kDownWarps, 2) decode_down(DownParams p) {
  MC_SHARED(shared);
  const McMatrix& m = p.matrix;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int first = blockIdx.y * p.group, tokens = smaller(p.group, p.tokens - first);
  const Chosen c = chosen_at(shared, p.group * p.slots);
  find_chosen(p, c, first, tokens);  // reads what was there before the kernel in front of this one

  unsigned char* rest = shared + chosen_bytes(p.group * p.slots);
  const int pitch = m.max_stride, slot_bytes = pitch + tokens * kRowBytes, units = *c.number * m.column_tiles;
  unsigned char* ring = rest + warp * p.stages * slot_bytes;
  const int begin = static_cast<int>(static_cast<long long>(warp) * units / kDownWarps);
  const int end = static_cast<int>(static_cast<long long>(warp + 1) * units / kDownWarps);
  const auto stage_weights = [&](int slot, int unit) {
    if (unit >= end) return;
    const Descriptor& d = c.described[unit / m.column_tiles];
    stage_tiles<1>(ring + slot * slot_bytes, pitch, m, d, blockIdx.x, unit % m.column_tiles, lane);
  };
  const auto stage_inputs = [&](int slot, int unit) {
    if (unit >= end) return;
    const int* rows = c.row + unit / m.column_tiles * kTokens;
    stage_rows(ring + slot * slot_bytes + pitch, p.rows, m.columns, unit % m.column_tiles, tokens, lane,
               [&](int token) { return rows[token]; });
  };
  for (int i = 0; i < p.stages - 1; ++i) {
    stage_weights(i, begin + i);
    copy_commit();
  }
  wait_previous();  // from here on: what that kernel wrote
  for (int i = 0; i < p.stages - 1; ++i) stage_inputs(i, begin + i);
  copy_commit();
  float total[1][4] = {};
  int filled = p.stages - 1, used = 0;
  for (int unit = begin; unit < end; ++unit) {
    stage_weights(filled, unit + p.stages - 1);
    stage_inputs(filled, unit + p.stages - 1);
    copy_commit();
    filled = filled + 1 == p.stages ? 0 : filled + 1;
    if (unit == begin) {
      copy_wait<1>();  // the first inputs are the last group but one
    } else {
      wait_for_stage(p.stages);
    }
    warp_sync();
    const int chosen = unit / m.column_tiles;
    const float* weight = c.weight + chosen * kTokens + 2 * (lane % 4);
    multiply_any<T, 1>(ring + used * slot_bytes, pitch, c.described[chosen], tokens, lane, weight[0], weight[1], total);
    used = used + 1 == p.stages ? 0 : used + 1;
    warp_sync();
  }
  copy_wait<0>();
  block_sync();
  float* parts = reinterpret_cast<float*>(rest);
  write_parts<1>(parts, warp, lane, total);
  block_sync();
  const int row = blockIdx.x * kRows + threadIdx.x % kRows, column = threadIdx.x / kRows;
  if (column >= tokens || row >= m.rows) return;
  float sum = reduced<kDownWarps, 1>(parts, 0, threadIdx.x % kRows, column);
  for (int i = 0; m.bias && i < *c.number; ++i)
    if (c.row[i * kTokens + column] >= 0)
      sum += c.weight[i * kTokens + column] *
             load_value(m.bias, m.bias_dtype, static_cast<long long>(c.expert[i]) * m.rows + row);
  store_value<T>(p.out, static_cast<long long>(first + column) * m.rows + row, sum);
}

// How a kernel cuts its work: tokens a block has, stages of its rings, shared memory.
struct Cut {
  int group, stages, shared;
};

// The largest group of tokens that fits with two stages, then as many stages (to 4) as leave room for `blocks` blocks on
// a multiprocessor. tiles: bytes of the tiles of a slot of the ring; slots: of a token, 0 where no table is kept of them;
// parts: bytes of the warps' sums.
inline Cut cut_for(int tokens, int warps, int tiles, int slots, int parts, int room, int blocks) {
  Cut c{smaller(kTokens, tokens), 4, 0};
  const auto needed = [&](int group, int stages) {
    const int ring = stages * warps * (tiles + group * kRowBytes), fixed = slots ? chosen_bytes(group * slots) : 0;
    return fixed + (ring > parts ? ring : parts);
  };
  while (c.group > 1 && needed(c.group, 2) > room) c.group = (c.group + 1) / 2;
  while (c.stages > 2 && blocks * needed(c.group, c.stages) > room) --c.stages;
  c.shared = needed(c.group, c.stages);
  return c;
}

inline Cut up_cut(int tokens, int tiles, int stride, int room) {
  return cut_for(tokens, kUpWarps, tiles * stride, 0, kUpWarps * tiles * 4 * kLanes * 4, room, 3);
}

inline Cut down_cut(int tokens, int slots, int stride, int room) {
  return cut_for(tokens, kDownWarps, stride, slots, kDownWarps * 4 * kLanes * 4, room, 2);
}

template <class T>
static int run_up(const McMoe& moe, int room) {
  const int tiles = moe.activation.gated ? 2 : 1;
  const Cut c = up_cut(moe.tokens, tiles, moe.up.max_stride, room);
  const UpParams p{moe, c.stages, c.group};
  const int groups = (moe.tokens + c.group - 1) / c.group;
  const Launch l{moe.up.row_tiles / tiles, c.group * moe.slots, groups, 32 * kUpWarps, c.shared, false};
  return tiles == 2 ? launch(decode_up<T, 2>, l, moe.stream, p) : launch(decode_up<T, 1>, l, moe.stream, p);
}

template <class T>
static int run_down(DownParams p, void* stream, int room, bool overlap) {
  const Cut c = down_cut(p.tokens, p.slots, p.matrix.max_stride, room);
  p.stages = c.stages;
  p.group = c.group;
  const int groups = (p.tokens + c.group - 1) / c.group;
  return launch(decode_down<T>, Launch{p.matrix.row_tiles, groups, 1, 32 * kDownWarps, c.shared, overlap}, stream, p);
}

}  // namespace mc

#define MC_API extern "C" __attribute__((visibility("default")))

// room: bytes of shared memory a block may have. overlap: the second kernel may start early (compute capability 9).
MC_API int mc_cuda_decode(const McMoe* moe, int room, int overlap) {
  if (moe->slots > mc::kMaxSlots) return -1;
  const mc::DownParams down{moe->down, moe->middle, moe->ids, moe->weights, moe->out, moe->tokens, moe->slots, 0, 0};
  const bool bf16 = moe->dtype == MC_BF16;
  const int error = bf16 ? mc::run_up<mc::Bf16>(*moe, room) : mc::run_up<mc::Fp16>(*moe, room);
  if (error) return error;
  return bf16 ? mc::run_down<mc::Bf16>(down, moe->stream, room, overlap)
              : mc::run_down<mc::Fp16>(down, moe->stream, room, overlap);
}

MC_API int mc_cuda_linear_decode(const McLinear* p, int room) {
  const mc::DownParams down{p->matrix, p->inputs, nullptr, nullptr, p->out, p->tokens, 1, 0, 0};
  return p->dtype == MC_BF16 ? mc::run_down<mc::Bf16>(down, p->stream, room, false)
                             : mc::run_down<mc::Fp16>(down, p->stream, room, false);
}

// Shared memory that decoding needs at least, for the largest tile strides of a pair (up 0: a Linear).
MC_API int mc_cuda_decode_room(int up_stride, int down_stride) {
  const int up = mc::up_cut(1, 2, up_stride, 0).shared, down = mc::down_cut(1, mc::kMaxSlots, down_stride, 0).shared;
  return up > down ? up : down;
}
