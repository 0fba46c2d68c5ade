// host/sync.cuh - barriers that also order memory.
#pragma once

#include "host/types.cuh"

// All threads of the block; orders their shared and global accesses before and after.
FC_DEVICE void block_sync(FC_SITE) { fc_host::block_barrier(FC_HERE); }

// All lanes of the warp; orders their accesses.
FC_DEVICE void warp_sync(FC_SITE) { fc_host::warp_barrier(FC_HERE); }
