// The Python binding of the operators. A tensor is passed as (address, dtype name, shape, strides). So the extension
// neither includes nor links torch, and one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>

#ifndef CORRMATCH_EMULATOR
#include "cpu/table.hpp"
#endif
#ifdef CORRMATCH_CUDA
#include "cuda/ops.hpp"
#endif

namespace py = pybind11;
using corrmatch::DType;
using corrmatch::OptionalTensor;
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

// The Python type of a parameter. None stands for a tensor that is absent.
template <class T>
struct Argument {
  using type = T;
  static const T& get(const T& x) { return x; }
};
template <>
struct Argument<OptionalTensor> {
  using type = std::optional<Tensor>;
  static OptionalTensor get(const type& x) { return x ? OptionalTensor(*x) : OptionalTensor(); }
};

// Wraps an operator: an entry of the CPU's table, or a function. It runs without the GIL.
template <auto Kernel>
struct Bind;
#ifndef CORRMATCH_EMULATOR
template <class... Args, void (*corrmatch::CpuTable::*Member)(Args...)>
struct Bind<Member> {
  static void call(const typename Argument<Args>::type&... args) {
    py::gil_scoped_release release;
    (corrmatch::cpu_table().*Member)(Argument<Args>::get(args)...);
  }
};
#endif
template <class Result, class... Args, Result (*Function)(Args...)>
struct Bind<Function> {
  static Result call(const typename Argument<Args>::type&... args) {
    py::gil_scoped_release release;
    return Function(Argument<Args>::get(args)...);
  }
};

}  // namespace

// The emulated module (tests/emulator) has only the CUDA kernels. Both modules accept descriptions of tensors made by
// the other.
#ifdef CORRMATCH_EMULATOR
PYBIND11_MODULE(corrmatch_emulated, m, py::mod_gil_not_used()) {
#else
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
#endif
  m.doc() = "Compiled kernels of corrmatch; corrmatch.ops is the interface.";
  py::class_<Tensor>(m, "Tensor", py::module_local()).def(py::init(&make_tensor));

  m.attr("cuda_status") = CORRMATCH_CUDA_STATUS;

#ifdef CORRMATCH_CUDA
  py::module_ cuda = m.def_submodule("cuda");
#define OP(name, parameters) cuda.def(#name, &Bind<&corrmatch::cuda::name>::call);
#define SCRATCH(name, parameters) cuda.def(#name, &Bind<&corrmatch::cuda::name>::call);
#include "cuda/ops.def"
#undef OP
#undef SCRATCH
#endif

#ifndef CORRMATCH_EMULATOR
  using corrmatch::CpuTable;
  py::module_ cpu = m.def_submodule("cpu");
  cpu.def("isa", [] { return std::string(corrmatch::cpu_table().isa); });
  cpu.def("isas", &corrmatch::cpu_isas);
  cpu.def("select_isa", &corrmatch::select_cpu_isa);
#define OP(name, parameters) cpu.def(#name, &Bind<&CpuTable::name>::call);
#include "cpu/ops.def"
#undef OP
#endif
}
