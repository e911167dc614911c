// vq_assign for any width: a block a row and group, a lane a code.
//   1. The block reads the row into shared memory as scaled float32 and bounds its norm.
//   2. Warps share the tiles; a column of a tile is one 128-byte load, the row's element a broadcast. Every lane
//      keeps its own search (vq_filter.h).
//   3. The largest lower bound of all lanes decides who is still in the band; one code left is the answer, several
//      are scored in float64 and the best, lowest code wins.
// Rows wider than the shared memory, and extreme ones, are scored in float64 throughout.

#include "common/check.h"
#include "common/warp.cuh"
#include "vq/vq_cuda.h"

namespace meditok {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxWidth = 8192;
static_assert(kMaxWidth * sizeof(float) <= 32 * 1024, "leaves room below 48 KiB of static shared memory");

// The largest value of any thread, known to all.
__device__ float block_max(float value, float* scratch) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (int i = 1; i < kWarps; ++i) value = fmaxf(value, scratch[i]);
    return value;
}

__global__ void __launch_bounds__(kThreads, 2)
    assign_large_dim_kernel(const __grid_constant__ AssignParams params,
                            const __grid_constant__ PackedLayout layout, Bound bound) {
    __shared__ float x[kMaxWidth];
    __shared__ float scratch[kWarps];
    __shared__ double scores[kThreads];
    __shared__ int64_t codes[kThreads];
    const int64_t row = blockIdx.x, width = params.codebook.width;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const bool cosine = params.metric == Metric::kCosine;
    for (int64_t group = blockIdx.y; group < params.codebook.groups; group += gridDim.y) {
        const PackedView view = packed_view(params.packed, layout, group);
        int64_t* id = params.ids + row * params.codebook.groups + group;

        // 1. The row. The exponent of the largest element is all the scaling needs, so it travels as a float.
        float exponent = -1e9f;
        bool infinite = false;
        for (int64_t i = thread; i < width; i += kThreads) {
            const double value = x_element(params, row, group, i);
            infinite = infinite || !is_finite(value);
            int power;
            frexp(value, &power);
            if (value != 0.0) exponent = fmaxf(exponent, static_cast<float>(power));
        }
        infinite = __syncthreads_or(infinite) != 0;
        exponent = block_max(exponent, scratch);
        const bool zero = exponent < -1e8f;
        if (infinite || view.group->choosable == 0 || (cosine && zero)) {
            if (thread == 0) *id = infinite ? -1 : view.group->first_choosable;
            continue;  // the same for the whole block
        }
        bool canonical = view.group->unsafe > 0 || width > kMaxWidth;
        canonical = canonical || (cosine ? fabsf(exponent) > 499.0f : exponent > 60.0f);
        Search search;
        if (!canonical) {
            const double scale = cosine ? ldexp(1.0, -static_cast<int>(exponent)) : 1.0;
            const float unit = cosine || zero ? 1.0f : ldexpf(1.0f, static_cast<int>(exponent));
            float squares = 0.0f;  // of x / unit, so that nothing overflows
            for (int64_t i = thread; i < width; i += kThreads) {
                const float value = static_cast<float>(x_element(params, row, group, i) * scale);
                x[i] = value;
                squares += (value / unit) * (value / unit);
            }
            squares = warp_sum(squares);
            __syncthreads();
            if (lane == 0) scratch[warp] = squares;
            __syncthreads();
            squares = 0.0f;
            for (int i = 0; i < kWarps; ++i) squares += scratch[i];
            // Each thread adds at most 32 squares and the trees a few more: 1.0001 is an upper bound with
            // room.
            const float x_norm = sqrtf(squares) * unit * 1.0001f;
            canonical = !(x_norm < static_cast<float>(kLargestL2));

            // 2. The codes.
            for (int64_t tile = warp; tile < layout.tiles && !canonical; tile += kWarps) {
                const float* code = view.tiles + tile * width * kTileCodes + lane;
                float value = view.bias[tile * kTileCodes + lane];
                for (int64_t i = 0; i < width; ++i) value = __fmaf_rn(x[i], code[i * kTileCodes], value);
                if (!(value > -INFINITY)) continue;
                const float margin = bound_of(bound, x_norm, view.radius[tile * kTileCodes + lane]);
                search.raise(value, margin);
                search.consider(params, view, row, group, tile * kTileCodes + lane, value + margin);
            }
        }

        // 3. The answer.
        Best best = search.best;
        bool scored = search.scored;
        if (canonical) {
            best = Best{};
            for (int64_t code = thread; code < params.codebook.codes; code += kThreads) {
                const double norm = view.norm[code];
                if (norm == norm) best.consider(device_score(params, row, group, code, norm), code);
            }
            scored = true;
        } else {
            const float lower = block_max(search.lower, scratch);
            if (!(search.upper >= lower)) best.code = -1;
        }
        const int contenders = __syncthreads_count(best.code >= 0);
        if (contenders == 1) {
            if (best.code >= 0) *id = best.code;
            continue;
        }
        if (best.code >= 0 && !scored)
            best.score = device_score(params, row, group, best.code, view.norm[best.code]);
        scores[thread] = best.score;
        codes[thread] = best.code;
        for (int half = kThreads / 2; half > 0; half /= 2) {
            __syncthreads();
            if (thread >= half) continue;
            const int other = thread + half;
            const bool better = codes[thread] < 0 || scores[other] > scores[thread] ||
                                (scores[other] == scores[thread] && codes[other] < codes[thread]);
            if (codes[other] >= 0 && better) {
                scores[thread] = scores[other];
                codes[thread] = codes[other];
            }
        }
        if (thread == 0) *id = codes[0];
        __syncthreads();
    }
}

}  // namespace

void launch_assign_large_dim(const AssignParams& params, int device, void* stream) {
    DeviceGuard guard(device);
    const PackedLayout layout =
        packed_layout(params.codebook.groups, params.codebook.codes, params.codebook.width);
    const int64_t groups = params.codebook.groups;
    const dim3 grid(static_cast<unsigned>(params.rows),
                    static_cast<unsigned>(groups < 65535 ? groups : 65535));
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    assign_large_dim_kernel<<<grid, kThreads, 0, queue>>>(params, layout, make_bound(params.codebook.width));
    cuda_check(cudaGetLastError(), "vq_assign (large width)");
}

}  // namespace meditok
