// host/mbarrier.cuh - barriers in shared memory that count arrivals and bytes (PTX ISA: mbarrier).
#pragma once

#include "host/simulator/machine_sm90.cuh"
#include "host/memory.cuh"

#define FC_HOST_SM90 1

FC_DEVICE void mbar_init(SmemPtr<uint64_t> bar, int count, FC_SITE) {
  fc_host::mbar_init(bar.ref(), count, FC_HERE);
}

// Makes the initialisations of this thread visible to the async proxy; block_sync() must follow.
FC_DEVICE void mbar_init_fence(FC_SITE) { fc_host::mbar_init_fence(FC_HERE); }

FC_DEVICE void mbar_arrive(SmemPtr<uint64_t> bar, FC_SITE) {
  fc_host::mbar_arrive(bar.ref(), FC_HERE);
}

// Arrives and announces bytes that TMA will deliver in this phase.
FC_DEVICE void mbar_arrive_expect_tx(SmemPtr<uint64_t> bar, int bytes, FC_SITE) {
  fc_host::mbar_expect_tx(bar.ref(), bytes, FC_HERE);
  fc_host::mbar_arrive(bar.ref(), FC_HERE);
}

// Returns whether the phase of this parity has completed, as far as this thread can tell now. True
// is as good as mbar_wait.
FC_DEVICE bool mbar_test(SmemPtr<uint64_t> bar, int parity, FC_SITE) {
  return fc_host::mbar_test(bar.ref(), parity, FC_HERE);
}

// Waits until the phase of this parity (0 for the first) has completed.
FC_DEVICE void mbar_wait(SmemPtr<uint64_t> bar, int parity, FC_SITE) {
  fc_host::mbar_wait(bar.ref(), parity, FC_HERE);
}
