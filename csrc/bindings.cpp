// Python bindings: pointers, shapes and strides in; no logic. The GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "attention_params.h"
#include "cpu/kernel_table.h"
#if defined(LED_KERNELS_WITH_CUDA)
  #include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

using led::AttentionParams;
using led::DecodeParams;
using led::KernelTable;
using led::LseRef;
using led::RowsRef;

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

// (address, batch stride, row stride, head stride), strides in elements
RowsRef rows_ref(const std::array<int64_t, 4>& x) {
  return {reinterpret_cast<void*>(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3]};
}

// (address, batch stride, head stride)
LseRef lse_ref(const std::array<int64_t, 3>& x) {
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

void require(bool good, const char* message) {
  if (!good) throw py::value_error(message);
}

void check_sizes(const AttentionParams& params) {
  require(params.head_dim >= 1 && params.head_dim <= led::kMaxHeadDim, "head_dim is not 1 to 256.");
  require(params.batch >= 0 && params.heads >= 0 && params.max_seqlen >= 0, "a size is negative.");
  require(params.window_left >= 0 && params.window_right >= 0, "a side of the window is negative.");
  require(params.num_threads >= 1, "num_threads is below 1.");
  const bool has_work = params.batch > 0 && params.heads > 0 && params.max_seqlen > 0;
  require(!has_work || params.k.data != nullptr, "k was not set.");
}

void check_sizes(const DecodeParams& params) {
  check_sizes(static_cast<const AttentionParams&>(params));
  require(params.queries >= 0, "a size is negative.");
  require(params.max_seqlen >= 1, "there are no keys.");
}

// Whether a mask keeps the kernels inside their tensors: `rows` of each batch entry, or of all sequences when
// packed. Its values are compared where they can be read.
void check_mask(const AttentionParams& p, int64_t rows, bool on_host) {
  require(p.batch >= 0 && p.max_seqlen >= 0 && rows >= 0 && p.mask.max_globals >= 0,
          "a size of the mask is negative.");
  require(p.mask.packed || rows == p.max_seqlen, "the mask's rows are not max_seqlen.");
  if (!on_host) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t start = p.mask.seq_start[b], len = p.mask.seq_len[b], count = p.mask.num_globals[b];
    require(len >= 0 && len <= p.max_seqlen, "seq_len of the mask is not 0 to max_seqlen.");
    require(start >= 0 && start + len <= rows && (p.mask.packed || start == 0),
            "seq_start of the mask lies outside its rows.");
    require(count >= 0 && count <= p.mask.max_globals, "num_globals of the mask is not 0 to max_globals.");
    const int32_t* index = p.mask.global_index + b * p.mask.max_globals;
    for (int64_t slot = 0; slot < count; ++slot) {
      require(index[slot] >= 0 && index[slot] < len && (slot == 0 || index[slot] > index[slot - 1]),
              "global_index of the mask does not ascend inside its sequence.");
    }
  }
}

// Calls of CPU kernels with their pointers, to be made again by one call: what a captured graph is on a GPU.
class Recording {
 public:
  void enter() { current = this; }
  void exit() { current = nullptr; }
  void replay() const {
    for (const auto& call : calls_) call();
  }
  template <class Call>
  static void launch(const Call& call) {
    if (current != nullptr) current->calls_.emplace_back(call);
    py::gil_scoped_release release;
    call();
  }

 private:
  static thread_local Recording* current;
  std::vector<std::function<void()>> calls_;
};
thread_local Recording* Recording::current = nullptr;

template <class Params>
auto cpu_launcher(void (*KernelTable::*kernel)(const Params&)) {
  return [kernel](const Params& params, const std::string& isa) {
    const KernelTable& table = kernels(isa);
    check_sizes(params);
    Recording::launch([&table, kernel, params] { (table.*kernel)(params); });
  };
}

#if defined(LED_KERNELS_WITH_CUDA)
auto cuda_launcher(void (*kernel)(const AttentionParams&)) {
  return [kernel](const AttentionParams& params) {
    check_sizes(params);
    if (params.dtype == led::DType::kFloat64) throw py::value_error("dtype is float64.");
    py::gil_scoped_release release;
    kernel(params);
  };
}

void define_cuda(py::module_& m) {
  namespace cuda = led::cuda;
  m.def("cuda_banded_forward", cuda_launcher(cuda::banded_forward));
  m.def("cuda_banded_backward", cuda_launcher(cuda::banded_backward));
  m.def("cuda_global_forward", cuda_launcher(cuda::global_forward));
  m.def("cuda_global_backward", cuda_launcher(cuda::global_backward));
  m.def("cuda_banded_forward_workspace", &cuda::banded_forward_workspace);
  m.def("cuda_banded_backward_workspace", &cuda::banded_backward_workspace);
  m.def("cuda_global_forward_workspace", &cuda::global_forward_workspace);
  m.def("cuda_global_backward_workspace", &cuda::global_backward_workspace);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled attention kernels of led_kernels.";

  py::enum_<led::DType>(m, "DType")
      .value("float32", led::DType::kFloat32)
      .value("float64", led::DType::kFloat64)
      .value("float16", led::DType::kFloat16)
      .value("bfloat16", led::DType::kBFloat16);

  py::class_<AttentionParams> params(m, "AttentionParams");
  params.def(py::init<>())
      .def_readwrite("dtype", &AttentionParams::dtype)
      .def_readwrite("batch", &AttentionParams::batch)
      .def_readwrite("max_seqlen", &AttentionParams::max_seqlen)
      .def_readwrite("heads", &AttentionParams::heads)
      .def_readwrite("head_dim", &AttentionParams::head_dim)
      .def_readwrite("window_left", &AttentionParams::window_left)
      .def_readwrite("window_right", &AttentionParams::window_right)
      .def_readwrite("softmax_scale", &AttentionParams::softmax_scale)
      .def_readwrite("dropout_p", &AttentionParams::dropout_p)
      .def_readwrite("dropout_seed", &AttentionParams::dropout_seed)
      .def_readwrite("num_threads", &AttentionParams::num_threads)
      .def_readwrite("device", &AttentionParams::device)
      .def_readwrite("stream", &AttentionParams::stream)
      .def("set_device_seed",
           [](AttentionParams& p, uintptr_t address) { p.device_seed = pointer<int64_t>(address); })
      .def("set_workspace",
           [](AttentionParams& p, uintptr_t address) { p.workspace = reinterpret_cast<float*>(address); })
      .def("set_mask",
           [](AttentionParams& p, uintptr_t seq_start, uintptr_t seq_len, uintptr_t token_kind,
              uintptr_t padding_before, uintptr_t global_index, uintptr_t num_globals, int64_t rows,
              int64_t max_globals, bool packed, bool on_host) {
             p.mask = {pointer<int32_t>(seq_start),
                       pointer<int32_t>(seq_len),
                       pointer<uint8_t>(token_kind),
                       pointer<int32_t>(padding_before),
                       pointer<int32_t>(global_index),
                       pointer<int32_t>(num_globals),
                       packed ? 0 : rows,
                       max_globals,
                       packed};
             check_mask(p, rows, on_host);
           })
      .def("set_lse", [](AttentionParams& p, const std::array<int64_t, 3>& x) { p.lse = lse_ref(x); })
      .def("set_d_lse", [](AttentionParams& p, const std::array<int64_t, 3>& x) { p.d_lse = lse_ref(x); });
  const std::pair<const char*, RowsRef AttentionParams::*> tensors[] = {
      {"set_q", &AttentionParams::q},         {"set_k", &AttentionParams::k},
      {"set_v", &AttentionParams::v},         {"set_out", &AttentionParams::out},
      {"set_dq", &AttentionParams::dq},       {"set_dk", &AttentionParams::dk},
      {"set_d_out", &AttentionParams::d_out}, {"set_dv", &AttentionParams::dv}};
  for (const auto& [name, member] : tensors) {
    params.def(name, [member = member](AttentionParams& p, const std::array<int64_t, 4>& x) {
      p.*member = rows_ref(x);
    });
  }

  py::class_<DecodeParams, AttentionParams>(m, "DecodeParams")
      .def(py::init<>())
      .def_readwrite("queries", &DecodeParams::queries)
      .def("set_visible", [](DecodeParams& p, uintptr_t address, int64_t batch_stride, int64_t query_stride) {
        p.visible = {pointer<uint8_t>(address), batch_stride, query_stride};
      });

  m.def("cpu_isas", &cpu_isas, "Instruction sets that this build holds and this processor runs, best first.");
  m.def("cpu_banded_forward", cpu_launcher(&KernelTable::banded_forward));
  m.def("cpu_banded_backward", cpu_launcher(&KernelTable::banded_backward));
  m.def("cpu_global_forward", cpu_launcher(&KernelTable::global_forward));
  m.def("cpu_global_backward", cpu_launcher(&KernelTable::global_backward));
  m.def("cpu_decode_attention", cpu_launcher(&KernelTable::decode_attention));
  m.def(
      "cpu_few_rows_linear",
      [](led::DType dtype, const std::array<int64_t, 3>& sizes, uintptr_t x, int64_t x_stride,
         uintptr_t weight, int64_t weight_stride, uintptr_t bias, uintptr_t y, bool gelu, int num_threads,
         const std::string& isa) {
        const KernelTable& table = kernels(isa);
        require(sizes[0] >= 0 && sizes[1] >= 1 && sizes[2] >= 0 && num_threads >= 1 && weight_stride >= 0,
                "a size is negative or zero.");
        const led::LinearParams params{dtype,
                                       sizes[0],
                                       sizes[1],
                                       sizes[2],
                                       pointer<void>(x),
                                       pointer<void>(weight),
                                       pointer<void>(bias),
                                       reinterpret_cast<void*>(y),
                                       x_stride,
                                       weight_stride,
                                       gelu,
                                       num_threads};
        Recording::launch([&table, params] { table.few_rows_linear(params); });
      },
      "x weightᵀ + bias, then GELU if asked for; sizes are rows, in_features, out_features.");
  m.def(
      "cpu_few_rows_add_norm",
      [](led::DType dtype, int64_t rows, int64_t features, uintptr_t residual, uintptr_t block,
         uintptr_t weight, uintptr_t bias, uintptr_t y, double eps, const std::string& isa) {
        const KernelTable& table = kernels(isa);
        require(rows >= 0 && features >= 1, "a size is negative or zero.");
        const led::AddNormParams params{dtype,
                                        rows,
                                        features,
                                        pointer<void>(residual),
                                        pointer<void>(block),
                                        pointer<void>(weight),
                                        pointer<void>(bias),
                                        reinterpret_cast<void*>(y),
                                        eps};
        Recording::launch([&table, params] { table.few_rows_add_norm(params); });
      },
      "Layer norm of residual + block.");
  m.def(
      "cpu_write_rows",
      [](led::DType dtype, const std::array<int64_t, 4>& sizes, int64_t slots, uintptr_t position,
         const std::array<int64_t, 4>& from, const std::array<int64_t, 4>& to, const std::string& isa) {
        const KernelTable& table = kernels(isa);
        for (const int64_t size : sizes) require(size >= 0 && slots >= 0, "a size is negative.");
        const led::WriteRowsParams params{
            dtype,          sizes[0],    sizes[1], sizes[2], sizes[3], slots, pointer<int64_t>(position),
            rows_ref(from), rows_ref(to)};
        Recording::launch([&table, params] { table.write_rows(params); });
      },
      "Rows into slots of a cache; sizes are batch, heads, rows, head_dim.");
  py::class_<Recording>(m, "Recording")
      .def(py::init<>())
      .def("__enter__", &Recording::enter)
      .def("__exit__", [](Recording& recording, const py::args&) { recording.exit(); })
      .def("replay", &Recording::replay, py::call_guard<py::gil_scoped_release>());
#if defined(LED_KERNELS_WITH_CUDA)
  define_cuda(m);
#endif
}
