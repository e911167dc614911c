// Dispatch and threads: an item is a row of the small map.

#include "common/isa.h"
#include "common/memory.h"
#include "common/threads.h"
#include "upsample/upsample.h"

namespace meditok {

namespace {

UpsampleKernel choose_kernel() {
    switch (current_isa()) {
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return upsample_avx2();
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512:
        case Isa::kAvx512Vnni: return upsample_avx512();
#endif
        default: return upsample_scalar();
    }
}

}  // namespace

void differences_cpu(const DifferencesParams& params, int threads) {
    const UpsampleKernel kernel = choose_kernel();
    const int64_t h = params.height, w = params.width, channels = params.channels, line = w * channels;
    if (line == 0) return;
    prefer_huge_pages(params.tall, params.batch * (h + 1) * line * 4);
    prefer_huge_pages(params.wide, params.batch * h * (line + channels) * 4);
    prefer_huge_pages(params.both, params.batch * (h + 1) * (line + channels) * 4);
    parallel_for(params.batch * (h + 1), threads, [&](int, int64_t item) {
        const int64_t image = item / (h + 1), row = item % (h + 1);
        const float* below = row < h ? params.x + (image * h + row) * line : nullptr;
        const float* above = row > 0 ? params.x + (image * h + row - 1) * line : nullptr;
        float* tall = params.tall + item * line;
        kernel.subtract(below, above, line, tall);
        // Along w: the first difference is the first pixel, the last one minus the last pixel.
        auto along = [&](const float* x, float* out) {
            kernel.subtract(x, nullptr, channels, out);
            kernel.subtract(x + channels, x, line - channels, out + channels);
            kernel.subtract(nullptr, x + line - channels, channels, out + line);
        };
        along(tall, params.both + item * (line + channels));
        if (below != nullptr) along(below, params.wide + (image * h + row) * (line + channels));
    });
}

void gather_cpu(const GatherParams& params, int threads) {
    const UpsampleKernel kernel = choose_kernel();
    const int64_t h = params.height, w = params.width, channels = params.channels;
    if (channels == 0) return;
    prefer_huge_pages(params.out, 4 * params.batch * h * w * channels * 4);
    parallel_for(params.batch * h, threads, [&](int, int64_t item) {
        const int64_t image = item / h, row = item % h;
        for (int64_t p = 0; p < 2; ++p) {
            const int64_t between = image * (h + 1) + row + p;  // row of tall and both
            float* out = params.out + (2 * item + p) * 2 * w * channels;
            for (int64_t j = 0; j < w; ++j) {
                for (int64_t q = 0; q < 2; ++q, out += channels) {
                    const float* parts[4] = {
                        params.level + (item * w + j) * channels,
                        params.tall + ((between * w + j) * 2 + p) * channels,
                        params.wide + ((item * (w + 1) + j + q) * 2 + q) * channels,
                        params.both + ((between * (w + 1) + j + q) * 4 + 2 * p + q) * channels,
                    };
                    // Those of the pixel after the next one: short runs far apart, which the machine does not foresee.
                    if (j + 1 < w) {
                        constexpr int64_t kSteps[4] = {1, 2, 2, 4};
                        for (int part = q == 0 ? 0 : 2; part < 4; ++part) {
                            const float* later = parts[part] + kSteps[part] * channels;
                            for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(later + c);
                        }
                    }
                    kernel.pixel(params, parts, out);
                }
            }
        }
    });
}

}  // namespace meditok
