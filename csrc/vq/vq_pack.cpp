// Packing a codebook: filter codes in tiles of 32, their bounds, and the canonical norms. One pass over the
// codebook plus a hash table that finds exact copies, which can never win against the code they copy. A second pass
// writes the filter codes in 16 bits where vq_filter.h says that helps.

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common/threads.h"
#include "vq/vq_large_dim.h"

namespace meditok {

namespace {

// Codes seen so far, by value; -0 and 0 count as equal because they score equally.
class Seen {
  public:
    explicit Seen(int64_t codes) {
        size_t size = 16;
        while (size < static_cast<size_t>(codes) * 2) size *= 2;
        slots_.assign(size, -1);
    }

    // True if an equal code was inserted before; `equal(k)` compares the new code with code k.
    template <class Equal>
    bool insert(uint64_t hash, int64_t code, Equal&& equal) {
        for (size_t slot = hash & (slots_.size() - 1);; slot = (slot + 1) & (slots_.size() - 1)) {
            if (slots_[slot] < 0) {
                slots_[slot] = static_cast<int32_t>(code);
                return false;
            }
            if (equal(slots_[slot])) return true;
        }
    }

  private:
    std::vector<int32_t> slots_;
};

// Sum of the bits of the elements times odd numbers, mixed; -0 counts as 0.
uint64_t hash_of(const double* row, int64_t width) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull;
    uint64_t hash = 0;
    for (int64_t i = 0; i < width; ++i) {
        const double plain = row[i] + 0.0;
        uint64_t bits;
        std::memcpy(&bits, &plain, sizeof bits);
        hash += (bits ^ bits >> 32) * (kOdd + 2 * static_cast<uint64_t>(i));
    }
    hash = (hash ^ hash >> 32) * kOdd;
    return hash ^ hash >> 29;
}

template <class T>
void pack_group(const Codebook& codebook, Metric metric, const PackedLayout& layout, int64_t group,
                unsigned char* packed) {
    const int64_t width = codebook.width;
    const T* codes = static_cast<const T*>(codebook.data) + group * codebook.group_stride;
    auto value = [&](int64_t code, int64_t i) {
        return to_double(codes[code * codebook.code_stride + i * codebook.column_stride]);
    };
    const PackedView view = packed_view(packed, layout, group);
    float* tiles = const_cast<float*>(view.tiles);
    float* bias = const_cast<float*>(view.bias);
    float* radius = const_cast<float*>(view.radius);
    float* reach = const_cast<float*>(view.reach);
    double* norms = const_cast<double*>(view.norm);
    PackedGroup& info = *const_cast<PackedGroup*>(view.group);
    info = PackedGroup{0, -1, 0};
    Seen seen(codebook.codes);
    std::vector<double> row(static_cast<size_t>(width));

    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
        for (int64_t lane = 0; lane < kTileCodes; ++lane) {
            const int64_t code = tile * kTileCodes + lane;
            float* column = tiles + tile * width * kTileCodes + lane;  // element i at column[i * 32]
            float& code_bias = bias[code];
            float& code_radius = radius[code];
            code_bias = -std::numeric_limits<float>::infinity();
            if (code >= codebook.codes) continue;

            for (int64_t i = 0; i < width; ++i) row[i] = value(code, i);
            const double norm = canonical_norm(row.data(), 1, width);
            norms[code] = norm;
            if (norm != norm) continue;
            ++info.choosable;
            if (info.first_choosable < 0) info.first_choosable = code;

            double largest = 0.0;
            for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(row[i]));
            const bool copy = seen.insert(hash_of(row.data(), width), code, [&](int64_t other) {
                for (int64_t i = 0; i < width; ++i) {
                    if (row[i] != value(other, i)) return false;
                }
                return true;
            });
            if (copy) continue;

            if (metric == Metric::kCosine) {
                const bool safe = norm < kLargestCosine && (largest == 0.0 || largest > kSmallestCosine);
                if (!safe) {
                    ++info.unsafe;
                    continue;
                }
                const double factor = 1.0 / norm;
                for (int64_t i = 0; i < width; ++i)
                    column[i * kTileCodes] = static_cast<float>(row[i] * factor);
                code_bias = 0.0f;
                code_radius = 1.0f;
            } else {
                if (!(norm < kLargestL2)) {
                    ++info.unsafe;
                    continue;
                }
                double square = 0.0;  // norm has a floor, the length has none
                for (int64_t i = 0; i < width; ++i) {
                    square += row[i] * row[i];
                    column[i * kTileCodes] = static_cast<float>(row[i]);
                }
                code_bias = static_cast<float>(-0.5 * square);
                code_radius = static_cast<float>(norm) * kRoundUp;
            }
            reach[tile] = std::max(reach[tile], code_radius);
        }
    }
}

// Mean of the filter codes, the mean square of their distance from it, and the shortest norm.
struct Spread {
    std::vector<double> mean;
    double square = 0.0, shortest = std::numeric_limits<double>::infinity();
};

Spread spread_of(const PackedView& view, const PackedLayout& layout, int64_t width) {
    constexpr int64_t kSums = 8;  // so that additions need not wait for each other
    Spread spread{std::vector<double>(static_cast<size_t>(width))};
    int64_t count = 0;
    for (int64_t at = 0; at < layout.tiles * kTileCodes; ++at) {
        if (!(view.bias[at] > -std::numeric_limits<float>::infinity())) continue;
        spread.shortest = std::min(spread.shortest, view.norm[at]);
        ++count;
    }
    const double share = 1.0 / static_cast<double>(std::max<int64_t>(count, 1));
    for (int64_t i = 0; i < width; ++i) {
        double sums[kSums] = {}, squares[kSums] = {};
        for (int64_t tile = 0; tile < layout.tiles; ++tile) {  // codes that are none of the filter's are 0
            const float* column = view.tiles + (tile * width + i) * kTileCodes;
            for (int64_t lane = 0; lane < kTileCodes; lane += kSums) {
                for (int64_t l = 0; l < kSums; ++l) {
                    const double element = column[lane + l];
                    sums[l] += element;
                    squares[l] += element * element;
                }
            }
        }
        double sum = 0.0, square = 0.0;
        for (int64_t l = 0; l < kSums; ++l) {
            sum += sums[l];
            square += squares[l];
        }
        spread.mean[i] = sum * share;
        spread.square += square * share - spread.mean[i] * spread.mean[i];
    }
    return spread;
}

// Measures the filter codes of a cosine codebook from their mean, as if for l2 (vq_filter.h).
template <class T>
void centre_codes(const Codebook& codebook, const std::vector<double>& mean, const PackedLayout& layout,
                  int64_t group, unsigned char* packed) {
    const int64_t width = codebook.width;
    const T* codes = static_cast<const T*>(codebook.data) + group * codebook.group_stride;
    const PackedView view = packed_view(packed, layout, group);
    PackedGroup& info = *const_cast<PackedGroup*>(view.group);
    float* tiles = const_cast<float*>(view.tiles);
    float* reach = const_cast<float*>(view.reach);
    info.centred = 1;
    std::copy(mean.begin(), mean.end(), const_cast<double*>(view.centre));
    std::fill(reach, reach + layout.tiles, 0.0f);
    for (int64_t code = 0; code < codebook.codes; ++code) {
        float& bias = const_cast<float&>(view.bias[code]);
        if (!(bias > -std::numeric_limits<float>::infinity())) continue;
        const int64_t tile = code / kTileCodes;
        const double factor = 1.0 / view.norm[code];
        double square = 0.0;
        for (int64_t i = 0; i < width; ++i) {
            const double element = to_double(codes[code * codebook.code_stride + i * codebook.column_stride]);
            const double centred = element * factor - mean[i];
            square += centred * centred;
            tiles[(tile * width + i) * kTileCodes + code % kTileCodes] = static_cast<float>(centred);
        }
        bias = static_cast<float>(-0.5 * square);
        const float radius = static_cast<float>(std::sqrt(square)) * kRoundUp;
        const_cast<float&>(view.radius[code]) = radius;
        reach[tile] = std::max(reach[tile], radius);
    }
}

// Writes the words of 4 bytes of a code to its place in tiles (T, words, 32).
template <class Part>
void put_words(const Part* from, int64_t words, int64_t at, Part* tiles) {
    constexpr int64_t kPerWord = 4 / sizeof(Part);
    Part* to = tiles + (at / kTileCodes * words * kTileCodes + at % kTileCodes) * kPerWord;
    for (int64_t w = 0; w < words; ++w) std::memcpy(to + w * kTileCodes * kPerWord, from + w * kPerWord, 4);
}

// The int16 and int8 parts; leaves one out (int16_codes 0, int8_reach 0) where its band would be useless.
template <class T>
void pack_integers(const Codebook& codebook, Metric metric, const PackedLayout& layout, int64_t group,
                   double spread, unsigned char* packed) {
    const int64_t width = codebook.width;
    if (width < kIntegerNarrowest || width > kInt16Widest || (width > kSmallWidth && !reads_wide_int16()))
        return;
    const T* codes = static_cast<const T*>(codebook.data) + group * codebook.group_stride;
    auto value = [&](int64_t code, int64_t i) {
        return to_double(codes[code * codebook.code_stride + i * codebook.column_stride]);
    };
    const PackedView view = packed_view(packed, layout, group);
    PackedGroup& info = *const_cast<PackedGroup*>(view.group);
    int16_t* tiles = const_cast<int16_t*>(view.int16);
    int32_t* slot = const_cast<int32_t*>(view.slot);
    const bool cosine = metric == Metric::kCosine;
    int64_t count = 0;
    double longest = cosine ? 1.0 : 0.0;
    for (int64_t code = 0; code < codebook.codes; ++code) {
        if (!(view.bias[code] > -std::numeric_limits<float>::infinity())) continue;
        slot[count++] = static_cast<int32_t>(code);
        if (!cosine) longest = std::max(longest, view.norm[code]);
    }
    // So few codes are scored whatever their band.
    const bool useful = count <= kIntegerCandidates || longest * longest <= int16_spread(width) * spread;
    if (!(longest >= kInt16SmallestNorm && useful)) return;
    double scale = kInt16Length;
    if (!cosine) {
        scale /= longest * std::sqrt(1.5);
        info.last_column = longest * std::sqrt(0.5);
    }
    info.int16_codes = count;

    const int64_t pairs = int16_pairs(width, metric), quads = int8_quads(width);
    const bool int8 = cosine && width <= kInt8Widest && codebook.codes <= kInt8MostCodes && reads_int8();
    const int64_t step = int8 ? kGroupCodes : kTileCodes, end = (count + step - 1) / step * step;
    std::vector<double> scaled(static_cast<size_t>(width));
    std::vector<int16_t> row16(static_cast<size_t>(pairs * 2));
    std::vector<uint8_t> row8(static_cast<size_t>(quads * 4));
    double reach = 0.0;
    for (int64_t at = 0; at < end; ++at) {
        const bool in_tiles = at < layout.tiles * kTileCodes;
        if (at >= count && in_tiles) slot[at] = slot[0];  // fills the last tile up and is never reported
        const int64_t code = at < count ? slot[at] : slot[0];
        const double factor = cosine ? scale / view.norm[code] : scale;
        double square = 0.0, magnitudes = 0.0;
        for (int64_t i = 0; i < width; ++i) {
            const double element = value(code, i);
            square += element * element;
            scaled[i] = element * factor;
        }
        if (in_tiles) {
            for (int64_t i = 0; i < width; ++i) row16[i] = round_to_int16(scaled[i]);
            if (!cosine) row16[width] = round_to_int16(square / (-2.0 * info.last_column) * scale);
            put_words(row16.data(), pairs, at, tiles);
        }
        if (!int8) continue;
        for (int64_t i = 0; i < width; ++i) {
            const double element = scaled[i] * (kInt8Length / kInt16Length);
            row8[i] = static_cast<uint8_t>(round_to_int16(element) + 128);
            magnitudes += std::fabs(element);
        }
        const int64_t group_at = at / kGroupCodes * kGroupCodes, lane = at % kGroupCodes / 16, part = at % 16;
        put_words(row8.data(), quads, group_at + part * 16 + lane, const_cast<uint8_t*>(view.int8));
        reach = std::max(reach, magnitudes);
    }
    if (int8 && int8_pays(count, width, spread)) info.int8_reach = reach;
}

}  // namespace

void vq_pack_cpu(const Codebook& codebook, Metric metric, unsigned char* packed, int threads) {
    const PackedLayout layout = packed_layout(codebook.groups, codebook.codes, codebook.width);
    const PackedHeader header{kPackedMagic, static_cast<int64_t>(metric), codebook.groups, codebook.codes,
                              codebook.width};
    std::memset(packed, 0, layout.total_bytes);  // the gaps too, so that equal codebooks pack to equal bytes
    std::memcpy(packed, &header, sizeof header);
    for_dtype(codebook.type, [&](auto element) {
        using T = decltype(element);
        parallel_for(codebook.groups, threads, [&](int, int64_t group) {
            pack_group<T>(codebook, metric, layout, group, packed);
            if (codebook.width > kInt16Widest) return;
            const PackedView view = packed_view(packed, layout, group);
            if (view.group->unsafe > 0) return;
            const Spread spread = spread_of(view, layout, codebook.width);
            pack_integers<T>(codebook, metric, layout, group, spread.square, packed);
            // A code whose norm is the floor is shorter than 1 once divided by it.
            const bool unit = metric == Metric::kCosine && spread.shortest > kFloor;
            if (unit && codebook.width <= kCentredWidest && spread.square < kCentredSpread) {
                centre_codes<T>(codebook, spread.mean, layout, group, packed);
            }
        });
    });
}

}  // namespace meditok
