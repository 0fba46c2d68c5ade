#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace fc_host {

const size_t FIBER_STACK_BYTES = 256 * 1024;  // address space; only touched pages take memory

#if defined(__x86_64__)

// System V ABI: rbx, rbp, r12-r15 and the stack pointer belong to the caller.
asm(R"(
.text
.p2align 4
fc_host_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int SAVED_WORDS = 6;
constexpr int RETURN_WORD = 6;
constexpr int FRAME_WORDS = 8;  // the return address and one word: rsp % 16 == 8 in the entry

#elif defined(__aarch64__)

// AAPCS64: x19-x28, frame pointer, link register and d8-d15 belong to the caller.
asm(R"(
.text
.p2align 4
fc_host_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int RETURN_WORD = 11;  // x30
constexpr int FRAME_WORDS = 20;

#endif

#if FC_ASSEMBLY_SWITCH

extern "C" void fc_host_switch_stack(void** from, void* to) __asm__("fc_host_switch_stack");

void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  const auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
  auto* frame = reinterpret_cast<uintptr_t*>(top) - FRAME_WORDS;
  for (int i = 0; i < FRAME_WORDS; ++i) frame[i] = 0;
  frame[RETURN_WORD] = reinterpret_cast<uintptr_t>(entry);
  fiber.stack_pointer = frame;
}

void fiber_switch(Fiber& from, Fiber& to) {
  fc_host_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void fiber_switch(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

FiberStacks::FiberStacks(int count)
    : page_(size_t(sysconf(_SC_PAGESIZE))), bytes_(size_t(count) * (FIBER_STACK_BYTES + page_)) {
  void* memory =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  bool failed = memory == MAP_FAILED;
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count && !failed; ++i) {
    failed = mprotect((*this)[i] - page_, page_, PROT_NONE) != 0;
  }
  if (failed) {
    std::perror("flashcore simulator: no memory for fiber stacks");
    std::abort();
  }
}

FiberStacks::~FiberStacks() { munmap(memory_, bytes_); }

char* FiberStacks::operator[](int index) const {
  return memory_ + size_t(index) * (FIBER_STACK_BYTES + page_) + page_;
}

}  // namespace fc_host
