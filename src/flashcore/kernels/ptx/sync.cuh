// ptx/sync.cuh - barriers that also order memory.
#pragma once

// All threads of the block; orders their shared and global accesses before and after.
FC_DEVICE void block_sync() { __syncthreads(); }

// All lanes of the warp; orders their accesses.
FC_DEVICE void warp_sync() { __syncwarp(); }
