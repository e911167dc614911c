#include "common/isa.h"

#include <atomic>

#include "common/check.h"

#if defined(MEDITOK_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace meditok {

namespace {

constexpr Isa kBestFirst[] = {Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kScalar};

bool compiled(Isa isa) {
    switch (isa) {
        case Isa::kScalar: return true;
#if defined(MEDITOK_HAVE_AVX2)
        case Isa::kAvx2: return true;
#endif
#if defined(MEDITOK_HAVE_AVX512)
        case Isa::kAvx512: return true;
#endif
#if defined(MEDITOK_HAVE_AVX512VNNI)
        case Isa::kAvx512Vnni: return true;
#endif
#if defined(MEDITOK_HAVE_NEON)
        case Isa::kNeon: return true;
#endif
        default: return false;
    }
}

bool detected(Isa isa) {
    switch (isa) {
        case Isa::kScalar: return true;
#if defined(__x86_64__)
        // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
        case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::kAvx512:
#if defined(MEDITOK_SIMDE)
            return true;  // emulated, for tests on machines without it
#endif
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
        case Isa::kAvx512Vnni:
#if defined(MEDITOK_SIMDE)
            return true;
#endif
            return detected(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
        case Isa::kNeon: return true;
#endif
        default: return false;
    }
}

std::vector<std::string> names(bool (*has)(Isa)) {
    std::vector<std::string> found;
    for (Isa isa : kBestFirst) {
        if (has(isa)) found.push_back(isa_name(isa));
    }
    return found;
}

std::string joined(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
    return text;
}

std::atomic<int> chosen{-1};

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kScalar: return "scalar";
        case Isa::kAvx2: return "avx2";
        case Isa::kAvx512: return "avx512";
        case Isa::kAvx512Vnni: return "avx512vnni";
        case Isa::kNeon: return "neon";
    }
    return "unknown";
}

std::vector<std::string> isa_compiled() {
    return names(compiled);
}
std::vector<std::string> isa_detected() {
    return names(detected);
}

std::string choose_isa(const std::string& name) {
    for (Isa isa : kBestFirst) {
        const bool wanted = name.empty() || name == isa_name(isa);
        if (wanted && compiled(isa) && detected(isa)) {
            chosen.store(static_cast<int>(isa));
            return isa_name(isa);
        }
    }
    throw std::invalid_argument("instruction set " + name + " cannot be used: this build has " +
                                joined(isa_compiled()) + ", this machine has " + joined(isa_detected()));
}

Isa current_isa() {
    if (chosen.load() < 0) choose_isa("");
    return static_cast<Isa>(chosen.load());
}

bool has_tiles() {
#if defined(MEDITOK_HAVE_AMX) && defined(__linux__)
    // Linux keeps a process from the tile registers until it asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, tile data).
    static const bool granted =
        __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
#else
    return false;
#endif
}

}  // namespace meditok
