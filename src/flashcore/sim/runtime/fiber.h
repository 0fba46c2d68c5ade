// fiber.h - a stack and a saved position for each simulated thread. A switch saves the registers
// that a function call must preserve and takes about as long as one (x86-64: under 10 ns).
#pragma once

#include <cstddef>

#if defined(__x86_64__) || defined(__aarch64__)
#define FC_ASSEMBLY_SWITCH 1
#else
#define FC_ASSEMBLY_SWITCH 0
#include <ucontext.h>
#endif

namespace fc_host {

struct Fiber {
#if FC_ASSEMBLY_SWITCH
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

// Makes `fiber` start `entry`, which must not return, on the given stack when first switched to.
void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)());
void fiber_switch(Fiber& from, Fiber& to);

extern const size_t FIBER_STACK_BYTES;

// The stacks of one run, each with an inaccessible page below it. They last no longer than the run,
// for each is two mappings of which a process has 65,530, and every loaded kernel has its own
// runtime.
class FiberStacks {
 public:
  explicit FiberStacks(int count);
  ~FiberStacks();
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;
  char* operator[](int index) const;

 private:
  size_t page_, bytes_;
  char* memory_;
};

}  // namespace fc_host
