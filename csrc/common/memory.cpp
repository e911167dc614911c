#include "common/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace meditok {

void prefer_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 2 << 20;
    constexpr int64_t kWorthwhile = 8 << 20;
    if (bytes < kWorthwhile) return;
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

}  // namespace meditok
