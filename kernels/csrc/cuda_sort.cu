// Sorting slots by expert without the host: count per chunk, place experts, scatter. The order inside an expert is that
// of the slots, so the result is the same every time.
#include "cuda_sort.cuh"

namespace mc {

MC_DEVICE int expert_at(const McMoe& moe, int slot, int slots, int experts) {
  if (slot >= slots) return -1;
  const long long id = static_cast<const long long*>(moe.ids)[slot];
  return id >= 0 && id < experts ? static_cast<int>(id) : -1;
}

MC_KERNEL(kSortThreads, 1) count_experts(McMoe moe) {
  MC_SHARED(shared);
  int* counts = reinterpret_cast<int*>(shared);
  const Sorted s(moe);
  for (int e = threadIdx.x; e < s.experts; e += kSortThreads) counts[e] = 0;
  block_sync();
  const int expert = expert_at(moe, blockIdx.x * kSortThreads + threadIdx.x, s.slots, s.experts);
  if (expert >= 0) add_shared(&counts[expert], 1);
  block_sync();
  for (int e = threadIdx.x; e < s.experts; e += kSortThreads) s.starts[blockIdx.x * s.experts + e] = counts[e];
}

// One block. A thread has one expert of each run of kSortThreads.
MC_KERNEL(kSortThreads, 1) place_experts(McMoe moe) {
  MC_SHARED(shared);
  int* sums = reinterpret_cast<int*>(shared);
  const Sorted s(moe);
  int before = 0;  // blocks of experts of earlier runs
  for (int run = 0; run < s.experts; run += kSortThreads) {
    const int e = run + threadIdx.x;
    int total = 0;
    for (int chunk = 0; e < s.experts && chunk < s.chunks; ++chunk) {
      const int count = s.starts[chunk * s.experts + e];
      s.starts[chunk * s.experts + e] = total;
      total += count;
    }
    const int mine = (total + s.block - 1) / s.block;
    sums[threadIdx.x] = mine;
    for (int step = 1; step < kSortThreads; step *= 2) {
      block_sync();
      const int left = static_cast<int>(threadIdx.x) >= step ? sums[threadIdx.x - step] : 0;
      block_sync();
      sums[threadIdx.x] += left;
    }
    block_sync();
    const int first = before + sums[threadIdx.x] - mine;
    before += sums[kSortThreads - 1];
    block_sync();
    if (e >= s.experts) continue;
    s.starts[s.chunks * s.experts + e] = first * s.block;
    for (int i = 0; i < mine; ++i) s.block_expert[first + i] = e;
    for (int i = total; i < mine * s.block; ++i) s.order[static_cast<long long>(first) * s.block + i] = s.slots;
  }
  if (threadIdx.x == 0) *s.blocks = before;
}

MC_KERNEL(kSortThreads, 1) scatter_slots(McMoe moe) {
  MC_SHARED(shared);
  int* next = reinterpret_cast<int*>(shared);
  const Sorted s(moe);
  for (int e = threadIdx.x; e < s.experts; e += kSortThreads)
    next[e] = s.starts[s.chunks * s.experts + e] + s.starts[blockIdx.x * s.experts + e];
  const int slot = blockIdx.x * kSortThreads + threadIdx.x, expert = expert_at(moe, slot, s.slots, s.experts);
  const unsigned same = same_value(expert), lane = threadIdx.x % kLanes;
  for (int warp = 0; warp < kSortThreads / kLanes; ++warp) {  // in turn: slots keep their order
    block_sync();
    const bool turn = warp == static_cast<int>(threadIdx.x) / kLanes && expert >= 0;
    const int at = turn ? next[expert] : 0, rank = count_bits(same & ((1u << lane) - 1));
    warp_sync();
    if (turn && rank == 0) next[expert] = at + count_bits(same);
    if (turn) s.order[at + rank] = slot;
  }
}

int sort_slots(const McMoe& moe) {
  const Sorted s(moe);
  const int bytes = s.experts * 4;
  int error = launch(count_experts, Launch{s.chunks, 1, 1, kSortThreads, bytes, false}, moe.stream, moe);
  if (!error) error = launch(place_experts, Launch{1, 1, 1, kSortThreads, kSortThreads * 4, false}, moe.stream, moe);
  if (!error) error = launch(scatter_slots, Launch{s.chunks, 1, 1, kSortThreads, bytes, false}, moe.stream, moe);
  return error;
}

}  // namespace mc

#define MC_API extern "C" __attribute__((visibility("default")))

// 32-bit words that `sorted` must hold.
MC_API long long mc_cuda_sort_words(const McMoe* moe) { return mc::Sorted(*moe).ints(); }

// Sorting alone, for tests. The layout of the workspace is that of `Sorted`.
MC_API int mc_cuda_sort(const McMoe* moe) { return mc::sort_slots(*moe); }
