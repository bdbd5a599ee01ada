// Python bindings: pointers, shapes and strides in; no logic. The GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "call_checks.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_gaps.h"
#if defined(LED_KERNELS_WITH_CUDA)
  #include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

using led::AttentionParams;
using led::Bytes;
using led::Call;
using led::DecodeParams;
using led::InterruptibleParams;
using led::KernelTable;
using led::LseRef;
using led::RowsRef;

// As Python gives them, strides in elements: (address, batch stride, row stride, head stride, bytes),
// (address, batch stride, head stride, bytes), (address, bytes).
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

// Calls of CPU kernels with their pointers, to be made again by one call: what a captured graph is on a GPU.
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

// Whether Python has had a signal whose handler raises, as that of Ctrl-C does; what it raised is then set.
bool signal_raises() {
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// The thread that Python handles signals on. Others do not ask: while the interpreter ends they must not take
// the GIL.
unsigned long main_thread = 0;

bool is_main_thread() {
  return PyThread_get_thread_ident() == main_thread;
}

// Which of the attention kernels a call is of.
struct Kind {
  bool is_global, is_backward;
};

auto cpu_launcher(void (*KernelTable::*kernel)(const InterruptibleParams&), Kind kind) {
  return [kernel, kind](const Call<AttentionParams>& call, const std::string& isa) {
    const KernelTable& table = kernels(isa);
    led::check_call(call, kind.is_global, kind.is_backward);
    led::check_mask_values(call);
    InterruptibleParams params{call};
    if (params.mask.packed) params.max_seqlen = std::min(params.max_seqlen, call.mask_rows);
    const int64_t gap_rows = params.mask.packed ? call.mask_rows : 0;
    Recording::launch([&table, kernel, params, gap_rows, kind] {
      if (gap_rows > 0)
        led::clear_gaps(params, gap_rows, led::itemsize(params.dtype), kind.is_global, kind.is_backward);
      led::Interruption interruption(&signal_raises);
      InterruptibleParams own = params;
      if (is_main_thread()) own.interruption = &interruption;
      (table.*kernel)(own);
      if (own.stops()) throw led::Interrupted();
    });
  };
}

void decode_attention(const Call<DecodeParams>& call, const std::string& isa) {
  const KernelTable& table = kernels(isa);
  led::check_call(call);
  if (call.batch == 0 || call.heads == 0 || call.queries == 0) return;
  const DecodeParams params = call;
  Recording::launch([&table, params] { table.decode_attention(params); });
}

#if defined(LED_KERNELS_WITH_CUDA)
// The kernel and the floats of workspace that it needs, under the name in Python.
void define_cuda_kernel(py::module_& m, const std::string& name, void (*kernel)(const AttentionParams&),
                        int64_t (*workspace)(const AttentionParams&), Kind kind) {
  m.def(name.c_str(), [kernel, workspace, kind](const Call<AttentionParams>& call) {
    led::check_call(call, kind.is_global, kind.is_backward);
    if (call.dtype == led::DType::kFloat64) throw py::value_error("dtype is float64.");
    if (call.batch > 0 && call.heads > 0) {
      const auto floats = static_cast<double>(workspace(call));
      led::check_memory("workspace", call.workspace, call.bytes.workspace, floats, sizeof(float));
    }
    if (call.device_seed) led::check_memory("device_seed", call.device_seed, call.bytes.device_seed, 1, 8);
    py::gil_scoped_release release;
    kernel(call);
  });
  m.def((name + "_workspace").c_str(), [workspace, kind](const Call<AttentionParams>& call) {
    led::check_call(call, kind.is_global, kind.is_backward);
    return workspace(call);
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

// A class of Python for the parameters of a kernel.
template <class Params>
py::class_<Call<Params>> define_params(py::module_& m, const char* name) {
  using Of = Call<Params>;
  py::class_<Of> params(m, name);
  params.def(py::init<>())
      .def_readwrite("dtype", &Of::dtype)
      .def_readwrite("batch", &Of::batch)
      .def_readwrite("max_seqlen", &Of::max_seqlen)
      .def_readwrite("heads", &Of::heads)
      .def_readwrite("head_dim", &Of::head_dim)
      .def_readwrite("softmax_scale", &Of::softmax_scale)
      .def_readwrite("num_threads", &Of::num_threads);
  struct Tensor {
    const char* setter;
    RowsRef AttentionParams::* rows;
    int64_t Bytes::* bytes;
  };
  const Tensor tensors[] = {{"set_q", &AttentionParams::q, &Bytes::q},
                            {"set_k", &AttentionParams::k, &Bytes::k},
                            {"set_v", &AttentionParams::v, &Bytes::v},
                            {"set_out", &AttentionParams::out, &Bytes::out},
                            {"set_d_out", &AttentionParams::d_out, &Bytes::d_out},
                            {"set_dq", &AttentionParams::dq, &Bytes::dq},
                            {"set_dk", &AttentionParams::dk, &Bytes::dk},
                            {"set_dv", &AttentionParams::dv, &Bytes::dv}};
  for (const auto& [setter, rows, bytes] : tensors) {
    params.def(setter, [rows = rows, bytes = bytes](Of& call, const Rows& x) {
      call.*rows = rows_ref(x);
      call.bytes.*bytes = x[4];
    });
  }
  return params;
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

  using Attention = Call<AttentionParams>;
  define_params<AttentionParams>(m, "AttentionParams")
      .def_readwrite("window_left", &Attention::window_left)
      .def_readwrite("window_right", &Attention::window_right)
      .def_readwrite("dropout_p", &Attention::dropout_p)
      .def_readwrite("dropout_seed", &Attention::dropout_seed)
      .def_readwrite("device", &Attention::device)
      .def_readwrite("stream", &Attention::stream)
      .def("set_device_seed",
           [](Attention& call, const Memory& x) {
             call.device_seed = pointer<int64_t>(x);
             call.bytes.device_seed = x[1];
           })
      .def("set_workspace",
           [](Attention& call, const Memory& x) {
             call.workspace = const_cast<float*>(pointer<float>(x));
             call.bytes.workspace = x[1];
           })
      .def("set_mask",
           [](Attention& call, const Memory& seq_start, const Memory& seq_len, const Memory& token_kind,
              const Memory& padding_before, const Memory& global_index, const Memory& num_globals,
              int64_t rows, int64_t max_globals, bool packed) {
             call.mask = {pointer<int32_t>(seq_start),
                          pointer<int32_t>(seq_len),
                          pointer<uint8_t>(token_kind),
                          pointer<int32_t>(padding_before),
                          pointer<int32_t>(global_index),
                          pointer<int32_t>(num_globals),
                          packed ? 0 : rows,
                          max_globals,
                          packed};
             call.mask_rows = rows;
             call.bytes.seq_start = seq_start[1], call.bytes.seq_len = seq_len[1];
             call.bytes.token_kind = token_kind[1], call.bytes.padding_before = padding_before[1];
             call.bytes.global_index = global_index[1], call.bytes.num_globals = num_globals[1];
           })
      .def("set_lse",
           [](Attention& call, const Statistics& x) {
             call.lse = lse_ref(x);
             call.bytes.lse = x[3];
           })
      .def("set_d_lse", [](Attention& call, const Statistics& x) {
        call.d_lse = lse_ref(x);
        call.bytes.d_lse = x[3];
      });
  define_params<DecodeParams>(m, "DecodeParams")
      .def_readwrite("queries", &Call<DecodeParams>::queries)
      .def("set_visible",
           [](Call<DecodeParams>& call, const Memory& x, int64_t batch_stride, int64_t query_stride) {
             call.visible = {pointer<uint8_t>(x), batch_stride, query_stride};
             call.bytes.visible = x[1];
           });

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
        const led::LinearParams params{dtype,
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
        Recording::launch([&table, params] { table.few_rows_linear(params); });
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
        Recording::launch([&table, params] { table.few_rows_add_norm(params); });
      },
      "Layer norm of residual + block.");
  m.def(
      "cpu_write_rows",
      [](led::DType dtype, const std::array<int64_t, 4>& sizes, int64_t slots, const Memory& position,
         const Rows& from, const Rows& to, const std::string& isa) {
        const KernelTable& table = kernels(isa);
        const led::WriteRowsParams params{
            dtype,          sizes[0],    sizes[1], sizes[2], sizes[3], slots, pointer<int64_t>(position),
            rows_ref(from), rows_ref(to)};
        led::check_call(params, position[1], from[4], to[4]);
        Recording::launch([&table, params] { table.write_rows(params); });
      },
      "Rows into slots of a cache; sizes are batch, heads, rows, head_dim.");
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
