// Launches the kernels of primitives.cu and faults.cu from Python.
#include "planted.cuh"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

namespace py = pybind11;
using Size = std::array<unsigned, 3>;

namespace {

std::string launch(const std::string& name, const py::buffer& given, const py::buffer& taken, const Size& grid,
                   const Size& block, const Size& cluster, size_t shared, int opt_in) {
  const auto kernel = (primitives.contains(name) ? primitives : faults).at(name);
  const py::buffer_info in = given.request(), out = taken.request(true);
  if (opt_in) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in);
    if (const auto error = cudaGetLastError(); error != cudaSuccess) return cudaGetErrorName(error);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster[0], cluster[1], cluster[2]};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(block[0], block[1], block[2]);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  py::gil_scoped_release release;
  const auto error = cudaLaunchKernelEx(&config, kernel, Buffers{in.ptr, out.ptr, int(in.size)});
  if (cudaGetLastError() != error || cudaGetLastError() != cudaSuccess)
    throw std::logic_error("the last error is not that of the launch");
  return cudaGetErrorName(error);
}

}  // namespace

PYBIND11_MODULE(corrmatch_planted, m) {
  using namespace py::literals;
  m.def("launch", &launch, "name"_a, "given"_a, "taken"_a, py::kw_only(), "grid"_a = Size{1, 1, 1},
        "block"_a = Size{32, 1, 1}, "cluster"_a = Size{1, 1, 1}, "shared"_a = 0, "opt_in"_a = 0);
  m.def("error_string", [](int error) { return std::string(cudaGetErrorString(cudaError_t(error))); });
  m.def("attributes", [] {
    std::map<std::string, int> found;
    cudaDeviceGetAttribute(&found["multiprocessors"], cudaDevAttrMultiProcessorCount, 0);
    cudaDeviceGetAttribute(&found["major"], cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&found["minor"], cudaDevAttrComputeCapabilityMinor, 0);
    cudaDeviceGetAttribute(&found["shared"], cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    cudaFuncAttributes code;
    cudaFuncGetAttributes(&code, faults.at("race"));
    found["ptx"] = code.ptxVersion;
    found["binary"] = code.binaryVersion;
    return found;
  });
}
