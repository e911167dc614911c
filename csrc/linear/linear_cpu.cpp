// Dispatch, blocks and threads. Rows are taken in chunks: prepared once, by all threads, they then stream past one panel
// of weights after the other, each packed by whoever takes it into its own second cache. Packing in every call costs a
// few hundredths of the products' time, and there is nothing that could go stale and no second copy of the model.

#include <cstdlib>
#include <new>

#include "common/isa.h"
#include "common/threads.h"
#include "linear/linear.h"

namespace meditok {

namespace {

bool choose_kernel(LinearKernel& kernel) {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: kernel = linear_avx2(); return true;
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512:
        case Isa::kAvx512Vnni: kernel = linear_avx512(); return true;
#endif
        default: return false;
    }
}

constexpr int64_t kChunkFloats = 512 * 1024;  // of prepared rows: 2 MiB, which stream past each panel
constexpr int64_t kItemsEach = 4;             // items a thread gets, so that one held up does not hold up all
constexpr int64_t kScalarRows = 8;

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Scratch memory that a calling thread keeps from call to call: fresh pages would cost as much as a tenth of the products.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    float* floats(int64_t count) {  // starts on a cache line
        if (count > size_) {
            std::free(data_);
            data_ =
                static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(count, 16) * 64)));
            size_ = data_ == nullptr ? 0 : count;
            if (data_ == nullptr) throw std::bad_alloc();
        }
        return data_;
    }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};
thread_local Scratch packed_scratch, rows_scratch;

// Where tile number `tile` of a panel finds its share of the next panel's weights, 2 width floats of them: what is kept
// for the first 16 tiles' way past. `packed` where there is nothing left to fetch.
const float* later_weights(const LinearParams& params, int64_t panel, int64_t tile, const float* packed) {
    const bool gated = params.activation == Activation::kGeglu;
    const int64_t rows = gated ? kPanel / 2 : kPanel, share = 2 * tile;
    const float* weight = gated && share >= rows ? params.gate_weight : params.weight;
    const int64_t row = panel * rows + share % rows;
    return share < kPanel && row + 2 <= params.columns ? weight + row * params.width : packed;
}

}  // namespace

void linear_cpu(const LinearParams& params, int threads) {
    if (params.rows == 0 || params.columns == 0) return;
    LinearKernel kernel;
    if (!choose_kernel(kernel)) {
        parallel_for(ceil_div(params.rows, kScalarRows), threads, [&](int, int64_t item) {
            const int64_t begin = item * kScalarRows, end = begin + kScalarRows;
            linear_scalar(params, begin, end < params.rows ? end : params.rows);
        });
        return;
    }
    const int64_t width = ceil_div(params.width, 16) * 16;
    const int64_t outputs = params.activation == Activation::kGeglu ? kPanel / 2 : kPanel;  // of a panel
    const int64_t panels = ceil_div(params.columns, outputs), tiles = ceil_div(params.rows, kernel.tile_rows);
    const int64_t tile_floats = kernel.tile_rows * width, panel_floats = kPanel * width;
    auto count = [&](int64_t tile) {
        const int64_t left = params.rows - tile * kernel.tile_rows;
        return left < kernel.tile_rows ? left : kernel.tile_rows;
    };

    // Chunks of equal size, give or take a tile. An item is a group of panels; where panels are few for the threads, it is
    // one panel and a part of the tiles.
    const int64_t most = kChunkFloats / tile_floats > 1 ? kChunkFloats / tile_floats : 1;
    const int64_t chunks = ceil_div(tiles, most), chunk_tiles = ceil_div(tiles, chunks);
    const int64_t items = kItemsEach * threads;
    const int64_t group = panels / items > 1 ? panels / items : 1, groups = ceil_div(panels, group);
    const int64_t parts = ceil_div(items, groups) < chunk_tiles ? ceil_div(items, groups) : chunk_tiles;
    float* rows = rows_scratch.floats(chunk_tiles * tile_floats);
    float* packed = packed_scratch.floats(participants(groups * parts, threads) * panel_floats);
    for (int64_t first = 0; first < tiles; first += chunk_tiles) {
        const int64_t here = first + chunk_tiles < tiles ? chunk_tiles : tiles - first;
        parallel_for(here, threads, [&](int, int64_t tile) {
            kernel.prepare(params, (first + tile) * kernel.tile_rows, count(first + tile),
                           rows + tile * tile_floats);
        });
        parallel_for(groups * parts, threads, [&](int participant, int64_t item) {
            const int64_t part = item % parts, begin = here * part / parts, end = here * (part + 1) / parts;
            const int64_t end_panel =
                (item / parts + 1) * group < panels ? (item / parts + 1) * group : panels;
            float* here_packed = packed + participant * panel_floats;
            for (int64_t panel = item / parts * group; panel < end_panel; ++panel) {
                kernel.pack(params, panel, here_packed);
                for (int64_t tile = begin; tile < end; ++tile) {
                    const float* later = here_packed;
                    if (panel + 1 < end_panel)
                        later = later_weights(params, panel + 1, tile - begin, here_packed);
                    kernel.run(params, (first + tile) * kernel.tile_rows, count(first + tile),
                               rows + tile * tile_floats, panel, here_packed, later);
                }
            }
        });
    }
}

}  // namespace meditok
