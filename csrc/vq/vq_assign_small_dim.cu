// vq_assign for widths up to 32: a thread a row, the row in registers, codes passing by through shared memory.
//   1. Each thread scales and rounds its row to float32 and bounds its norm; NaN, zero and extreme rows leave here.
//   2. Stages of 128 codes are copied to shared memory; eight chains of fused multiply-adds run on broadcasts.
//   3. The largest of the eight raises the lower bound of the best score (vq_filter.h). Only an octet that reaches
//      it is looked at code by code, and only two codes in one band are scored in float64.
// Traffic: x once, ids once, the packed codebook once a block (from the second-level cache). Bound by multiply-adds.

#include "common/check.h"
#include "vq/vq_cuda.h"

namespace meditok {

namespace {

constexpr int kThreads = 128;
constexpr int kStageTiles = 4;
constexpr int kStageCodes = kStageTiles * static_cast<int>(kTileCodes);
constexpr int kOctet = 8;
static_assert(kTileCodes % kOctet == 0, "octets fill a tile");

template <int kWidth>
struct Stage {
    float4 code[kStageTiles * kWidth * kTileCodes / 4];  // (tile, column, 32)
    float bias[kStageCodes], radius[kStageCodes], reach[kStageTiles];
};
static_assert(sizeof(Stage<32>) <= 48 * 1024, "static shared memory of every architecture");

template <int kWidth>
__device__ void load_stage(Stage<kWidth>& stage, const PackedView& view, int64_t first, int count,
                           int64_t width) {
    float* code = reinterpret_cast<float*>(stage.code);
    for (int i = threadIdx.x; i < count * kWidth * static_cast<int>(kTileCodes); i += kThreads) {
        const int tile = i / (kWidth * static_cast<int>(kTileCodes)),
                  rest = i % (kWidth * static_cast<int>(kTileCodes));
        const int column = rest / static_cast<int>(kTileCodes);
        code[i] = column < width ? view.tiles[(first + tile) * width * kTileCodes + rest] : 0.0f;
    }
    for (int i = threadIdx.x; i < count * static_cast<int>(kTileCodes); i += kThreads) {
        stage.bias[i] = view.bias[first * kTileCodes + i];
        stage.radius[i] = view.radius[first * kTileCodes + i];
    }
    if (static_cast<int>(threadIdx.x) < count) stage.reach[threadIdx.x] = view.reach[first + threadIdx.x];
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 4)
    assign_small_dim_kernel(const __grid_constant__ AssignParams params,
                            const __grid_constant__ PackedLayout layout, Bound bound) {
    __shared__ Stage<kWidth> stage;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t width = params.codebook.width;
    const bool cosine = params.metric == Metric::kCosine;
    for (int64_t group = blockIdx.y; group < params.codebook.groups; group += gridDim.y) {
        const PackedView view = packed_view(params.packed, layout, group);

        // 1. The row.
        const bool present = row < params.rows;
        double largest = 0.0, sum = 0.0;
        bool finite = true;
        for (int64_t i = 0; i < width && present; ++i) {
            const double value = fabs(x_element(params, row, group, i));
            finite = finite && is_finite(value);
            largest = fmax(largest, value);
        }
        const bool zero = cosine && largest == 0.0;  // every score is 0: the first choosable code
        const bool extreme =
            cosine ? !(largest < kLargestCosine && largest > kSmallestCosine) : !(largest < kLargestL2);
        double scale = 1.0;
        if (cosine && finite && !zero && !extreme) {
            int exponent;
            frexp(largest, &exponent);
            scale = ldexp(1.0, -exponent);
        }
        const bool settled = !present || !finite || zero || view.group->choosable == 0;
        float x[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const double value =
                i < width && !settled && !extreme ? x_element(params, row, group, i) * scale : 0.0;
            sum += value * value;
            x[i] = static_cast<float>(value);
        }
        const double norm = sqrt(sum);
        const float x_norm = static_cast<float>(norm) * kRoundUp;
        const bool canonical = extreme || !(norm < kLargestL2) || view.group->unsafe > 0;
        const bool filter = !settled && !canonical;

        // 2. and 3. The codes.
        Search search;
        for (int64_t first = 0; first < layout.tiles; first += kStageTiles) {
            const int count =
                static_cast<int>(layout.tiles - first < kStageTiles ? layout.tiles - first : kStageTiles);
            __syncthreads();
            load_stage(stage, view, first, count, width);
            __syncthreads();
            if (!filter) continue;
            for (int octet = 0; octet < count * static_cast<int>(kTileCodes) / kOctet; ++octet) {
                const int tile = octet * kOctet / static_cast<int>(kTileCodes);
                const int lane = octet * kOctet % static_cast<int>(kTileCodes);
                float value[kOctet];
#pragma unroll
                for (int j = 0; j < kOctet; ++j) value[j] = stage.bias[octet * kOctet + j];
#pragma unroll
                for (int column = 0; column < kWidth; ++column) {
                    const float4* code =
                        stage.code + ((tile * kWidth + column) * static_cast<int>(kTileCodes) + lane) / 4;
                    const float4 low = code[0], high = code[1];
                    value[0] = __fmaf_rn(x[column], low.x, value[0]);
                    value[1] = __fmaf_rn(x[column], low.y, value[1]);
                    value[2] = __fmaf_rn(x[column], low.z, value[2]);
                    value[3] = __fmaf_rn(x[column], low.w, value[3]);
                    value[4] = __fmaf_rn(x[column], high.x, value[4]);
                    value[5] = __fmaf_rn(x[column], high.y, value[5]);
                    value[6] = __fmaf_rn(x[column], high.z, value[6]);
                    value[7] = __fmaf_rn(x[column], high.w, value[7]);
                }
                float best = value[0];
#pragma unroll
                for (int j = 1; j < kOctet; ++j) best = fmaxf(best, value[j]);
                const float margin = bound_of(bound, x_norm, stage.reach[tile]);
                if (!(best + margin >= search.lower)) continue;
                search.raise(best, margin);
                unsigned reached = 0;
#pragma unroll
                for (int j = 0; j < kOctet; ++j) {
                    const float upper = value[j] + bound_of(bound, x_norm, stage.radius[octet * kOctet + j]);
                    reached |= (value[j] > -INFINITY && upper >= search.lower) ? 1u << j : 0u;
                }
                for (; reached != 0; reached &= reached - 1) {
                    const int64_t code =
                        first * kTileCodes + octet * kOctet + __ffs(static_cast<int>(reached)) - 1;
                    search.consider(params, view, row, group, code,
                                    best + margin);  // an upper bound for all eight
                }
            }
        }

        if (!present) continue;
        int64_t id = search.best.code;
        if (settled) {
            id = finite ? view.group->first_choosable : -1;  // -1 as well if no code may be chosen
        } else if (canonical) {
            Best best;
            for (int64_t code = 0; code < params.codebook.codes; ++code) {
                const double code_norm = view.norm[code];
                if (code_norm == code_norm)
                    best.consider(device_score(params, row, group, code, code_norm), code);
            }
            id = best.code;
        }
        params.ids[row * params.codebook.groups + group] = id;
    }
}

template <int kWidth>
void launch(const AssignParams& params, cudaStream_t stream) {
    const PackedLayout layout =
        packed_layout(params.codebook.groups, params.codebook.codes, params.codebook.width);
    const int64_t blocks = (params.rows + kThreads - 1) / kThreads;
    const int64_t groups = params.codebook.groups;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups < 65535 ? groups : 65535));
    assign_small_dim_kernel<kWidth>
        <<<grid, kThreads, 0, stream>>>(params, layout, make_bound(params.codebook.width));
    cuda_check(cudaGetLastError(), "vq_assign (small width)");
}

}  // namespace

void launch_assign_small_dim(const AssignParams& params, int device, void* stream) {
    DeviceGuard guard(device);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const int64_t width = params.codebook.width;
    if (width <= 4) {
        launch<4>(params, queue);
    } else if (width <= 8) {
        launch<8>(params, queue);
    } else if (width <= 16) {
        launch<16>(params, queue);
    } else {
        launch<32>(params, queue);
    }
}

}  // namespace meditok
