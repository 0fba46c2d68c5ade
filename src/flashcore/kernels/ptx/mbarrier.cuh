// ptx/mbarrier.cuh - barriers in shared memory that count arrivals and bytes (PTX ISA: mbarrier).
#pragma once

FC_DEVICE void mbar_init(SmemPtr<uint64_t> bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar.address), "r"(count) : "memory");
}

// Makes the initialisations of this thread visible to the async proxy; block_sync() must follow.
FC_DEVICE void mbar_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

FC_DEVICE void mbar_arrive(SmemPtr<uint64_t> bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar.address) : "memory");
}

// Arrives and announces bytes that TMA will deliver in this phase.
FC_DEVICE void mbar_arrive_expect_tx(SmemPtr<uint64_t> bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar.address),
               "r"(bytes)
               : "memory");
}

// Returns whether the phase of this parity has completed, as far as this thread can tell now. True
// is as good as mbar_wait.
FC_DEVICE bool mbar_test(SmemPtr<uint64_t> bar, int parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(bar.address), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits until the phase of this parity (0 for the first) has completed. The thread
// may sleep for 10 ms at a time; without that hint it asks again and again.
FC_DEVICE void mbar_wait(SmemPtr<uint64_t> bar, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 10000000;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(bar.address),
      "r"(parity)
      : "memory");
}
