// C functions over the emulated attention kernels, for ctypes, which fills the parameter structs itself.

#include "attention/attention.h"
#include "common/hopper.cuh"

using namespace meditok;

extern "C" void attention(const AttentionParams* params, int tf32) {
    attention_cuda(*params, tf32 != 0, 0, nullptr);
}

extern "C" void attention_backward(const AttentionBackwardParams* params, int tf32) {
    attention_backward_cuda(*params, tf32 != 0, 0, nullptr);
}

extern "C" int64_t scratch_bytes(const AttentionParams* params) {
    return attention_backward_scratch_bytes(*params);
}

extern "C" void set_device(int architecture, int block_shared, int multiprocessors) {
    emulation::architecture = architecture;
    emulation::block_shared = block_shared;
    emulation::multiprocessors = multiprocessors;
}

// Barriers of the copy engine since the last call: of the kernel for Hopper only.
extern "C" long hopper_barriers() {
    const long count = emulation::barriers;
    emulation::barriers = 0;
    return count;
}

extern "C" void set_backwards(int backwards) {
    emulation::backwards = backwards != 0;
}

extern "C" void set_accumulator_bits(int bits) {
    emulation::accumulator_bits = bits;
}

// Of a box at the start of shared memory, read from `byte` on.
extern "C" uint64_t describe_box(int byte) {
    return box_descriptor(emulation::shared_window(), byte);
}
