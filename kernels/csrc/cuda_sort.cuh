// Slots sorted by expert on the device, each expert's run padded to whole blocks: what the prefill kernel walks over.
#pragma once

#include "cuda_args.cuh"
#include "cuda_layout.cuh"

namespace mc {

constexpr int kSortThreads = 1024;

// The workspace, in ints: chunks of kSortThreads slots; an upper bound of blocks that needs no look at the ids.
struct Sorted {
  int chunks, max_blocks, block, slots, experts;
  int* starts;         // [chunks + 1, experts]: slots of an expert in front of a chunk; last row: its first position
  int* order;          // [max_blocks * block]: slot at a position, `slots` for padding
  int* block_expert;   // [max_blocks]
  int* blocks;         // [1]

  MC_BOTH Sorted(const McMoe& moe)
      : block(moe.block), slots(moe.tokens * moe.slots), experts(moe.up.experts) {
    chunks = (slots + kSortThreads - 1) / kSortThreads;
    const int bound = slots / block + (experts < slots ? experts : slots);
    max_blocks = bound < slots ? bound : slots;
    starts = static_cast<int*>(moe.sorted);
    order = starts + (chunks + 1) * experts;
    block_expert = order + static_cast<long long>(max_blocks) * block;
    blocks = block_expert + max_blocks;
  }
  MC_BOTH long long ints() const { return blocks + 1 - starts; }
};

// Counts, places and scatters; three kernels. Returns a CUDA error code.
int sort_slots(const McMoe& moe);

}  // namespace mc
