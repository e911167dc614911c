// C functions over the emulated CUDA kernels of the training path, for ctypes. Arrays are contiguous but for x, whose
// strides are given; scratch memory is filled with NaN and has exactly the size the header asks for.

#include <cstring>
#include <stdexcept>
#include <vector>

#include "vq/vq_train.h"

using namespace meditok;

namespace {

constexpr unsigned char kPoison = 0xff;

class Scratch {
  public:
    explicit Scratch(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kAlignment, kPoison) {
        start_ = memory_.data() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.data()) % kAlignment);
    }
    unsigned char* data() { return start_; }
    int overrun() const {  // bytes written beyond the end
        int written = 0;
        for (const unsigned char* p = start_ + bytes_; p < memory_.data() + memory_.size(); ++p) {
            written += *p != kPoison;
        }
        return written;
    }

  private:
    size_t bytes_;
    std::vector<unsigned char> memory_;
    unsigned char* start_;
};

Codebook make(const void* data, int type, const int64_t* size) {
    return {data, static_cast<Dtype>(type), size[1], size[2], size[3], size[2] * size[3], size[3], 1};
}

}  // namespace

// size: rows, groups, codes, width. Each returns the bytes written beyond its scratch memory.

extern "C" int cuda_quantize(const int64_t* size, int type, const void* x, const int64_t* xs,
                             const void* codebook, const unsigned char* mask, int metric, double commitment,
                             double code_weight, void* z, int64_t* ids, float* loss, int64_t* counts) {
    const Codebook book = make(codebook, type, size);
    Scratch packed(packed_layout(size[1], size[2], size[3]).total_bytes);
    Scratch scratch(quantize_scratch_bytes(size[0], size[1], size[2], size[3]));
    vq_pack_cuda(book, static_cast<Metric>(metric), packed.data(), 0, nullptr);
    const AssignParams assign{
        x, book.type, size[0], xs[0], xs[1], xs[2], book, packed.data(), static_cast<Metric>(metric), ids};
    vq_quantize_cuda({assign, mask, 1, commitment, code_weight, z, loss, counts, scratch.data()}, 0, nullptr);
    return scratch.overrun() + packed.overrun();
}

extern "C" int cuda_backward(const int64_t* size, int type, const void* grad_z, const float* grad_loss,
                             const void* x, const int64_t* xs, const void* codebook, const int64_t* ids,
                             const unsigned char* mask, int metric, double commitment, double code_weight,
                             int rotation, void* grad_x, void* grad_codebook) {
    Scratch scratch(backward_scratch_bytes(size[0], size[1], size[2], size[3]));
    const int64_t row = size[1] * size[3];
    vq_quantize_backward_cuda({grad_z,
                               {row, size[3], 1},
                               grad_loss,
                               x,
                               static_cast<Dtype>(type),
                               size[0],
                               {xs[0], xs[1], xs[2]},
                               make(codebook, type, size),
                               ids,
                               {size[1], 1},
                               mask,
                               1,
                               static_cast<Metric>(metric),
                               commitment,
                               code_weight,
                               rotation != 0,
                               grad_x,
                               grad_codebook,
                               scratch.data()},
                              0, nullptr);
    return scratch.overrun();
}

extern "C" int cuda_stats(const int64_t* size, int type, const void* x, const int64_t* xs, const int64_t* ids,
                          int64_t* counts, float* sums) {
    Scratch scratch(stats_scratch_bytes(size[0], size[1], size[2], size[3]));
    vq_stats_cuda({x,
                   static_cast<Dtype>(type),
                   size[0],
                   size[1],
                   size[3],
                   {xs[0], xs[1], xs[2]},
                   ids,
                   {size[1], 1},
                   size[2],
                   counts,
                   sums,
                   scratch.data()},
                  0, nullptr);
    return scratch.overrun();
}

extern "C" int cuda_update(const int64_t* size, int type, void* codebook, float* ema_counts, float* ema_sums,
                           const int64_t* counts, const float* sums, double decay, double eps, int metric) {
    Scratch scratch(update_scratch_bytes(size[1], size[2], size[3]));
    const int64_t codes = size[2], width = size[3];
    vq_update_cuda({codebook,
                    static_cast<Dtype>(type),
                    size[1],
                    codes,
                    width,
                    {codes * width, width, 1},
                    ema_counts,
                    {codes, 1},
                    ema_sums,
                    {codes * width, width, 1},
                    counts,
                    {codes, 1},
                    sums,
                    {codes * width, width, 1},
                    decay,
                    eps,
                    static_cast<Metric>(metric),
                    scratch.data()},
                   0, nullptr);
    return scratch.overrun();
}
