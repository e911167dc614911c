// Products of float32 by multiply-adds on vectors, written once; included inside an anonymous namespace after
// linear_rows.inl.h, with kTileRows set.
//
// A tile of kTileRows rows meets a panel of 32 columns, 2 kWidth columns at a time, with all sums in registers over the
// whole width: per k two loads of weights and one broadcast a row feed 2 kTileRows multiply-adds, so that both ports
// multiply every cycle. Tiles lie as (width / 16, rows, 16): addresses inside are constants, and a row is written in
// vectors without a transposition.

constexpr int64_t kSpan = 256;  // values of k added up in one chain; chains are then added, which rounds less
constexpr int64_t kAhead = 16;  // values of k whose weights are asked for before they are needed
constexpr int64_t kFetch = 2;   // rows of the next weights that are fetched on the way through a tile
constexpr int64_t kPasses = kPanel / (2 * kWidth);
static_assert(kPanel % (2 * kWidth) == 0, "whole passes over a panel");
static_assert(kSpan % kBlock == 0, "whole blocks in a chain");

// Packed as (padded width, kPanel).
void pack_panel(const LinearParams& params, int64_t panel, float* packed) {
    const int64_t width = params.width, whole = width / kWidth * kWidth;
    for (int64_t first = 0; first < kPanel; first += kWidth) {
        for (int64_t k = 0; k < padded_width(params); k += kWidth) {
            Vec block[kWidth];
            for (int64_t i = 0; i < kWidth; ++i) {
                const float* from = weight_row(params, panel, first + i);
                if (from == nullptr || k >= width) {
                    block[i] = fill(0.0f);
                } else {
                    block[i] = k < whole ? load(from + k) : load_first(from + k, width - whole);
                }
            }
            transpose(block);
            for (int64_t i = 0; i < kWidth; ++i) store(packed + (k + i) * kPanel + first, block[i]);
        }
    }
}

void prepare_tile(const LinearParams& params, int64_t row, int64_t count, void* tile, void*) {
    for (int64_t r = 0; r < count; ++r) {  // rows past the last are never read
        prepare_row(params, row + r, static_cast<float*>(tile) + r * kBlock);
    }
}

// Products of kRows rows and 2 kWidth columns over `width` values of k, added to sums (kRows, kPanel). On the way 32
// floats a block are fetched from `later` on into the second cache: weights that are packed next, whose way from memory
// hides behind this.
template <int kRows>
void multiply(const float* tile, const float* packed, int64_t width, const float* later, float* sums) {
    Vec left[kRows], right[kRows];
    for (int r = 0; r < kRows; ++r) left[r] = right[r] = fill(0.0f);
    for (int64_t block = 0; block < width; block += kBlock) {
        __builtin_prefetch(later + 2 * block, 0, 2);
        __builtin_prefetch(later + 2 * block + kBlock, 0, 2);
        for (int64_t k = 0; k < kBlock; ++k) {
            const Vec a = load(packed), b = load(packed + kWidth);
            __builtin_prefetch(packed + kAhead * kPanel);
            __builtin_prefetch(packed + kAhead * kPanel + kWidth);
            __builtin_prefetch(tile + kBlock * (kTileRows + k));
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const Vec x = fill(tile[r * kBlock + k]);
                left[r] = fma(x, a, left[r]);
                right[r] = fma(x, b, right[r]);
            }
            packed += kPanel;
        }
        tile += kBlock * kTileRows;
    }
    for (int r = 0; r < kRows; ++r) {
        float* to = sums + r * kPanel;
        store(to, add(load(to), left[r]));
        store(to + kWidth, add(load(to + kWidth), right[r]));
    }
}

using Multiply = void (*)(const float* tile, const float* packed, int64_t width, const float* later,
                          float* sums);

template <int... kRows>
struct Counts {};
template <int kCount, int... kRows>
struct UpTo : UpTo<kCount - 1, kCount, kRows...> {};
template <int... kRows>
struct UpTo<0, kRows...> {
    using Type = Counts<kRows...>;
};

template <int... kRows>
MEDITOK_INLINE Multiply choose(int64_t count, Counts<kRows...>) {
    constexpr Multiply table[] = {multiply<kRows>...};
    return table[count - 1];
}

void run_tile(const LinearParams& params, int64_t row, int64_t count, const float* tile, int64_t panel,
              const float* packed, const float* later) {
    alignas(64) float sums[kTileRows * kPanel] = {};
    const int64_t width = padded_width(params);
    const Multiply multiply_rows = choose(count, typename UpTo<kTileRows>::Type{});
    for (int64_t k = 0; k < width; k += kSpan) {
        const int64_t span = k + kSpan < width ? kSpan : width - k;
        for (int64_t pass = 0; pass < kPasses; ++pass) {
            multiply_rows(tile + k * kTileRows, packed + k * kPanel + pass * 2 * kWidth, span, later + 2 * k,
                          sums + pass * 2 * kWidth);
        }
    }
    for (int64_t r = 0; r < count; ++r) finish(params, row + r, panel, sums + r * kPanel);
}

int64_t spare_bytes(int64_t, int64_t width) {  // a packed panel
    return kPanel * width * static_cast<int64_t>(sizeof(float));
}

void run_panels(const LinearParams& params, int64_t row, int64_t count, const void* tiles, int64_t panel,
                int64_t last, void* spare) {
    float* packed = static_cast<float*>(spare);
    for (; panel < last; ++panel) {
        pack_panel(params, panel, packed);
        const float* tile = static_cast<const float*>(tiles);
        for (int64_t first = 0; first < count; first += kTileRows, tile += kTileRows * padded_width(params)) {
            // The first 16 tiles fetch a sixteenth of the next weights each; where nothing is left, what is here anyway.
            const int64_t share = first / kTileRows * kFetch;
            const float* later = packed;
            if (panel + 1 < last && share < kPanel &&
                weight_row(params, panel + 1, share + kFetch - 1) != nullptr) {
                later = weight_row(params, panel + 1, share);
            }
            const int64_t here = count - first < kTileRows ? count - first : kTileRows;
            run_tile(params, row + first, here, tile, panel, packed, later);
        }
    }
}
