// What the CUDA side of this build needs and finds. Works without a driver.
#pragma once

#include <string>

namespace meditok {

int cuda_driver();  // newest CUDA version the driver supports, 1000 * major + 10 * minor; 0 without a driver
int cuda_driver_needed();  // what the runtime in this build needs, same notation

// "" if this build has code for the device, else the reason in one line.
std::string cuda_problem(int device);

}  // namespace meditok
