// An eager call of attention in C++: the way of calls.attend and launch.KernelCall.run, without the
// interpreter. It serves the common call; whatever is unusual is left to Python, by returning None.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <unordered_map>

#include "backward_pass.h"
#include "launching.h"

namespace {

constexpr size_t kMaps = 4;  // q, k, v, out

// All that a call depends on besides addresses and values.
constexpr size_t kKeyFields = 3 * kTensorFields + 6;
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

// The calls that are remembered, under the GIL.
struct Calls {
  PyObject* prepare = nullptr;  // see _prepare in __init__.py
  PyObject* backends = nullptr;  // tuple of interned names
  PyObject* upper_left = nullptr;  // the interned name of that causal mask
  size_t max_entries = 0;
  std::unordered_map<Key, std::shared_ptr<const Entry>, KeyHash> entries;
  std::deque<Key> order;
  uint64_t num_served = 0;
};

Calls calls;

enum Argument {
  Q, K, V, MASK, CAUSAL, WINDOW, SOFTCAP, SCALE, SEQLENS_K, RETURN_LSE, BACKEND, DETERMINISTIC,
  DECIDE, COUNT
};

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
  uint64_t* field = key->data();
  uint64_t addresses = 0;
  for (int i = 0; i < 3; ++i) {
    if (!put_tensor(*tensors[i], 4, &field, &addresses)) return false;
  }
  auto put = [&](uint64_t value) { *field++ = value; };
  const bool is_upper_left = a[CAUSAL] == calls.upper_left;
  if (!is_bool(a[CAUSAL]) && !is_upper_left) return false;
  if (!is_bool(a[RETURN_LSE]) || !is_bool(a[DETERMINISTIC])) return false;
  size_t backend = 0;
  const size_t num_backends = static_cast<size_t>(PyTuple_GET_SIZE(calls.backends));
  while (backend < num_backends && PyTuple_GET_ITEM(calls.backends, backend) != a[BACKEND]) {
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
  put(reinterpret_cast<uint64_t>(a[DECIDE]));  // functions that live as long as the process
  const uint64_t causal = a[CAUSAL] == Py_True, return_lse = a[RETURN_LSE] == Py_True;
  const uint64_t deterministic = a[DETERMINISTIC] == Py_True;
  put((addresses & 15) << 16 | backend << 8 | uint64_t(is_upper_left) << 7 | deterministic << 6 |
      uint64_t(recorded) << 5 | causal << 4 | return_lse << 3 | window << 2 | softcap << 1 | scale);
  TORCH_INTERNAL_ASSERT(field == key->data() + kKeyFields);
  return true;
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
       options[3].cast<double>(), options[4].cast<double>(), options[5].cast<bool>(),
       options[6].cast<bool>()});
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
                           a[SCALE], a[RETURN_LSE], a[BACKEND], recorded ? Py_True : Py_False,
                           a[DETERMINISTIC], a[DECIDE]};
  PyObject* result = PyObject_Vectorcall(calls.prepare, arguments, std::size(arguments), nullptr);
  if (result == nullptr) throw python_error();
  const auto owned = py::reinterpret_steal<py::object>(result);
  auto entry = read_entry(result);
  while (calls.entries.size() >= calls.max_entries && !calls.order.empty()) {
    calls.entries.erase(calls.order.front());
    calls.order.pop_front();
  }
  if (calls.entries.emplace(key, entry).second) calls.order.push_back(key);
  return entry;
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
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
        "flashcore::attention_backward", "");
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

// attend(q, k, v, mask, causal, window, softcap, scale, seqlens_k, return_lse, backend,
// deterministic, decide): what `attention` returns, or None where Python has to do it.
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
  const auto found = calls.entries.find(key);
  const auto entry = found != calls.entries.end() ? found->second : prepare(a, recorded, key);
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
  ++calls.num_served;
  if (!returns_lse) return THPVariable_Wrap(out);
  return py::make_tuple(
             py::reinterpret_steal<py::object>(THPVariable_Wrap(out)),
             py::reinterpret_steal<py::object>(THPVariable_Wrap(lse)))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// configure(launch_kernel, replace_address, current_device, current_stream, counters, clear,
// is_capturing, prepare, backends, max_entries, pass_entry, run_pass, circumstances): forgets all
// that was prepared.
PyObject* configure(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  unsigned long long launch_kernel, replace_address, is_capturing, max_entries;
  PyObject *current_device, *current_stream, *counters, *clear, *prepare, *backends;
  PyObject *pass_entry, *run_pass, *circumstances;
  if (!PyArg_ParseTuple(
          arguments, "KKOOOOKOO!KOOO", &launch_kernel, &replace_address, &current_device,
          &current_stream, &counters, &clear, &is_capturing, &prepare, &PyTuple_Type, &backends,
          &max_entries, &pass_entry, &run_pass, &circumstances)) {
    return nullptr;
  }
  state.launch_kernel = reinterpret_cast<LaunchKernel>(launch_kernel);
  state.replace_address = reinterpret_cast<ReplaceAddress>(replace_address);
  Py_XSETREF(state.current_device, Py_NewRef(current_device));
  Py_XSETREF(state.current_stream, Py_NewRef(current_stream));
  Py_XSETREF(state.counters, Py_NewRef(counters));
  Py_XSETREF(state.clear, Py_NewRef(clear));
  state.is_capturing = reinterpret_cast<IsCapturing>(is_capturing);
  Py_XSETREF(calls.prepare, Py_NewRef(prepare));
  Py_XSETREF(calls.backends, Py_NewRef(backends));
  Py_XSETREF(calls.upper_left, PyUnicode_InternFromString("upper_left"));
  Py_XSETREF(state.pass_entry, Py_NewRef(pass_entry));
  Py_XSETREF(state.run_pass, Py_NewRef(run_pass));
  Py_XSETREF(state.circumstances, Py_NewRef(circumstances));
  calls.max_entries = max_entries;
  calls.entries.clear();
  calls.order.clear();
  state.counters_of.clear();
  calls.num_served = 0;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// counts(): (keys remembered, calls served since configure).
PyObject* counts(PyObject*, PyObject*) {
  return Py_BuildValue("nK", static_cast<Py_ssize_t>(calls.entries.size()),
                       static_cast<unsigned long long>(calls.num_served));
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
