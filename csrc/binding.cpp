// Python's view of the kernels: every tensor comes as (address, dtype name, shape, strides), so that the extension
// neither includes nor links torch and one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>

#include "cpu/kernels.hpp"

namespace py = pybind11;
using corrmatch::DType;
using corrmatch::Tensor;

namespace {

DType dtype_from_name(const std::string& name) {
  static const std::map<std::string, DType> names{
      {"bool", DType::boolean},    {"uint8", DType::uint8},       {"int8", DType::int8},
      {"int16", DType::int16},     {"int32", DType::int32},       {"int64", DType::int64},
      {"float16", DType::float16}, {"bfloat16", DType::bfloat16}, {"float32", DType::float32},
      {"float64", DType::float64},
  };
  const auto found = names.find(name);
  if (found == names.end()) throw std::invalid_argument("no kernel takes dtype " + name);
  return found->second;
}

Tensor make_tensor(uintptr_t address, const std::string& dtype, const std::vector<int64_t>& shape,
                   const std::vector<int64_t>& stride) {
  Tensor tensor;
  if (shape.size() > tensor.size.size() || shape.size() != stride.size())
    throw std::invalid_argument("a tensor of at most 4 dimensions was expected");
  tensor.data = reinterpret_cast<void*>(address);
  tensor.dtype = dtype_from_name(dtype);
  const size_t lead = tensor.size.size() - shape.size();
  for (size_t i = 0; i < shape.size(); ++i) {
    tensor.size[lead + i] = shape[i];
    tensor.stride[lead + i] = stride[i];
  }
  return tensor;
}

// Wraps one entry of the table; None stands for an absent tensor, and the GIL is released while the kernel runs.
template <auto Member>
struct Bind;
template <class... Args, void (*corrmatch::CpuKernels::*Member)(Args...)>
struct Bind<Member> {
  template <class T>
  struct Argument {
    using type = T;
    static T get(const T& x) { return x; }
  };
  template <class T>
    requires std::is_same_v<T, Tensor>
  struct Argument<T> {
    using type = std::optional<Tensor>;
    static Tensor get(const std::optional<Tensor>& x) { return x.value_or(Tensor{}); }
  };
  static void call(const typename Argument<Args>::type&... args) {
    py::gil_scoped_release release;
    (corrmatch::cpu_kernels().*Member)(Argument<Args>::get(args)...);
  }
};

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using corrmatch::CpuKernels;
  m.doc() = "Compiled kernels of corrmatch; corrmatch.ops is the interface.";
  py::class_<Tensor>(m, "Tensor").def(py::init(&make_tensor));

  m.attr("cuda_status") = CORRMATCH_CUDA_STATUS;

  py::module_ cpu = m.def_submodule("cpu");
  cpu.def("isa", [] { return std::string(corrmatch::cpu_kernels().isa); });
  cpu.def("isas", &corrmatch::cpu_isas);
  cpu.def("select_isa", &corrmatch::select_cpu_isa);
  cpu.def("pixel_propagate_forward", &Bind<&CpuKernels::pixel_propagate_forward>::call);
  cpu.def("pixel_propagate_backward", &Bind<&CpuKernels::pixel_propagate_backward>::call);
  cpu.def("region_masks", &Bind<&CpuKernels::region_masks>::call);
  cpu.def("region_propagate", &Bind<&CpuKernels::region_propagate>::call);
  cpu.def("connected_components", &Bind<&CpuKernels::connected_components>::call);
  cpu.def("pseudo_label", &Bind<&CpuKernels::pseudo_label>::call);
}
