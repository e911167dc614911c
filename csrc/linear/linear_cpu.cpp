// Dispatch, blocks and threads. Rows are taken in chunks: prepared once, by all threads, they then stream past one panel
// of weights after the other, each packed by whoever takes it into its own second cache. Packing in every call costs a
// few hundredths of the products' time, and there is nothing that could go stale and no second copy of the model.

#include <algorithm>
#include <cstdlib>
#include <new>

#include "common/isa.h"
#include "common/memory.h"
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
        case Isa::kAvx512: kernel = linear_avx512(); return true;
        case Isa::kAvx512Vnni: kernel = linear_avx512();
#if defined(MEDITOK_HAVE_AMX)
            if (has_tiles()) kernel = linear_amx();
#endif
            return true;
#endif
        default: return false;
    }
}

constexpr int64_t kChunkBytes = 3 << 19;  // of prepared rows, which stream past each panel
constexpr int64_t kItemsEach = 4;         // items a thread gets, so that one held up does not hold up all
constexpr int64_t kScalarRows = 8;

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Scratch memory that a calling thread keeps from call to call: fresh pages would cost as much as a tenth of the products.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    char* bytes(int64_t count) {  // starts on a cache line
        if (count > size_) {
            std::free(data_);
            data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(count, 64) * 64)));
            size_ = data_ == nullptr ? 0 : count;
            if (data_ == nullptr) throw std::bad_alloc();
        }
        return data_;
    }

  private:
    char* data_ = nullptr;
    int64_t size_ = 0;
};
thread_local Scratch spare_scratch, rows_scratch;

}  // namespace

void linear_cpu(const LinearParams& params, int threads) {
    if (params.rows == 0 || params.columns == 0) return;
    prefer_huge_pages(params.out, params.rows * params.columns * 4);
    LinearKernel kernel;
    if (!choose_kernel(kernel)) {
        parallel_for(ceil_div(params.rows, kScalarRows), threads, [&](int, int64_t item) {
            const int64_t begin = item * kScalarRows, end = begin + kScalarRows;
            linear_scalar(params, begin, end < params.rows ? end : params.rows, 0, params.columns);
        });
        return;
    }
    const int64_t width = ceil_div(params.width, kPad) * kPad;
    const int64_t outputs = params.activation == Activation::kGeglu ? kPanel / 2 : kPanel;  // of a panel
    const int64_t panels = ceil_div(params.columns, outputs), tiles = ceil_div(params.rows, kernel.tile_rows);
    const int64_t tile_bytes = kernel.tile_rows * width * kernel.bytes;
    auto count = [&](int64_t tile, int64_t end) {  // of rows in tiles tile to end
        return std::min(end * kernel.tile_rows, params.rows) - tile * kernel.tile_rows;
    };

    // Chunks of equal size, give or take a tile. An item is a group of panels; where panels are few for the threads, it is
    // one panel and a part of the tiles.
    const int64_t most = std::max<int64_t>(kChunkBytes / tile_bytes, 1);
    const int64_t chunks = ceil_div(tiles, most), chunk_tiles = ceil_div(tiles, chunks);
    const int64_t items = kItemsEach * threads;
    const int64_t group = std::max<int64_t>(panels / items, 1), groups = ceil_div(panels, group);
    const int64_t parts = std::min(ceil_div(items, groups), chunk_tiles);
    char* rows = rows_scratch.bytes(chunk_tiles * tile_bytes);
    const int64_t spare_bytes = ceil_div(kernel.spare(chunk_tiles * kernel.tile_rows, width), 64) * 64;
    char* spare =
        spare_scratch.bytes(participants(std::max(groups * parts, chunk_tiles), threads) * spare_bytes);
    for (int64_t first = 0; first < tiles; first += chunk_tiles) {
        const int64_t here = std::min(chunk_tiles, tiles - first);
        parallel_for(here, threads, [&](int participant, int64_t tile) {
            kernel.prepare(params, (first + tile) * kernel.tile_rows, count(first + tile, first + tile + 1),
                           rows + tile * tile_bytes, spare + participant * spare_bytes);
        });
        parallel_for(groups * parts, threads, [&](int participant, int64_t item) {
            const int64_t part = item % parts, begin = here * part / parts, end = here * (part + 1) / parts;
            const int64_t panel = item / parts * group;
            kernel.run(params, (first + begin) * kernel.tile_rows, count(first + begin, first + end),
                       rows + begin * tile_bytes, panel, std::min(panel + group, panels),
                       spare + participant * spare_bytes);
        });
    }
}

}  // namespace meditok
