// An eager call of attention in C++: the way of calls.attend and launch.KernelCall.run, without the
// interpreter. It serves the common call; whatever is unusual is left to Python, by returning None.
//
// No CUDA header is needed: the driver's two functions come by address, and the two structs that
// one of them takes are declared here as launch/driver.py declares them.

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
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
constexpr size_t kKeyFields = 35;
using Key = std::array<uint64_t, kKeyFields>;

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

// A Python object that autograd's nodes and entries share, whichever thread lets go of it last.
struct Owned : torch::CustomClassHolder {
  explicit Owned(const py::handle& object) : object(object.inc_ref().ptr()) {}
  ~Owned() override {
    if (!Py_IsInitialized()) return;  // the process ends
    const py::gil_scoped_acquire acquired;
    Py_DECREF(object);
  }
  PyObject* const object;
};

// The decision for a key; see Entry in __init__.py. It never changes once it is made.
struct Entry {
  bool served = false;  // false: Python serves such calls
  void* kernel = nullptr;
  int64_t device = 0;
  uint32_t grid = 0, num_threads = 0, smem_bytes = 0;
  bool starts_early = false;
  std::vector<uint8_t> argument;
  size_t attn_offset = 0;
  std::vector<size_t> map_offsets;
  std::array<int64_t, 4> out_shape{};
  bool computes_lse = false;
  c10::IValue options;  // validated: the tuple that the operators take, see problem/options.py
  c10::IValue found;  // an Owned: what knows the prepared backward passes
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
  PyObject* differentiate = nullptr;  // see `differentiate` in __init__.py
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

// Fills the key; false if Python has to look at the call.
bool make_key(
    PyObject* const* a, const at::Tensor* const tensors[3], bool recorded, Key* key) {
  size_t field = 0;
  auto put = [&](uint64_t value) { (*key)[field++] = value; };
  uint64_t addresses = 0;
  for (int i = 0; i < 3; ++i) {
    const at::Tensor& tensor = *tensors[i];
    if (tensor.dim() != 4 || tensor.layout() != at::kStrided) return false;
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    for (int d = 0; d < 4; ++d) put(static_cast<uint64_t>(sizes[d]));
    for (int d = 0; d < 4; ++d) put(static_cast<uint64_t>(strides[d]));
    put(tensor.key_set().raw_repr());  // the kind of device, negated or not, and the like
    const auto device = static_cast<uint8_t>(tensor.device().index());
    put(static_cast<uint64_t>(tensor.scalar_type()) << 8 | device);
    if (!tensor.has_storage()) return false;
    const auto address = reinterpret_cast<uint64_t>(tensor.const_data_ptr());
    if (address == 0) return false;  // a stand-in for a tensor, or empty
    addresses |= address;
  }
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
  TORCH_INTERNAL_ASSERT(field == kKeyFields);
  return true;
}

// Reads what `prepare` returns; throws where it is not what Entry says.
std::shared_ptr<const Entry> read_entry(PyObject* object) {
  auto entry = std::make_shared<Entry>();
  if (object == Py_None) return entry;
  const py::tuple fields = py::reinterpret_borrow<py::tuple>(object);
  entry->kernel = reinterpret_cast<void*>(fields[0].cast<uintptr_t>());
  entry->device = fields[1].cast<int64_t>();
  entry->grid = fields[2].cast<uint32_t>();
  entry->num_threads = fields[3].cast<uint32_t>();
  entry->smem_bytes = fields[4].cast<uint32_t>();
  entry->starts_early = fields[5].cast<bool>();
  const std::string argument = fields[6].cast<py::bytes>();
  entry->argument.assign(argument.begin(), argument.end());
  entry->attn_offset = fields[7].cast<size_t>();
  entry->map_offsets = fields[8].cast<std::vector<size_t>>();
  entry->out_shape = fields[9].cast<std::array<int64_t, 4>>();
  entry->computes_lse = fields[10].cast<bool>();
  const py::tuple options = fields[11];
  entry->options = c10::ivalue::Tuple::create(
      {options[0].cast<std::string>(), options[1].cast<int64_t>(), options[2].cast<int64_t>(),
       options[3].cast<double>(), options[4].cast<double>(), options[5].cast<bool>()});
  entry->found = c10::IValue::make_capsule(c10::make_intrusive<Owned>(fields[12]));
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

// Counters for a launch on a stream, which is the device's current one.
void* counters_for(const Entry& entry, void* stream) {
  if (entry.num_counters == 0) return nullptr;
  // A stream that cannot say whether it is being captured is treated as if it were.
  int captured = 1;
  if (state.is_capturing(stream, &captured) != 0) captured = 1;
  Counters& known = state.counters_of[{entry.device, stream}];
  if (captured == 0 && known.count >= entry.num_counters) return known.address;
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallFunction(
      state.counters, "LL", static_cast<long long>(entry.device),
      static_cast<long long>(entry.num_counters)));
  if (!found) throw python_error();
  const Counters counters{entry.num_counters, reinterpret_cast<void*>(found.cast<uintptr_t>())};
  if (captured == 0) known = counters;
  return counters.address;
}

// Addresses of one launch: tensors, counters, and what blocks hand each other.
struct Addresses {
  std::array<void*, 6> tensors;  // q, k, v, mask, out and lse, as AttnParams begins
  std::array<void*, 3> scratch;
};

// Launches with a copy of the argument that holds these addresses; a launch copies it again.
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
  LaunchAttribute early{};
  early.id = kProgrammaticStreamSerialization;
  early.programmatic_stream_serialization_allowed = 1;
  LaunchConfig config{
      {entry.grid, 1, 1}, {entry.num_threads, 1, 1}, entry.smem_bytes, stream, nullptr, 0};
  if (entry.starts_early) {
    config.attributes = &early;
    config.num_attributes = 1;
  }
  void* arguments[] = {argument};
  return state.launch_kernel(&config, entry.kernel, arguments, nullptr);
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

// Returns dq, dk and dv of q, k, v, out, lse and dout by what Python has prepared; nothing where
// the operator has to compute them.
torch::autograd::variable_list prepared_gradients(
    const c10::IValue& found, const std::array<at::Tensor, 6>& tensors) {
  const py::gil_scoped_acquire acquired;
  auto steal = [](PyObject* object) { return py::reinterpret_steal<py::object>(object); };
  const auto capsule = found.toCapsule();
  std::array<py::object, 6> wrapped;
  std::array<PyObject*, 7> arguments = {static_cast<const Owned&>(*capsule).object};
  for (size_t i = 0; i < tensors.size(); ++i) {
    wrapped[i] = steal(THPVariable_Wrap(tensors[i]));
    arguments[i + 1] = wrapped[i].ptr();
  }
  const py::object result = steal(
      PyObject_Vectorcall(state.differentiate, arguments.data(), arguments.size(), nullptr));
  if (!result) {
    python_error error;
    error.persist();
    throw error;
  }
  if (result.is_none()) return {};
  torch::autograd::variable_list gradients;
  for (const py::handle x : py::reinterpret_borrow<py::tuple>(result)) {
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
    ctx->saved_data["found"] = entry.found;
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
      const auto prepared = prepared_gradients(
          ctx->saved_data.at("found"),
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
  const auto index = py::reinterpret_steal<py::object>(PyLong_FromLongLong(entry->device));
  void* const stream = reinterpret_cast<void*>(ask(state.current_stream, index.ptr()));
  void* const counters = counters_for(*entry, stream);
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
// prepare, backends, max_entries, differentiate): forgets all that was prepared.
PyObject* configure(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  unsigned long long launch_kernel, replace_address, is_capturing, max_entries;
  PyObject *current_device, *current_stream, *counters, *prepare, *backends, *differentiate;
  if (!PyArg_ParseTuple(
          arguments, "KKOOOKOO!KO", &launch_kernel, &replace_address, &current_device,
          &current_stream, &counters, &is_capturing, &prepare, &PyTuple_Type, &backends,
          &max_entries, &differentiate)) {
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
  Py_XSETREF(state.differentiate, Py_NewRef(differentiate));
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
