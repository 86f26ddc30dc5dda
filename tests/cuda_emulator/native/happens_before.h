// Which accesses are ordered by barriers, __syncwarp, and fences with atomics: the rules of the race check.
//
// Between blocks, order is made as in CUDA's memory model by a fence, an atomic (or volatile) write, an atomic (or
// volatile) read of the same variable that sees it, and a fence. The first fence covers what the thread did itself,
// what its block did before the last barrier, and what it has acquired. What the second one acquires reaches the
// other threads of its block at the next barrier, so a fence after that barrier would come too late.
#pragma once
#include "schedule.h"
#include "state.h"

namespace emulator {

// Add what `from` knows to `into`, keeping the later release of each thread.
inline void merge_view(View& into, const View& from) {
    for (const auto& [thread, release] : from) {
        Release& known = into[thread];
        if (known.epoch <= release.epoch) known = release;
    }
}

// Whether `release` covers an access of the same block; `same_warp`: by the warp that released.
inline bool covers(const Release& release, const Access& access, bool same_warp) {
    if (access.epoch < release.epoch) return true;
    return access.epoch == release.epoch && same_warp && release.clock[access.thread % WARP] >= access.lane_clock;
}

inline bool covered_by(const View& view, const Access& access) {
    for (auto it = view.lower_bound({access.block, 0}); it != view.end() && it->first.first == access.block; ++it) {
        if (covers(it->second, access, it->first.second / WARP == access.thread / WARP)) return true;
    }
    return false;
}

// Whether `access` is ordered before what `thread` does now.
inline bool ordered_before(const Access& access, const Fiber* thread) {
    if (access.launch != launch_number) return true;
    if (access.block == thread->block->linear) {
        if (access.thread == thread->linear || access.epoch < thread->epoch) return true;
        if (access.thread / WARP == thread->warp() && thread->clock[access.thread % WARP] >= access.lane_clock) {
            return true;
        }
    }
    return covered_by(thread->acquired, access) || covered_by(thread->block->view, access);
}

// After a barrier the block knows all that its threads have acquired.
inline void pass_views_on(Block* block) {
    for (Fiber* thread : block->threads) {
        if (thread->acquired.empty()) continue;
        merge_view(block->view, thread->acquired);
        thread->acquired.clear();
    }
}

// An atomic or volatile read sees what has been released through its variable.
inline void observe(const void* address) {
    auto variable = released_through.find(address);
    if (variable != released_through.end()) merge_view(current->observed, variable->second);
}

// An atomic or volatile write releases what its thread had behind it at its last fence. What others have released
// through the variable stays known: a later atomic continues theirs.
inline void publish(const void* address) {
    if (!current->has_released) return;
    View& variable = released_through[address];
    variable[{current->block->linear, (uint16_t)current->linear}] = current->release;
    merge_view(variable, current->release_view);
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emu_fence() {
    using namespace emulator;
    if (config.flags & EMU_CHECK_RACES) {
        Fiber* thread = current;
        merge_view(thread->acquired, thread->observed);
        thread->observed.clear();
        thread->has_released = true;
        thread->release.epoch = thread->epoch;
        std::copy(thread->clock, thread->clock + WARP, thread->release.clock);
        thread->release_view = thread->block->view;
        merge_view(thread->release_view, thread->acquired);
        thread->clock[thread->lane()]++;  // what follows is not covered
    }
    maybe_preempt();
}
