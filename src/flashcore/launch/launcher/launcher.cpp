// An eager call of attention in C++: the way of calls.attend and launch.KernelCall.run, and that of
// gradient_calls.find_pass and launch.BackwardPass back, without the interpreter. It serves the
// common call; whatever is unusual is left to Python.
//
// No CUDA header is needed: the driver's two functions come by address, and the two structs that
// one of them takes are declared here as launch/driver.py declares them.

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
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
constexpr size_t kMaps = 4;  // q, k, v, out

// All that a call depends on besides addresses and values.
constexpr size_t kTensorFields = 10;  // of one with four dimensions
constexpr size_t kKeyFields = 3 * kTensorFields + 5;
using Key = std::array<uint64_t, kKeyFields>;

// All that a backward pass of a call depends on besides: q, k, v, out, lse and the gradient of out.
// A saved tensor need not come back as it was: hooks may have kept it elsewhere.
constexpr size_t kPassTensors = 6, kLse = 4;
constexpr size_t kPassKeyFields = kPassTensors * kTensorFields - 2 + 1;  // lse has 3 dimensions
using PassKey = std::array<uint64_t, kPassKeyFields>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (uint64_t field : key) {
      hash = (hash ^ field) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// A kernel, as a launch takes it.
struct Kernel {
  void* handle = nullptr;
  uint32_t grid = 0, num_threads = 0, smem_bytes = 0;
  bool starts_early = false;
  std::vector<uint8_t> argument;
};

// A kernel of a backward pass; see KernelEntry in types.py.
struct PassKernel : Kernel {
  std::vector<std::array<int64_t, 2>> pointers;
  std::vector<std::array<int64_t, 3>> maps;
  int64_t counter_offset = -1;
};

// A prepared backward pass; see PassEntry in types.py. It never changes once it is made.
struct Pass {
  struct Made {
    std::vector<int64_t> shape, strides;
    bool is_float32;
  };
  int64_t device = 0;
  std::vector<PassKernel> kernels;
  std::vector<Made> made;
  std::array<size_t, 3> gradients{};
  bool draws_tiles = false;
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

// The decision for a key; see Entry in __init__.py. It never changes once it is made.
struct Entry : Kernel {
  bool served = false;  // false: Python serves such calls
  int64_t device = 0;
  size_t attn_offset = 0;
  std::vector<size_t> map_offsets;
  std::array<int64_t, 4> out_shape{};
  bool computes_lse = false;
  c10::IValue options;  // validated: the tuple that the operators take, see problem/options.py
  c10::IValue known;  // a Known
  int64_t num_counters = 0, num_shares = 0, num_floats = 0;
  std::array<size_t, 3> scratch_offsets{};
};

// Counters of a stream, see launch/counters.py.
struct Counters {
  int64_t count = 0;
  void* address = nullptr;
};

struct State {
  LaunchKernel launch_kernel = nullptr;
  ReplaceAddress replace_address = nullptr;
  PyObject* current_device = nullptr;  // () -> int
  PyObject* current_stream = nullptr;  // device index -> int
  PyObject* counters = nullptr;  // see _counters in __init__.py
  IsCapturing is_capturing = nullptr;
  PyObject* prepare = nullptr;  // see _prepare in __init__.py
  PyObject *pass_entry = nullptr, *run_pass = nullptr, *may_differ = nullptr;  // see Passes there
  PyObject* backends = nullptr;  // tuple of interned names
  size_t max_entries = 0;
  std::unordered_map<Key, std::shared_ptr<const Entry>, KeyHash> entries;
  std::deque<Key> order;
  std::map<std::pair<int64_t, void*>, Counters> counters_of;  // by device and stream
  uint64_t num_served = 0;
};

State state;  // under the GIL

enum Argument {
  Q, K, V, MASK, CAUSAL, WINDOW, SOFTCAP, SCALE, SEQLENS_K, RETURN_LSE, BACKEND, COUNT
};

// Returns whether only autograd may want to see the call: no mode, transform, tracer or autocast.
bool nobody_watches() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - c10::default_included_set).empty() &&
      (c10::default_excluded_set - local.excluded_).empty() &&
      at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

bool is_plain_tensor(PyObject* object) {
  return THPVariable_CheckTypeExact(Py_TYPE(object));
}

// A factor as bits; false for what is neither None nor a float.
bool factor_bits(PyObject* object, uint64_t* present, uint64_t* bits) {
  *present = object != Py_None;
  *bits = 0;
  if (!*present) return true;
  if (!PyFloat_CheckExact(object)) return false;
  const double value = PyFloat_AS_DOUBLE(object);
  std::memcpy(bits, &value, sizeof(value));
  return true;
}

// False for what is neither None nor a pair of small ints.
bool window_sides(PyObject* object, uint64_t* present, uint64_t* left, uint64_t* right) {
  *present = object != Py_None;
  *left = *right = 0;
  if (!*present) return true;
  if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) != 2) return false;
  uint64_t* sides[2] = {left, right};
  for (int i = 0; i < 2; ++i) {
    PyObject* side = PyTuple_GET_ITEM(object, i);
    if (!PyLong_CheckExact(side)) return false;
    int overflow = 0;
    *sides[i] = static_cast<uint64_t>(PyLong_AsLongLongAndOverflow(side, &overflow));
    if (overflow != 0) return false;
  }
  return true;
}

bool is_bool(PyObject* object) {
  return object == Py_True || object == Py_False;
}

// Puts into a key what tells a tensor from others, and its address into `addresses`; false for what
// kernels do not take.
bool put_tensor(const at::Tensor& tensor, int64_t dim, uint64_t** field, uint64_t* addresses) {
  if (tensor.dim() != dim || tensor.layout() != at::kStrided) return false;
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

// Fills the key; false if Python has to look at the call.
bool make_key(
    PyObject* const* a, const at::Tensor* const tensors[3], bool recorded, Key* key) {
  uint64_t* field = key->data();
  uint64_t addresses = 0;
  for (int i = 0; i < 3; ++i) {
    if (!put_tensor(*tensors[i], 4, &field, &addresses)) return false;
  }
  auto put = [&](uint64_t value) { *field++ = value; };
  if (!is_bool(a[CAUSAL]) || !is_bool(a[RETURN_LSE])) return false;
  size_t backend = 0;
  const size_t num_backends = static_cast<size_t>(PyTuple_GET_SIZE(state.backends));
  while (backend < num_backends && PyTuple_GET_ITEM(state.backends, backend) != a[BACKEND]) {
    ++backend;
  }
  if (backend == num_backends) return false;
  uint64_t window, left, right, softcap, softcap_bits, scale, scale_bits;
  if (!window_sides(a[WINDOW], &window, &left, &right)) return false;
  if (!factor_bits(a[SOFTCAP], &softcap, &softcap_bits)) return false;
  if (!factor_bits(a[SCALE], &scale, &scale_bits)) return false;
  put(left);
  put(right);
  put(softcap_bits);
  put(scale_bits);
  const uint64_t causal = a[CAUSAL] == Py_True, return_lse = a[RETURN_LSE] == Py_True;
  put((addresses & 15) << 16 | backend << 8 | uint64_t(recorded) << 5 | causal << 4 |
      return_lse << 3 | window << 2 | softcap << 1 | scale);
  TORCH_INTERNAL_ASSERT(field == key->data() + kKeyFields);
  return true;
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

// Reads what `prepare` returns; throws where it is not what Entry says.
std::shared_ptr<const Entry> read_entry(PyObject* object) {
  auto entry = std::make_shared<Entry>();
  if (object == Py_None) return entry;
  const py::tuple fields = py::reinterpret_borrow<py::tuple>(object);
  entry->handle = reinterpret_cast<void*>(fields[0].cast<uintptr_t>());
  entry->device = fields[1].cast<int64_t>();
  read_kernel(fields, 2, entry.get());
  entry->attn_offset = fields[7].cast<size_t>();
  entry->map_offsets = fields[8].cast<std::vector<size_t>>();
  entry->out_shape = fields[9].cast<std::array<int64_t, 4>>();
  entry->computes_lse = fields[10].cast<bool>();
  const py::tuple options = fields[11];
  entry->options = c10::ivalue::Tuple::create(
      {options[0].cast<std::string>(), options[1].cast<int64_t>(), options[2].cast<int64_t>(),
       options[3].cast<double>(), options[4].cast<double>(), options[5].cast<bool>()});
  entry->known = c10::IValue::make_capsule(c10::make_intrusive<Known>(fields[12]));
  entry->num_counters = fields[13].cast<int64_t>();
  entry->num_shares = fields[14].cast<int64_t>();
  entry->num_floats = fields[15].cast<int64_t>();
  entry->scratch_offsets = fields[16].cast<std::array<size_t, 3>>();
  entry->served = entry->argument.size() <= kMaxArgumentBytes &&
      (entry->map_offsets.empty() || entry->map_offsets.size() == kMaps);
  return entry;
}

// What Python decides for a key not seen yet, kept in place of the oldest.
std::shared_ptr<const Entry> prepare(PyObject* const* a, bool recorded, const Key& key) {
  PyObject* arguments[] = {a[Q], a[K], a[V], a[CAUSAL], a[WINDOW], a[SOFTCAP],
                           a[SCALE], a[RETURN_LSE], a[BACKEND], recorded ? Py_True : Py_False};
  PyObject* result = PyObject_Vectorcall(state.prepare, arguments, std::size(arguments), nullptr);
  if (result == nullptr) throw python_error();
  const auto owned = py::reinterpret_steal<py::object>(result);
  auto entry = read_entry(result);
  while (state.entries.size() >= state.max_entries && !state.order.empty()) {
    state.entries.erase(state.order.front());
    state.order.pop_front();
  }
  if (state.entries.emplace(key, entry).second) state.order.push_back(key);
  return entry;
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

// Addresses of one launch: tensors, counters, and what blocks hand each other.
struct Addresses {
  std::array<void*, 6> tensors;  // q, k, v, mask, out and lse, as AttnParams begins
  std::array<void*, 3> scratch;
};

// Launches with a copy of the argument that holds these addresses.
int launch(const Entry& entry, void* stream, const Addresses& addresses) {
  const auto& pointers = addresses.tensors;
  alignas(kAlignment) uint8_t argument[kMaxArgumentBytes];
  std::memcpy(argument, entry.argument.data(), entry.argument.size());
  std::memcpy(argument + entry.attn_offset, pointers.data(), sizeof(pointers));
  for (size_t i = 0; i < addresses.scratch.size() && entry.num_counters > 0; ++i) {
    std::memcpy(argument + entry.scratch_offsets[i], &addresses.scratch[i], sizeof(void*));
  }
  void* const bases[kMaps] = {pointers[0], pointers[1], pointers[2], pointers[4]};
  for (size_t i = 0; i < entry.map_offsets.size(); ++i) {
    const int status = state.replace_address(argument + entry.map_offsets[i], bases[i]);
    if (status != 0) return status;
  }
  return enqueue(entry, stream, argument);
}

struct LaunchFailed {};

// Allocates and launches: out, and lse, or no tensor where it is not computed.
std::pair<at::Tensor, at::Tensor> compute(
    const Entry& entry, void* stream, void* counters, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v) {
  const auto& shape = entry.out_shape;
  at::Tensor out = at::empty(shape, q.options()), lse, shares;
  if (entry.computes_lse) {
    lse = at::empty(at::IntArrayRef(shape.data(), 3), q.options().dtype(at::kFloat));
  }
  float* handed_over = nullptr;
  if (entry.num_floats > 0) {
    shares = at::empty({entry.num_floats}, q.options().dtype(at::kFloat));
    handed_over = shares.mutable_data_ptr<float>();
  }
  const Addresses addresses = {
      {const_cast<void*>(q.const_data_ptr()), const_cast<void*>(k.const_data_ptr()),
       const_cast<void*>(v.const_data_ptr()), nullptr, out.mutable_data_ptr(),
       lse.defined() ? lse.mutable_data_ptr() : nullptr},
      {counters, handed_over,
       handed_over == nullptr ? nullptr : handed_over + entry.num_shares}};
  if (launch(entry, stream, addresses) != 0) throw LaunchFailed{};
  return {out, lse};
}

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
    kernel.counter_offset = of_kernel[8].cast<int64_t>();
    if (kernel.argument.size() > kMaxArgumentBytes) return nullptr;
    pass->draws_tiles = pass->draws_tiles || kernel.counter_offset >= 0;
    pass->kernels.push_back(std::move(kernel));
  }
  for (const py::handle item : fields[2].cast<py::tuple>()) {
    const auto made = py::reinterpret_borrow<py::tuple>(item);
    pass->made.push_back(
        {made[0].cast<std::vector<int64_t>>(), made[1].cast<std::vector<int64_t>>(),
         made[2].cast<bool>()});
  }
  pass->gradients = fields[3].cast<std::array<size_t, 3>>();
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
  *field++ = (addresses & 15) << 1 | uint64_t(ask(state.may_differ, nullptr) != 0);
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

// Allocates and launches; returns dq, dk and dv, or nothing where a launch fails.
torch::autograd::variable_list launch_pass(
    const Pass& pass, void* stream, void* counter, const PassTensors& tensors) {
  std::vector<at::Tensor> made;
  std::vector<uint64_t> addresses;
  for (const at::Tensor& x : tensors) {
    addresses.push_back(reinterpret_cast<uint64_t>(x.const_data_ptr()));
  }
  const auto options = tensors[0].options();
  for (const Pass::Made& like : pass.made) {
    made.push_back(at::empty_strided(
        like.shape, like.strides, like.is_float32 ? options.dtype(at::kFloat) : options));
    addresses.push_back(reinterpret_cast<uint64_t>(made.back().mutable_data_ptr()));
  }
  for (const PassKernel& kernel : pass.kernels) {
    alignas(kAlignment) uint8_t argument[kMaxArgumentBytes];
    std::memcpy(argument, kernel.argument.data(), kernel.argument.size());
    for (const auto& [offset, place] : kernel.pointers) {
      std::memcpy(argument + offset, &addresses[place], sizeof(uint64_t));
    }
    if (kernel.counter_offset >= 0) {
      std::memcpy(argument + kernel.counter_offset, &counter, sizeof(counter));
    }
    for (const auto& [offset, place, shift] : kernel.maps) {
      void* const base = reinterpret_cast<void*>(addresses[place] - static_cast<uint64_t>(shift));
      if (state.replace_address(argument + offset, base) != 0) return {};
    }
    if (enqueue(kernel, stream, argument) != 0) return {};
  }
  const auto& [dq, dk, dv] = pass.gradients;
  return {made[dq], made[dk], made[dv]};
}

// Returns dq, dk and dv by what was prepared; nothing where the operator has to compute them.
torch::autograd::variable_list prepared_gradients(Known& known, const PassTensors& tensors) {
  PassKey key;
  std::shared_ptr<const Pass> pass;
  void *stream = nullptr, *counter = nullptr;
  const bool is_seen = !nobody_watches();
  {
    const py::gil_scoped_acquire acquired;
    if (!is_seen && make_pass_key(tensors, &key)) {
      pass = pass_for(known, key, tensors);
      if (pass == nullptr || ask(state.current_device, nullptr) != pass->device) return {};
      stream = current_stream(pass->device);
      counter = counters_for(pass->device, pass->draws_tiles ? 1 : 0, stream);
    }
  }
  if (pass != nullptr) {
    auto gradients = launch_pass(*pass, stream, counter, tensors);
    if (!gradients.empty()) return gradients;
  }
  // Python tries again, after binding a context perhaps, or says what is wrong.
  const py::gil_scoped_acquire acquired;
  const py::object result = ask_of_pass(state.run_pass, known, tensors);
  if (result.is_none()) return {};
  torch::autograd::variable_list gradients;
  for (const py::handle x : result.cast<py::tuple>()) {
    gradients.push_back(THPVariable_Unpack(x.ptr()));
  }
  return gradients;
}

// Does what eager._Recorded does. Where a gradient is differentiated again, the operator computes
// it.
struct Recorded : torch::autograd::Function<Recorded> {
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
      const at::Tensor& v, const Entry& entry, void* stream, void* counters, bool returns_lse) {
    auto [out, lse] = compute(entry, stream, counters, q, k, v);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->set_materialize_grads(false);
    ctx->saved_data["options"] = entry.options;
    ctx->saved_data["known"] = entry.known;
    if (returns_lse) return {out, lse};
    return {out};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, torch::autograd::variable_list gradients) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
        "flashcore::attention_backward", "");
    const auto saved = ctx->get_saved_variables();
    torch::autograd::variable_list result(7);  // as forward has arguments
    auto give = [&](size_t i, const at::Tensor& x) {
      if (ctx->needs_input_grad(i)) result[i] = x;
    };
    const bool through_lse = gradients.size() > 1 && gradients[1].defined();
    if (gradients[0].defined() && !through_lse && !c10::GradMode::is_enabled()) {
      const auto known = ctx->saved_data.at("known").toCapsule();
      const auto prepared = prepared_gradients(
          static_cast<Known&>(*known),
          {saved[0], saved[1], saved[2], saved[3], saved[4], gradients[0]});
      for (size_t i = 0; i < prepared.size(); ++i) give(i, prepared[i]);
      if (!prepared.empty()) return result;
    }
    auto optional = [](const at::Tensor& x) {
      return x.defined() ? c10::IValue(x) : c10::IValue();
    };
    torch::jit::Stack stack = {
        optional(gradients[0]), gradients.size() > 1 ? optional(gradients[1]) : c10::IValue(),
        saved[0], saved[1], saved[2], c10::IValue(), c10::IValue(), saved[3], saved[4]};
    for (const auto& option : ctx->saved_data.at("options").toTupleRef().elements()) {
      stack.push_back(option);
    }
    stack.emplace_back(false);                // there is no mask,
    stack.emplace_back(false);                // and there are no sinks
    stack.emplace_back(std::string("auto"));  // a boxed call has no defaults
    op.callBoxed(&stack);
    for (size_t i = 0; i < 3; ++i) give(i, stack[i].toTensor());
    return result;
  }
};

// attend(q, k, v, mask, causal, window, softcap, scale, seqlens_k, return_lse, backend): what
// `attention` returns, or None where Python has to do it.
PyObject* attend(PyObject*, PyObject* const* a, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != COUNT || a[MASK] != Py_None || a[SEQLENS_K] != Py_None || !nobody_watches() ||
      !is_plain_tensor(a[Q]) || !is_plain_tensor(a[K]) || !is_plain_tensor(a[V])) {
    Py_RETURN_NONE;
  }
  const at::Tensor* const tensors[3] = {
      &THPVariable_Unpack(a[Q]), &THPVariable_Unpack(a[K]), &THPVariable_Unpack(a[V])};
  bool recorded = false;
  for (const at::Tensor* tensor : tensors) {
    recorded = recorded || (c10::GradMode::is_enabled() && tensor->requires_grad());
    if (tensor->_fw_grad(0).defined()) Py_RETURN_NONE;
  }
  Key key;
  if (!make_key(a, tensors, recorded, &key)) Py_RETURN_NONE;
  const auto found = state.entries.find(key);
  const auto entry = found != state.entries.end() ? found->second : prepare(a, recorded, key);
  if (!entry->served || ask(state.current_device, nullptr) != entry->device) Py_RETURN_NONE;
  void* const stream = current_stream(entry->device);
  void* const counters = counters_for(entry->device, entry->num_counters, stream);
  const bool returns_lse = a[RETURN_LSE] == Py_True;
  at::Tensor out, lse;
  try {
    // Another thread may run Python meanwhile: a launch waits where too many are pending.
    const py::gil_scoped_release released;
    const auto& [q, k, v] = std::tie(*tensors[0], *tensors[1], *tensors[2]);
    if (recorded) {
      auto results = Recorded::apply(q, k, v, *entry, stream, counters, returns_lse);
      out = std::move(results[0]);
      if (returns_lse) lse = std::move(results[1]);
    } else {
      std::tie(out, lse) = compute(*entry, stream, counters, q, k, v);
    }
  } catch (const LaunchFailed&) {
    Py_RETURN_NONE;  // Python tries again, after binding a context perhaps
  }
  ++state.num_served;
  if (!returns_lse) return THPVariable_Wrap(out);
  return py::make_tuple(
             py::reinterpret_steal<py::object>(THPVariable_Wrap(out)),
             py::reinterpret_steal<py::object>(THPVariable_Wrap(lse)))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// configure(launch_kernel, replace_address, current_device, current_stream, counters, is_capturing,
// prepare, backends, max_entries, pass_entry, run_pass, may_differ): forgets all that was prepared.
PyObject* configure(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  unsigned long long launch_kernel, replace_address, is_capturing, max_entries;
  PyObject *current_device, *current_stream, *counters, *prepare, *backends;
  PyObject *pass_entry, *run_pass, *may_differ;
  if (!PyArg_ParseTuple(
          arguments, "KKOOOKOO!KOOO", &launch_kernel, &replace_address, &current_device,
          &current_stream, &counters, &is_capturing, &prepare, &PyTuple_Type, &backends,
          &max_entries, &pass_entry, &run_pass, &may_differ)) {
    return nullptr;
  }
  state.launch_kernel = reinterpret_cast<LaunchKernel>(launch_kernel);
  state.replace_address = reinterpret_cast<ReplaceAddress>(replace_address);
  Py_XSETREF(state.current_device, Py_NewRef(current_device));
  Py_XSETREF(state.current_stream, Py_NewRef(current_stream));
  Py_XSETREF(state.counters, Py_NewRef(counters));
  state.is_capturing = reinterpret_cast<IsCapturing>(is_capturing);
  Py_XSETREF(state.prepare, Py_NewRef(prepare));
  Py_XSETREF(state.backends, Py_NewRef(backends));
  Py_XSETREF(state.pass_entry, Py_NewRef(pass_entry));
  Py_XSETREF(state.run_pass, Py_NewRef(run_pass));
  Py_XSETREF(state.may_differ, Py_NewRef(may_differ));
  state.max_entries = max_entries;
  state.entries.clear();
  state.order.clear();
  state.counters_of.clear();
  state.num_served = 0;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// counts(): (keys remembered, calls served since configure).
PyObject* counts(PyObject*, PyObject*) {
  return Py_BuildValue("nK", static_cast<Py_ssize_t>(state.entries.size()),
                       static_cast<unsigned long long>(state.num_served));
}

PyMethodDef methods[] = {
    {"attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attend)), METH_FASTCALL,
     nullptr},
    {"configure", configure, METH_VARARGS, nullptr},
    {"counts", counts, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "flashcore_launcher", nullptr, -1, methods, nullptr, nullptr, nullptr,
    nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_flashcore_launcher() {
  return PyModule_Create(&module);
}
