// The prepared backward pass of a call in C++: the way of gradient_calls.find_pass and
// launch.BackwardPass. Python says once what the kernels of such tensors are.

#pragma once

#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cstring>
#include <deque>
#include <memory>

#include "launching.h"

namespace {

// All that a backward pass of a call depends on besides: q, k, v, out, lse and the gradient of out.
// A saved tensor need not come back as it was: hooks may have kept it elsewhere.
constexpr size_t kPassTensors = 6, kLse = 4;
constexpr size_t kPassKeyFields = kPassTensors * kTensorFields - 2 + 1;  // lse has 3 dimensions
using PassKey = std::array<uint64_t, kPassKeyFields>;

// A kernel of a backward pass; see KernelEntry in types.py.
struct PassKernel : Kernel {
  std::vector<std::array<int64_t, 2>> pointers;
  std::vector<std::array<int64_t, 3>> maps;
  std::vector<std::array<int64_t, 2>> counters;
};

// A prepared backward pass; see PassEntry in types.py. It never changes once it is made.
struct Pass {
  struct Made {
    std::vector<int64_t> shape, strides;
    int kind;  // of element: that of q, float32 or int32
  };
  int64_t device = 0;
  std::vector<PassKernel> kernels;
  std::vector<Made> made;
  std::array<size_t, 3> gradients{};
  int64_t num_counters = 0;
};

// What found a call, a Python object, and its backward passes, the latest first; autograd's nodes
// and entries share it, whichever thread lets go of it last.
struct Known : torch::CustomClassHolder {
  explicit Known(const py::handle& object) : found(object.inc_ref().ptr()) {}
  ~Known() override {
    if (!Py_IsInitialized()) return;  // the process ends
    const py::gil_scoped_acquire acquired;
    Py_DECREF(found);
  }
  PyObject* const found;
  std::deque<std::pair<PassKey, std::shared_ptr<const Pass>>> passes;  // under the GIL
};
constexpr size_t kMaxPasses = 16;  // of one call

using PassTensors = std::array<at::Tensor, kPassTensors>;  // q, k, v, out, lse and dout

// What a function of Python returns, given what found a call and the tensors of its backward pass.
py::object ask_of_pass(PyObject* function, const Known& known, const PassTensors& tensors) {
  std::array<py::object, kPassTensors> wrapped;
  std::array<PyObject*, kPassTensors + 1> arguments = {known.found};
  for (size_t i = 0; i < tensors.size(); ++i) {
    wrapped[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[i]));
    arguments[i + 1] = wrapped[i].ptr();
  }
  PyObject* result = PyObject_Vectorcall(function, arguments.data(), arguments.size(), nullptr);
  if (result == nullptr) {
    python_error error;
    error.persist();
    throw error;
  }
  return py::reinterpret_steal<py::object>(result);
}

// Reads what `pass_entry` returns; throws where it is not what PassEntry says. Nothing if the
// operator has to compute.
std::shared_ptr<const Pass> read_pass(const py::tuple& fields) {
  auto pass = std::make_shared<Pass>();
  pass->device = fields[0].cast<int64_t>();
  for (const py::handle item : fields[1].cast<py::tuple>()) {
    const auto of_kernel = py::reinterpret_borrow<py::tuple>(item);
    PassKernel kernel;
    kernel.handle = reinterpret_cast<void*>(of_kernel[0].cast<uintptr_t>());
    read_kernel(of_kernel, 1, &kernel);
    kernel.pointers = of_kernel[6].cast<decltype(kernel.pointers)>();
    kernel.maps = of_kernel[7].cast<decltype(kernel.maps)>();
    kernel.counters = of_kernel[8].cast<decltype(kernel.counters)>();
    if (kernel.argument.size() > kMaxArgumentBytes) return nullptr;
    pass->kernels.push_back(std::move(kernel));
  }
  for (const py::handle item : fields[2].cast<py::tuple>()) {
    const auto made = py::reinterpret_borrow<py::tuple>(item);
    pass->made.push_back(
        {made[0].cast<std::vector<int64_t>>(), made[1].cast<std::vector<int64_t>>(),
         made[2].cast<int>()});
  }
  pass->gradients = fields[3].cast<std::array<size_t, 3>>();
  pass->num_counters = fields[4].cast<int64_t>();
  return pass;
}

// Fills the key; false for tensors that Python has to look at.
bool make_pass_key(const PassTensors& tensors, PassKey* key) {
  uint64_t* field = key->data();
  uint64_t addresses = 0, of_lse = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool is_lse = i == kLse;
    if (tensors[i]._fw_grad(0).defined() ||
        !put_tensor(tensors[i], is_lse ? 3 : 4, &field, is_lse ? &of_lse : &addresses)) {
      return false;
    }
  }
  *field++ = (addresses & 15) | uint64_t(ask(state.circumstances, nullptr)) << 4;
  TORCH_INTERNAL_ASSERT(field == key->data() + kPassKeyFields);
  return true;
}

// The pass for such tensors, prepared by Python if it is not known; nothing where the operator has
// to compute them.
std::shared_ptr<const Pass> pass_for(
    Known& known, const PassKey& key, const PassTensors& tensors) {
  for (const auto& [of, pass] : known.passes) {
    if (of == key) return pass;
  }
  const py::object fields = ask_of_pass(state.pass_entry, known, tensors);
  if (fields.is_none()) return nullptr;  // which Python remembers
  auto pass = read_pass(fields.cast<py::tuple>());
  if (pass == nullptr) return nullptr;
  if (known.passes.size() >= kMaxPasses) known.passes.pop_back();
  known.passes.emplace_front(key, pass);
  return pass;
}

// Allocates and launches; returns dq, dk and dv, or nothing where a launch fails, and how many
// kernels it `launched`.
torch::autograd::variable_list launch_pass(
    const Pass& pass, void* stream, void* counters, const PassTensors& tensors, int* launched) {
  std::vector<at::Tensor> made;
  std::vector<uint64_t> addresses;
  for (const at::Tensor& x : tensors) {
    addresses.push_back(reinterpret_cast<uint64_t>(x.const_data_ptr()));
  }
  const auto options = tensors[0].options();
  const std::array kinds = {options, options.dtype(at::kFloat), options.dtype(at::kInt)};
  for (const Pass::Made& like : pass.made) {
    made.push_back(at::empty_strided(like.shape, like.strides, kinds.at(size_t(like.kind))));
    addresses.push_back(reinterpret_cast<uint64_t>(made.back().mutable_data_ptr()));
  }
  for (const PassKernel& kernel : pass.kernels) {
    alignas(kAlignment) uint8_t argument[kMaxArgumentBytes];
    std::memcpy(argument, kernel.argument.data(), kernel.argument.size());
    for (const auto& [offset, place] : kernel.pointers) {
      std::memcpy(argument + offset, &addresses[place], sizeof(uint64_t));
    }
    for (const auto& [offset, bytes_behind] : kernel.counters) {
      const uint64_t address = reinterpret_cast<uint64_t>(counters) + uint64_t(bytes_behind);
      std::memcpy(argument + offset, &address, sizeof(address));
    }
    for (const auto& [offset, place, shift] : kernel.maps) {
      void* const base = reinterpret_cast<void*>(addresses[place] - static_cast<uint64_t>(shift));
      if (state.replace_address(argument + offset, base) != 0) return {};
    }
    if (enqueue(kernel, stream, argument) != 0) return {};
    ++*launched;
  }
  const auto& [dq, dk, dv] = pass.gradients;
  return {made[dq], made[dk], made[dv]};
}

// Returns dq, dk and dv by what was prepared; nothing where the operator has to compute them.
torch::autograd::variable_list prepared_gradients(Known& known, const PassTensors& tensors) {
  PassKey key;
  std::shared_ptr<const Pass> pass;
  void *stream = nullptr, *counters = nullptr;
  const bool is_seen = !nobody_watches();
  {
    const py::gil_scoped_acquire acquired;
    if (!is_seen && make_pass_key(tensors, &key)) {
      pass = pass_for(known, key, tensors);
      if (pass == nullptr || ask(state.current_device, nullptr) != pass->device) return {};
      stream = current_stream(pass->device);
      counters = counters_for(pass->device, pass->num_counters, stream);
    }
  }
  int launched = 0;
  if (pass != nullptr) {
    auto gradients = launch_pass(*pass, stream, counters, tensors, &launched);
    if (!gradients.empty()) return gradients;
  }
  // Python tries again, after binding a context perhaps, or says what is wrong.
  const py::gil_scoped_acquire acquired;
  // The kernels that are missing would have set counters back to 0.
  if (launched > 0 && counters != nullptr) {
    clear_counters(pass->device, counters, pass->num_counters);
  }
  const py::object result = ask_of_pass(state.run_pass, known, tensors);
  if (result.is_none()) return {};
  torch::autograd::variable_list gradients;
  for (const py::handle x : result.cast<py::tuple>()) {
    gradients.push_back(THPVariable_Unpack(x.ptr()));
  }
  return gradients;
}

}  // namespace
