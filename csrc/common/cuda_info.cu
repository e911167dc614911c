#include "common/check.h"
#include "common/cuda_info.h"

namespace meditok {

namespace {

__global__ void probe() {}

}  // namespace

int cuda_driver() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// Minor versions of one major release are compatible, so the driver has to support the release's first.
int cuda_driver_needed() {
    return CUDART_VERSION / 1000 * 1000;
}

std::string cuda_problem(int device) {
    try {
        DeviceGuard guard(device);
        cudaFuncAttributes attributes;
        cudaDeviceProp properties;
        cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
        if (cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) return "";
        cudaGetLastError();  // clears it
        return "this build has no code for device " + std::to_string(device) + " (" + properties.name +
               ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor) +
               "), only for " MEDITOK_CUDA_ARCHITECTURES;
    } catch (const std::exception& error) {
        cudaGetLastError();
        return error.what();
    }
}

}  // namespace meditok
