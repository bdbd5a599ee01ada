// Python bindings: they turn addresses, shapes and strides into parameters of kernels, and hold no logic. The
// GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <exception>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "call_checks.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_gaps.h"
#if defined(LED_KERNELS_WITH_CUDA)
  #include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

using led::AttentionRequest;
using led::CpuAttentionParams;
using led::CudaAttentionParams;
using led::DecodeRequest;
using led::KernelKind;
using led::KernelTable;
using led::LseRef;
using led::RowsRef;

// Python gives tensors as (address, batch stride, row stride, head stride, bytes), as (address, batch stride,
// head stride, bytes) and as (address, bytes), with strides in elements.
using Rows = std::array<int64_t, 5>;
using Statistics = std::array<int64_t, 4>;
using Memory = std::array<int64_t, 2>;

template <class T>
const T* pointer(const Memory& x) {
  return reinterpret_cast<const T*>(static_cast<uintptr_t>(x[0]));
}

RowsRef rows_ref(const Rows& x) {
  return {reinterpret_cast<void*>(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3]};
}

LseRef lse_ref(const Statistics& x) {
  return {reinterpret_cast<void*>(static_cast<uintptr_t>(x[0])), x[1], x[2]};
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : led::cpu_kernels()) names.emplace_back(table->isa);
  return names;
}

const KernelTable& kernels(const std::string& isa) {
  for (const KernelTable* table : led::cpu_kernels()) {
    if (isa == table->isa) return *table;
  }
  throw py::value_error("no kernels for the instruction set '" + isa + "' in this build on this processor.");
}

// Records calls of CPU kernels with their pointers, so that one call makes them again: it is what a captured
// graph is on a GPU.
class Recording {
 public:
  Recording() = default;
  Recording(const Recording&) = delete;
  ~Recording() {
    if (current == this) current = nullptr;
  }
  void enter() { current = this; }
  void exit() { current = nullptr; }
  bool is_current() const { return current == this; }
  void replay() const {
    for (const auto& call : calls_) call();
  }
  template <class Launch>
  static void launch(const Launch& call) {
    if (current != nullptr) current->calls_.emplace_back(call);
    py::gil_scoped_release release;
    call();
  }

 private:
  static thread_local Recording* current;
  std::vector<std::function<void()>> calls_;
};
thread_local Recording* Recording::current = nullptr;

// Whether Python has had a signal whose handler raises, as that of Ctrl-C does. Python's error is then set.
bool signal_raises() {
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Python handles signals on this thread. Others do not ask: while the interpreter ends they must not take the
// GIL.
unsigned long main_thread = 0;

bool is_main_thread() {
  return PyThread_get_thread_ident() == main_thread;
}

auto cpu_launcher(void (*KernelTable::*function)(const CpuAttentionParams&), KernelKind kind) {
  return [function, kind](const AttentionRequest& request, const std::string& isa) {
    const KernelTable& table = kernels(isa);
    led::check_call(request, kind);
    led::check_mask_values(request, kind);
    CpuAttentionParams params = request.cpu_params();
    const int64_t packed_rows = params.call.mask.packed ? request.mask_rows : 0;
    if (params.call.mask.packed) params.call.max_seqlen = std::min(params.call.max_seqlen, packed_rows);
    Recording::launch([&table, function, params, packed_rows, kind] {
      if (packed_rows > 0) led::clear_gaps(params, packed_rows, kind);
      led::Interruption interruption(&signal_raises);
      CpuAttentionParams own = params;
      if (is_main_thread()) own.execution.interruption = &interruption;
      (table.*function)(own);
      if (own.execution.stops()) throw led::Interrupted();
    });
  };
}

void decode_attention(const DecodeRequest& request, const std::string& isa) {
  const KernelTable& table = kernels(isa);
  led::check_call(request);
  const led::DecodeParams params = request.call;
  if (params.batch == 0 || params.heads == 0 || params.queries == 0) return;
  Recording::launch([&table, params] { table.decode_attention(params); });
}

#if defined(LED_KERNELS_WITH_CUDA)
// Binds a kernel, and under its name with _workspace how many floats of workspace it needs.
void define_cuda_kernel(py::module_& m, const std::string& name, void (*function)(const CudaAttentionParams&),
                        int64_t (*workspace)(const CudaAttentionParams&), KernelKind kind) {
  m.def(name.c_str(), [function, workspace, kind](const AttentionRequest& request) {
    led::check_call(request, kind);
    const CudaAttentionParams params = request.cuda_params();
    const led::AttentionCall& call = params.call;
    if (call.dtype == led::DType::kFloat64) throw py::value_error("dtype is float64.");
    if (call.batch > 0 && call.heads > 0) {
      const auto floats = static_cast<double>(workspace(params));
      led::check_memory("workspace", params.execution.workspace, request.bytes.workspace, floats,
                        sizeof(float));
    }
    if (call.dropout.device_seed)
      led::check_memory("device_seed", call.dropout.device_seed, request.bytes.device_seed, 1, 8);
    py::gil_scoped_release release;
    function(params);
  });
  m.def((name + "_workspace").c_str(), [workspace, kind](const AttentionRequest& request) {
    led::check_call(request, kind);
    return workspace(request.cuda_params());
  });
}

void define_cuda(py::module_& m) {
  namespace cuda = led::cuda;
  define_cuda_kernel(m, "cuda_banded_forward", cuda::banded_forward, cuda::banded_forward_workspace,
                     {false, false});
  define_cuda_kernel(m, "cuda_banded_backward", cuda::banded_backward, cuda::banded_backward_workspace,
                     {false, true});
  define_cuda_kernel(m, "cuda_global_forward", cuda::global_forward, cuda::global_forward_workspace,
                     {true, false});
  define_cuda_kernel(m, "cuda_global_backward", cuda::global_backward, cuda::global_backward_workspace,
                     {true, true});
  m.def(
      "cuda_architectures",
      [] {
        const cuda::Architectures built = cuda::architectures();
        return std::make_pair(built.compiled, built.ptx);
      },
      "Compute capabilities with machine code in this build (75, 80, ...), and the one whose PTX it holds "
      "(0: none).");
  m.def("cuda_device_type", &cuda::device_type,
        "Where the tensors are: 'cuda'; 'cpu' where tests execute the kernels.");
}
#endif

// An attribute of Python for the field that field(request) refers to.
template <class Request, class Field>
void define_field(py::class_<Request>& type, const char* name, Field field) {
  using Value = std::decay_t<decltype(field(std::declval<Request&>()))>;
  type.def_property(
      name, [field](Request& request) { return field(request); },
      [field](Request& request, Value value) { field(request) = value; });
}

// A setter of Python for the tensor that tensor(request) refers to, and for its bytes.
template <class Request, class Tensor>
void define_rows(py::class_<Request>& type, const char* name, Tensor tensor, int64_t led::Bytes::* bytes) {
  type.def(name, [tensor, bytes](Request& request, const Rows& x) {
    tensor(request) = rows_ref(x);
    request.bytes.*bytes = x[4];
  });
}
template <class Request, class Tensor>
void define_lse(py::class_<Request>& type, const char* name, Tensor tensor, int64_t led::Bytes::* bytes) {
  type.def(name, [tensor, bytes](Request& request, const Statistics& x) {
    tensor(request) = lse_ref(x);
    request.bytes.*bytes = x[3];
  });
}

// A class of Python with what all attention takes.
template <class Request>
py::class_<Request> define_request(py::module_& m, const char* name) {
  using Bytes = led::Bytes;
  py::class_<Request> type(m, name);
  type.def(py::init<>());
  define_field(type, "dtype", [](Request& r) -> auto& { return r.call.dtype; });
  define_field(type, "batch", [](Request& r) -> auto& { return r.call.batch; });
  define_field(type, "max_seqlen", [](Request& r) -> auto& { return r.call.max_seqlen; });
  define_field(type, "heads", [](Request& r) -> auto& { return r.call.heads; });
  define_field(type, "head_dim", [](Request& r) -> auto& { return r.call.head_dim; });
  define_field(type, "softmax_scale", [](Request& r) -> auto& { return r.call.softmax_scale; });
  define_rows(type, "set_q", [](Request& r) -> auto& { return r.call.q; }, &Bytes::q);
  define_rows(type, "set_k", [](Request& r) -> auto& { return r.call.k; }, &Bytes::k);
  define_rows(type, "set_v", [](Request& r) -> auto& { return r.call.v; }, &Bytes::v);
  return type;
}

void define_attention_params(py::module_& m) {
  using Request = AttentionRequest;
  using Bytes = led::Bytes;
  auto type = define_request<Request>(m, "AttentionParams");
  type.def("set_mask", [](Request& request, const std::array<Memory, 8>& tensors, int64_t rows,
                          int64_t max_globals, bool packed) {
    // in the order of Python's MaskTensors
    const auto& [seq_start, seq_len, token_kind, padding_before, global_index, num_globals, position_offset,
                 global_position] = tensors;
    request.call.mask = {pointer<int32_t>(seq_start),
                         pointer<int32_t>(seq_len),
                         pointer<uint8_t>(token_kind),
                         pointer<int32_t>(padding_before),
                         pointer<int32_t>(global_index),
                         pointer<int32_t>(num_globals),
                         pointer<int32_t>(position_offset),
                         pointer<int32_t>(global_position),
                         packed ? 0 : rows,
                         max_globals,
                         packed};
    request.mask_rows = rows;
    Bytes& bytes = request.bytes;
    bytes.seq_start = seq_start[1], bytes.seq_len = seq_len[1];
    bytes.token_kind = token_kind[1], bytes.padding_before = padding_before[1];
    bytes.global_index = global_index[1], bytes.num_globals = num_globals[1];
    bytes.position_offset = position_offset[1], bytes.global_position = global_position[1];
  });
  define_field(type, "window_left", [](Request& r) -> auto& { return r.call.window.left; });
  define_field(type, "window_right", [](Request& r) -> auto& { return r.call.window.right; });
  define_field(type, "dropout_p", [](Request& r) -> auto& { return r.call.dropout.p; });
  define_field(type, "dropout_seed", [](Request& r) -> auto& { return r.call.dropout.seed; });
  type.def("set_device_seed", [](Request& request, const Memory& x) {
    request.call.dropout.device_seed = pointer<int64_t>(x);
    request.bytes.device_seed = x[1];
  });

  define_rows(type, "set_out", [](Request& r) -> auto& { return r.results.out; }, &Bytes::out);
  define_lse(type, "set_lse", [](Request& r) -> auto& { return r.results.lse; }, &Bytes::lse);

  define_rows(type, "set_d_out", [](Request& r) -> auto& { return r.grads.d_out; }, &Bytes::d_out);
  define_lse(type, "set_d_lse", [](Request& r) -> auto& { return r.grads.d_lse; }, &Bytes::d_lse);
  define_rows(type, "set_dq", [](Request& r) -> auto& { return r.grads.dq; }, &Bytes::dq);
  define_rows(type, "set_dk", [](Request& r) -> auto& { return r.grads.dk; }, &Bytes::dk);
  define_rows(type, "set_dv", [](Request& r) -> auto& { return r.grads.dv; }, &Bytes::dv);

  define_field(type, "num_threads", [](Request& r) -> auto& { return r.cpu.num_threads; });
  define_field(type, "device", [](Request& r) -> auto& { return r.cuda.device; });
  define_field(type, "stream", [](Request& r) -> auto& { return r.cuda.stream; });
  type.def("set_workspace", [](Request& request, const Memory& x) {
    request.cuda.workspace = const_cast<float*>(pointer<float>(x));
    request.bytes.workspace = x[1];
  });
}

void define_decode_params(py::module_& m) {
  using Request = DecodeRequest;
  auto type = define_request<Request>(m, "DecodeParams");
  define_field(type, "queries", [](Request& r) -> auto& { return r.call.queries; });
  define_field(type, "num_threads", [](Request& r) -> auto& { return r.call.num_threads; });
  define_rows(type, "set_out", [](Request& r) -> auto& { return r.call.out; }, &led::Bytes::out);
  type.def("set_visible", [](Request& request, const Memory& x, int64_t batch_stride, int64_t query_stride) {
    request.call.visible = {pointer<uint8_t>(x), batch_stride, query_stride};
    request.bytes.visible = x[1];
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled attention kernels of led_kernels.";
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const led::Interrupted&) {  // the signal's handler has set Python's error
    }
  });

  py::register_exception<led::Misaligned>(m, "Misaligned", PyExc_ValueError);

  py::enum_<led::DType>(m, "DType")
      .value("float32", led::DType::kFloat32)
      .value("float64", led::DType::kFloat64)
      .value("float16", led::DType::kFloat16)
      .value("bfloat16", led::DType::kBFloat16);

  define_attention_params(m);
  define_decode_params(m);

  m.def("cpu_isas", &cpu_isas, "Instruction sets that this build holds and this processor runs, best first.");
  m.def("cpu_banded_forward", cpu_launcher(&KernelTable::banded_forward, {false, false}));
  m.def("cpu_banded_backward", cpu_launcher(&KernelTable::banded_backward, {false, true}));
  m.def("cpu_global_forward", cpu_launcher(&KernelTable::global_forward, {true, false}));
  m.def("cpu_global_backward", cpu_launcher(&KernelTable::global_backward, {true, true}));
  m.def("cpu_decode_attention", &decode_attention);
  m.def(
      "cpu_few_rows_linear",
      [](led::DType dtype, const std::array<int64_t, 3>& sizes, const Memory& x, const Memory& weight,
         int64_t weight_stride, const Memory& bias, const Memory& y, bool gelu, int num_threads,
         const std::string& isa) {
        const KernelTable& table = kernels(isa);
        const led::GemvParams params{dtype,
                                     sizes[0],
                                     sizes[1],
                                     sizes[2],
                                     pointer<void>(x),
                                     pointer<void>(weight),
                                     pointer<void>(bias),
                                     const_cast<void*>(pointer<void>(y)),
                                     sizes[1],
                                     weight_stride,
                                     gelu,
                                     num_threads};
        led::check_call(params, x[1], weight[1], bias[1], y[1]);
        Recording::launch([&table, params] { table.gemv(params); });
      },
      "x weightᵀ + bias, then GELU if asked for; sizes are rows, in_features, out_features.");
  m.def(
      "cpu_few_rows_add_norm",
      [](led::DType dtype, int64_t rows, int64_t features, const Memory& residual, const Memory& block,
         const Memory& weight, const Memory& bias, const Memory& y, double eps, const std::string& isa) {
        const KernelTable& table = kernels(isa);
        const led::AddNormParams params{dtype,
                                        rows,
                                        features,
                                        pointer<void>(residual),
                                        pointer<void>(block),
                                        pointer<void>(weight),
                                        pointer<void>(bias),
                                        const_cast<void*>(pointer<void>(y)),
                                        eps};
        led::check_call(params, residual[1], block[1], weight[1], bias[1], y[1]);
        Recording::launch([&table, params] { table.add_norm(params); });
      },
      "Layer norm of residual + block.");
  m.def(
      "cpu_write_rows",
      [](led::DType dtype, const std::array<int64_t, 4>& sizes, int64_t capacity, const Memory& position,
         const Rows& from, const Rows& to, const std::string& isa) {
        const KernelTable& table = kernels(isa);
        const led::WriteRowsParams params{
            dtype,          sizes[0],    sizes[1], sizes[2], sizes[3], capacity, pointer<int64_t>(position),
            rows_ref(from), rows_ref(to)};
        led::check_call(params, position[1], from[4], to[4]);
        Recording::launch([&table, params] { table.write_rows(params); });
      },
      "Rows into positions of a cache; sizes are batch, heads, rows, head_dim.");
  py::class_<Recording>(m, "Recording")
      .def(py::init<>())
      .def("__enter__", &Recording::enter)
      .def("__exit__", [](Recording& recording, const py::args&) { recording.exit(); })
      .def_property_readonly("is_current", &Recording::is_current)
      .def("replay", &Recording::replay, py::call_guard<py::gil_scoped_release>());
#if defined(LED_KERNELS_WITH_CUDA)
  define_cuda(m);
#endif
}
