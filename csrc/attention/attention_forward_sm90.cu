// attention for short sequences on Hopper: wgmma products on boxes that the copy engine brings (common/hopper.cuh). For
// fp16 and bfloat16, widths up to 64, causal or without a mask, and keys that fit into shared memory (512 in half of it).
//
// A block of two warpgroups holds all keys and values of one head, 64 at a time on a barrier of their own, so that work
// begins with the first. Each warpgroup takes every second tile of 64 queries of the block's:
//   1. its first thread asks for the queries;
//   2. for each box of keys: scores = q kᵀ (both operands from shared memory), softmax as in attention_forward.cu,
//      out += p v, the p from registers, v as it lies;
//   3. out / sum of p through shared memory to the strides given.
// Nothing but the queries' boxes is loaded twice, and these have no second reader. Heads are split over several blocks
// only where there would be too few of them to fill the device.
// Traffic: q, k, v and out once (k and v once per block of a head), which is the floor; loads need no registers and no
// addresses. Why so: at 256 keys 98 KiB a block leave room for two of them, whose four warpgroups cover each other's
// loads and exponentials; 64 scores a row keep a thread under 128 registers for that.

#include "attention/attention_tiles.cuh"
#include "common/hopper.cuh"

namespace meditok {

namespace {

constexpr int kGroups = 2, kBlockThreads = kGroups * 128;
constexpr int kWidth = 64, kStagingStride = kRowBytes<half_bits, kWidth>;
constexpr int kStagingBytes = kBoxRows * kStagingStride;

// q, k and v as the copy engine sees them: columns, then head and token with the smaller stride first, then batch.
struct Maps {
    CUtensorMap map[3];
};

struct Plan {
    int splits;  // blocks of a head
    int boxes;   // of keys
    int bytes;
    bool head_first[3], out_vectors;
};

[[maybe_unused]] __device__ inline void fetch_box(void* box, const Maps& maps, const Plan& plan, int which,
                                                  uint64_t* barrier, int token, int head, int batch) {
    const bool head_first = plan.head_first[which];
    copy_box(box, &maps.map[which], barrier, 0, head_first ? head : token, head_first ? token : head, batch);
}

template <class Operand>
__device__ __forceinline__ void forward_sm90(const AttentionParams& params, const Maps& maps,
                                             const Plan& plan, unsigned char* memory) {
    constexpr bool kBfloat16 = Operand::kArchitecture == 80;
    using Element = typename Operand::Element;
    unsigned char* keys_box =
        memory + (kBoxAlignment - shared_address(memory) % kBoxAlignment) % kBoxAlignment;
    unsigned char* values_box = keys_box + plan.boxes * kBoxBytes;
    unsigned char* queries_box = values_box + plan.boxes * kBoxBytes;
    unsigned char* staging = queries_box + kGroups * kBoxBytes;
    uint64_t* barriers =
        reinterpret_cast<uint64_t*>(staging + kGroups * kStagingBytes);  // queries', then keys'

    const bool causal = params.mask_kind == MaskKind::kCausal;
    const int heads = static_cast<int>(params.heads), keys = static_cast<int>(params.keys);
    const int queries = static_cast<int>(params.queries), row_tiles = (queries + kBoxRows - 1) / kBoxRows;
    const int split = static_cast<int>(blockIdx.x) % plan.splits;
    const int pair = static_cast<int>(blockIdx.x) / plan.splits;
    const int head = pair % heads, batch = pair / heads;
    const int group = thread_id() / 128;
    const float scale = static_cast<float>(params.scale) * kLog2E;
    auto boxes_of = [&](int tile) {  // that the queries of a tile look at
        const int last = causal && (tile + 1) * kBoxRows < keys ? (tile + 1) * kBoxRows : keys;
        return (last + kBoxRows - 1) / kBoxRows;
    };

    if (thread_id() == 0) {
        for (int i = 0; i < kGroups + plan.boxes; ++i) init_barrier(barriers + i);
        fence_barriers();
    }
    __syncthreads();
    if (thread_id() == 0) {
        const int turns = (row_tiles + kGroups - 1) / kGroups;
        const int last_turn = turns - 1 - (turns - 1 - split) % plan.splits;  // of this block
        const int last_tile = last_turn * kGroups + kGroups - 1;
        const int boxes = boxes_of(last_tile < row_tiles ? last_tile : row_tiles - 1);
        for (int box = 0; box < boxes; ++box) {
            expect_bytes(barriers + kGroups + box, 2 * kBoxBytes);
            fetch_box(keys_box + box * kBoxBytes, maps, plan, 1, barriers + kGroups + box, box * kBoxRows,
                      head, batch);
            fetch_box(values_box + box * kBoxBytes, maps, plan, 2, barriers + kGroups + box, box * kBoxRows,
                      head, batch);
        }
    }
    unsigned char* own_queries = queries_box + group * kBoxBytes;
    const int warp_row = thread_id() / 32 % 4 * 16;
    unsigned char* own_staging = staging + group * kStagingBytes + warp_row * kStagingStride;
    const auto out_head = head_of<Element>(params.out, params.out_strides, batch, head, params.queries,
                                           params.width, plan.out_vectors);
    int parity = 0;
#pragma unroll 1
    for (int tile = split * kGroups + group; tile < row_tiles; tile += plan.splits * kGroups) {
        const int first_row = tile * kBoxRows;
        meet_warpgroup(group);  // the products of the tile before have read its queries
        if (thread_id() % 128 == 0) {
            expect_bytes(barriers + group, kBoxBytes);
            fetch_box(own_queries, maps, plan, 0, barriers + group, first_row, head, batch);
        }
        wait_barrier(barriers + group, parity);
        parity ^= 1;
        float out[8][4], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
#pragma unroll 1
        for (int box = 0; box < boxes_of(tile); ++box) {
            wait_barrier(barriers + kGroups + box, 0);  // passed for good once the box is there
            float score[8][4];
#pragma unroll
            for (int n = 0; n < 8; ++n) score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.0f;
            begin_products(score);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                wgmma<kBfloat16>(score, box_descriptor(own_queries, step * 32),
                                 box_descriptor(keys_box + box * kBoxBytes, step * 32), step > 0);
            }
            end_products(score);
            const int first_key = box * kBoxRows;
            const bool cut =
                !(scale > 0.0f) || is_cut(causal, first_row + warp_row, first_key, kBoxRows, keys);
            if (cut) apply_mask<false>(score, scale, nullptr, causal, first_row + warp_row, first_key, keys);
            float shrink[2];
            softmax_step(score, cut ? 1.0f : scale, largest, sum, shrink);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                out[n][0] *= shrink[0], out[n][1] *= shrink[0];
                out[n][2] *= shrink[1], out[n][3] *= shrink[1];
            }
            uint32_t p[4][4];
#pragma unroll
            for (int step = 0; step < 4; ++step) pack_a<Operand>(p[step], score, step);
            begin_products(out, p);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                wgmma_transposed<kBfloat16>(out, p[step],
                                            box_descriptor(values_box + box * kBoxBytes, step * 2048));
            }
            end_products(out);
        }
        float factor[2];
        finish_softmax(factor, params, batch, head, first_row + warp_row, largest, sum);
        put_rows<Operand, kWidth>(own_staging, out, factor[0], factor[1]);
        __syncwarp();
        store_rows<16, kWidth>(own_staging, out_head, first_row + warp_row);
        __syncwarp();
    }
}

template <class Operand>
__global__ void __launch_bounds__(MEDITOK_HOPPER ? kBlockThreads : 32, 2)
    attention_sm90_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ Maps maps,
                          const __grid_constant__ Plan plan) {
    extern __shared__ uint4 shared[];
    if constexpr (MEDITOK_HOPPER)
        forward_sm90<Operand>(params, maps, plan, reinterpret_cast<unsigned char*>(shared));
}

// ---- launch ------------------------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, asked for at run time so that the module loads without a driver; null where it has none.
Encode tensor_map_encoder() {
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
        const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                    12000, cudaEnableDefault, &found);
        return status == cudaSuccess && found == cudaDriverEntryPointSuccess
                   ? reinterpret_cast<Encode>(function)
                   : nullptr;
    }();
    return encode;
}

// False where the copy engine does not take the array: columns apart, strides that are no multiples of 16 bytes, that
// overlap, or that do not divide one another.
bool encode_map(CUtensorMap& map, bool& head_first, const void* data, const AttentionStrides& strides,
                const AttentionParams& params, int64_t tokens) {
    head_first = strides.head <= strides.token;
    const int64_t stride[3] = {head_first ? strides.head : strides.token,
                               head_first ? strides.token : strides.head, strides.batch};
    const int64_t size[3] = {head_first ? params.heads : tokens, head_first ? tokens : params.heads,
                             params.batch};
    if (!has_vectors(data, strides, params.width, params.type)) return false;
    cuuint64_t sizes[4] = {static_cast<cuuint64_t>(params.width)}, bytes[3];
    int64_t inner_size = params.width, inner_stride = 1;
    for (int i = 0; i < 3; ++i) {
        // An axis of one row may have any stride; the next larger that is allowed stands for it.
        const int64_t step = size[i] == 1 ? inner_size * inner_stride : stride[i];
        if (step < inner_size * inner_stride || step % inner_stride != 0 || step >= int64_t{1} << 38)
            return false;
        sizes[i + 1] = static_cast<cuuint64_t>(size[i]);
        bytes[i] = static_cast<cuuint64_t>(step * 2);
        inner_size = size[i];
        inner_stride = step;
    }
    const cuuint32_t rows = kBoxRows;
    const cuuint32_t box[4] = {kWidth, head_first ? 1 : rows, head_first ? rows : 1, 1},
                     steps[4] = {1, 1, 1, 1};
    const CUtensorMapDataType type =
        params.type == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return tensor_map_encoder()(&map, type, 4, const_cast<void*>(data), sizes, bytes, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class Operand>
void launch(const AttentionParams& params, const Maps& maps, const Plan& plan, cudaStream_t stream) {
    const unsigned grid = grid_of(plan.splits * params.batch * params.heads);
    cuda_check(cudaFuncSetAttribute(attention_sm90_kernel<Operand>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes),
               "attention (sm_90) shared memory");
    attention_sm90_kernel<Operand><<<grid, kBlockThreads, plan.bytes, stream>>>(params, maps, plan);
    cuda_check(cudaGetLastError(), "attention (sm_90)");
}

}  // namespace

bool launch_attention_sm90(const AttentionParams& params, const Place& place) {
    const bool plain = params.mask_kind == MaskKind::kNone || params.mask_kind == MaskKind::kCausal;
    const bool halves = params.type == Dtype::kFloat16 || params.type == Dtype::kBfloat16;
    if (place.architecture != 90 || !plain || !halves || params.mean || params.width > kWidth ||
        params.keys == 0) {
        return false;
    }
    const int64_t boxes = (params.keys + kBoxRows - 1) / kBoxRows;
    const int64_t bytes = kBoxAlignment + (2 * boxes + kGroups) * kBoxBytes + kGroups * kStagingBytes +
                          (kGroups + boxes) * static_cast<int64_t>(sizeof(uint64_t));
    if (bytes > place.shared_bytes) return false;
    const DeviceGuard guard(place.device);
    const bool compiled = params.type == Dtype::kFloat16
                              ? is_compiled(attention_sm90_kernel<HalfOperand>, kBlockThreads)
                              : is_compiled(attention_sm90_kernel<Bfloat16Operand>, kBlockThreads);
    if (!compiled || tensor_map_encoder() == nullptr) return false;
    Maps maps;
    Plan plan{1, static_cast<int>(boxes), static_cast<int>(bytes), {}, false};
    if (!encode_map(maps.map[0], plan.head_first[0], params.q, params.q_strides, params, params.queries) ||
        !encode_map(maps.map[1], plan.head_first[1], params.k, params.k_strides, params, params.keys) ||
        !encode_map(maps.map[2], plan.head_first[2], params.v, params.v_strides, params, params.keys)) {
        return false;
    }
    plan.out_vectors = has_vectors(params.out, params.out_strides, params.width, params.type);
    const int64_t turns = (params.queries + kGroups * kBoxRows - 1) / (kGroups * kBoxRows);
    const int64_t heads = params.batch * params.heads;
    while (plan.splits < turns && heads * plan.splits < place.multiprocessors) ++plan.splits;
    const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
    if (params.type == Dtype::kFloat16) {
        launch<HalfOperand>(params, maps, plan, stream);
    } else {
        launch<Bfloat16Operand>(params, maps, plan, stream);
    }
    return true;
}

}  // namespace meditok
