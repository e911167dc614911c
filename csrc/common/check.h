// Errors at the border of the core: entries throw std::invalid_argument for what the caller did wrong and
// std::runtime_error for what the machine did; the bindings turn both into Python exceptions.
#pragma once

#include <stdexcept>
#include <string>

namespace meditok {

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace meditok

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace meditok {

inline void cuda_check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// Makes `device` current for the lifetime of the guard; other threads and the caller's choice are untouched.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        cuda_check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (previous_ != device) cuda_check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = previous_ != device;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

}  // namespace meditok
#endif
