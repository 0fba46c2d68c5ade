// What every launch from C++ needs: the driver, Python's answers, and a kernel's argument.
//
// No CUDA header is needed: the driver's two functions come by address, and the two structs that
// one of them takes are declared here as launch/driver.py declares them.

#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

struct LaunchAttribute {  // CUlaunchAttribute
  uint32_t id;
  uint32_t padding;
  int32_t programmatic_stream_serialization_allowed;
  uint8_t unused[60];
};

struct LaunchConfig {  // CUlaunchConfig
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t smem_bytes;
  void* stream;
  LaunchAttribute* attributes;
  uint32_t num_attributes;
};

using LaunchKernel = int (*)(const LaunchConfig*, void*, void**, void**);
using ReplaceAddress = int (*)(void*, void*);
using IsCapturing = int (*)(void*, int*);

constexpr uint32_t kProgrammaticStreamSerialization = 6;
constexpr size_t kAlignment = 64;  // of a descriptor
constexpr size_t kMaxArgumentBytes = 4096;  // more than a kernel may have

constexpr size_t kTensorFields = 10;  // of a key, for a tensor with four dimensions

// A kernel, as a launch takes it.
struct Kernel {
  void* handle = nullptr;
  uint32_t grid = 0, num_threads = 0, smem_bytes = 0;
  bool starts_early = false;
  std::vector<uint8_t> argument;
};

// Counters of a stream, see launch/counters.py.
struct Counters {
  int64_t count = 0;
  void* address = nullptr;
};

// What `configure` was given, and what is remembered; under the GIL.
struct State {
  LaunchKernel launch_kernel = nullptr;
  ReplaceAddress replace_address = nullptr;
  PyObject* current_device = nullptr;  // () -> int
  PyObject* current_stream = nullptr;  // device index -> int
  PyObject *counters = nullptr, *clear = nullptr;  // see _counters and _clear in __init__.py
  IsCapturing is_capturing = nullptr;
  PyObject *pass_entry = nullptr, *run_pass = nullptr, *circumstances = nullptr;  // of Passes
  std::map<std::pair<int64_t, void*>, Counters> counters_of;  // by device and stream
};

State state;

// Returns whether only autograd may want to see the call: no mode, transform, tracer or autocast.
bool nobody_watches() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - c10::default_included_set).empty() &&
      (c10::default_excluded_set - local.excluded_).empty() &&
      at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

// Puts into a key what tells a tensor from others, and its address into `addresses`; false for what
// kernels do not take.
bool put_tensor(const at::Tensor& tensor, int64_t dim, uint64_t** field, uint64_t* addresses) {
  if (tensor.dim() != dim || tensor.layout() != at::kStrided || tensor.is_nested()) return false;
  for (int64_t size : tensor.sizes()) *(*field)++ = static_cast<uint64_t>(size);
  for (int64_t stride : tensor.strides()) *(*field)++ = static_cast<uint64_t>(stride);
  *(*field)++ = tensor.key_set().raw_repr();  // the kind of device, negated or not, and the like
  const auto device = static_cast<uint8_t>(tensor.device().index());
  *(*field)++ = static_cast<uint64_t>(tensor.scalar_type()) << 8 | device;
  if (!tensor.has_storage()) return false;
  const auto address = reinterpret_cast<uint64_t>(tensor.const_data_ptr());
  *addresses |= address;
  return address != 0;  // of a stand-in for a tensor, or an empty one
}

// Reads how a kernel is launched: the fields from `first` on, but for its argument.
void read_kernel(const py::tuple& fields, size_t first, Kernel* kernel) {
  kernel->grid = fields[first].cast<uint32_t>();
  kernel->num_threads = fields[first + 1].cast<uint32_t>();
  kernel->smem_bytes = fields[first + 2].cast<uint32_t>();
  kernel->starts_early = fields[first + 3].cast<bool>();
  const std::string argument = fields[first + 4].cast<py::bytes>();
  kernel->argument.assign(argument.begin(), argument.end());
}

// An int that a function of Python without side effects returns.
int64_t ask(PyObject* function, PyObject* argument) {
  PyObject* result = argument == nullptr ? PyObject_CallNoArgs(function)
                                         : PyObject_CallOneArg(function, argument);
  if (result == nullptr) throw python_error();
  const int64_t value = PyLong_AsLongLong(result);
  Py_DECREF(result);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

// Counters for launches on a stream, which is the device's current one.
void* counters_for(int64_t device, int64_t count, void* stream) {
  if (count == 0) return nullptr;
  // A stream that cannot say whether it is being captured is treated as if it were.
  int captured = 1;
  if (state.is_capturing(stream, &captured) != 0) captured = 1;
  Counters& known = state.counters_of[{device, stream}];
  if (captured == 0 && known.count >= count) return known.address;
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallFunction(
      state.counters, "LL", static_cast<long long>(device), static_cast<long long>(count)));
  if (!found) throw python_error();
  const Counters counters{count, reinterpret_cast<void*>(found.cast<uintptr_t>())};
  if (captured == 0) known = counters;
  return counters.address;
}

// Puts what `counters_for` gave back to 0, behind what was launched.
void clear_counters(int64_t device, void* counters, int64_t count) {
  const auto done = py::reinterpret_steal<py::object>(PyObject_CallFunction(
      state.clear, "LKL", static_cast<long long>(device),
      static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(counters)),
      static_cast<long long>(count)));
  if (!done) throw python_error();
}

// The device's current stream.
void* current_stream(int64_t device) {
  const auto index = py::reinterpret_steal<py::object>(PyLong_FromLongLong(device));
  return reinterpret_cast<void*>(ask(state.current_stream, index.ptr()));
}

// Launches with an argument that is complete; a launch copies it.
int enqueue(const Kernel& kernel, void* stream, void* argument) {
  LaunchAttribute early{};
  early.id = kProgrammaticStreamSerialization;
  early.programmatic_stream_serialization_allowed = 1;
  LaunchConfig config{
      {kernel.grid, 1, 1}, {kernel.num_threads, 1, 1}, kernel.smem_bytes, stream, nullptr, 0};
  if (kernel.starts_early) {
    config.attributes = &early;
    config.num_attributes = 1;
  }
  void* arguments[] = {argument};
  return state.launch_kernel(&config, kernel.handle, arguments, nullptr);
}

}  // namespace
