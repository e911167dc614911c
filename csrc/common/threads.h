// A persistent pool with dynamically claimed items. OpenMP's static schedule stalls for milliseconds when
// another process takes a core; here whoever is free takes the next item.
//
//   parallel_for(items, threads, [&](int participant, int64_t item) { ... });
//
// Items are claimed in order by at most `threads` participants, the caller among them (participant 0). The
// body must not throw and must give the same answer whoever runs it. Survives fork: the child starts a pool
// of its own. When the pool is busy with another caller's work, the call runs in the caller's thread alone.
// Every participant runs with the default floating-point environment (round to nearest, subnormals kept).
#pragma once

#include <cstdint>
#include <type_traits>

namespace meditok {

using ItemFunction = void (*)(void* context, int participant, int64_t item);

void parallel_for_raw(int64_t items, int threads, ItemFunction function, void* context);

// Participants that `parallel_for` may use for this request: what to size scratch memory by.
int participants(int64_t items, int threads);

template <class Body>
inline void parallel_for(int64_t items, int threads, Body&& body) {
    auto call = [](void* context, int participant, int64_t item) {
        (*static_cast<typename std::remove_reference<Body>::type*>(context))(participant, item);
    };
    parallel_for_raw(items, threads, call, &body);
}

}  // namespace meditok
