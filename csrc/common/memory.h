// Memory of large results.
#pragma once

#include <cstdint>

namespace meditok {

// Asks the system to back `bytes` bytes from `data` on, not yet written, by huge pages. A map of 40 MB that has just been
// allocated costs ten thousand page faults otherwise, more time than a product of small width takes. Only a wish: small
// ranges and systems without huge pages are left alone.
void prefer_huge_pages(const void* data, int64_t bytes);

}  // namespace meditok
