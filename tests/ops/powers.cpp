// exp2 of the file named by SOURCE, one of the instruction-set files, as a function of arrays; built by test_powers.py.

#include SOURCE

namespace meditok {

extern "C" void powers(const float* t, int64_t count, float* out) {  // count: a multiple of 16
    for (int64_t i = 0; i < count; i += kWidth) store(out + i, exp2(load(t + i)));
}

}  // namespace meditok
