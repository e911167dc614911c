// The driver's tensor maps, as much as csrc/ uses of them, with the requirements of its documentation.
#pragma once

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
    const unsigned char* start;
    uint64_t size[4], stride[4];  // in elements; in bytes
    uint32_t box[4];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* start,
                                       const cuuint64_t* size, const cuuint64_t* stride,
                                       const cuuint32_t* box, const cuuint32_t* step, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    bool valid = rank == 4 && reinterpret_cast<uintptr_t>(start) % 16 == 0 && box[0] * 2 <= 128;
    map->start = static_cast<const unsigned char*>(start);
    for (int i = 0; i < 4; ++i) {
        map->size[i] = size[i];
        map->stride[i] = i == 0 ? 2 : stride[i - 1];
        map->box[i] = box[i];
        valid = valid && size[i] > 0 && size[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
                step[i] == 1;
        if (i == 0) continue;
        valid = valid && map->stride[i] % 16 == 0 && map->stride[i] < uint64_t{1} << 40;
        valid = valid && map->stride[i] % map->stride[i - 1] == 0;
        valid = valid && map->stride[i] >= size[i - 1] * map->stride[i - 1];
    }
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Of the runtime, by which the driver's functions are found.
enum cudaDriverEntryPointQueryResult {
    cudaDriverEntryPointSuccess = 0,
    cudaDriverEntryPointSymbolNotFound = 1
};
constexpr unsigned long long cudaEnableDefault = 0;

template <class Status = cudaError_t>
Status cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                        cudaDriverEntryPointQueryResult* found) {
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
    *found = cudaDriverEntryPointSuccess;
    return static_cast<Status>(0);
}
