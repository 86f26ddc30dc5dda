// Block barriers and warp collectives: the last thread to arrive completes them for all.
#pragma once
#include <algorithm>
#include <cstring>

#include "happens_before.h"
#include "schedule.h"
#include "state.h"

namespace emulator {

// ---- Barriers -----------------------------------------------------------------------------------
inline bool same_place(const EmuPlace& a, const EmuPlace& b) {
    auto same_text = [](const char* x, const char* y) { return x == y || !strcmp(x, y); };
    return a.line == b.line && same_text(a.what, b.what) && same_text(a.file, b.file);
}

inline void release_barrier(Block* block) {
    const Fiber* first = nullptr;
    int count = 0;
    for (const Fiber* thread : block->threads) {
        if (thread->state != AT_BARRIER) continue;
        if (!first) first = thread;
        if (!same_place(thread->place, first->place)) {
            return note_failure("barrier divergence: %s waits in %s, %s in %s", name_of(first).c_str(),
                                name_of(first->place).c_str(), name_of(thread).c_str(), name_of(thread->place).c_str());
        }
        count += thread->predicate != 0;
    }
    pass_views_on(block);
    for (Fiber* thread : block->threads) {
        if (thread->state != AT_BARRIER) continue;
        thread->epoch++;
        switch (thread->barrier) {
            case EMU_BARRIER_PLAIN: break;
            case EMU_BARRIER_COUNT: thread->barrier_result = count; break;
            case EMU_BARRIER_AND: thread->barrier_result = count == (int)block->waiting; break;
            case EMU_BARRIER_OR: thread->barrier_result = count > 0; break;
        }
        make_ready(thread);
    }
    block->waiting = 0;
    counters.barriers++;
}

// ---- Warp collectives ---------------------------------------------------------------------------
// The lanes of one warp that meet in a collective; null where a lane takes no part.
struct Lanes {
    Fiber* thread[WARP] = {};
};

// Which lane a shuffle reads, by the definition of shfl.sync in the PTX manual.
inline int shuffle_source(const Fiber* thread, int lane) {
    const int first = lane & ~(thread->width - 1), last = first + thread->width - 1;
    int source = lane;
    bool inside = true;
    switch (thread->op) {
        case EMU_SHUFFLE_INDEX: source = first + (thread->argument & (thread->width - 1)); break;
        case EMU_SHUFFLE_UP: source = lane - thread->argument; inside = source >= first; break;
        case EMU_SHUFFLE_DOWN: source = lane + thread->argument; inside = source <= last; break;
        case EMU_SHUFFLE_XOR: source = lane ^ thread->argument; inside = source <= last; break;
        default: break;
    }
    return inside ? source : lane;
}

inline void complete_shuffle(const Lanes& lanes) {
    for (int lane = 0; lane < (int)WARP; lane++) {
        Fiber* thread = lanes.thread[lane];
        if (!thread) continue;
        const int width = thread->width;
        if (width < 1 || width > (int)WARP || (width & (width - 1))) {
            return note_failure("%s: the width is %d, not a power of two up to 32", name_of(thread->place).c_str(), width);
        }
        const int source = shuffle_source(thread, lane);
        if (source >= 0 && source < (int)WARP && lanes.thread[source]) {
            thread->result = lanes.thread[source]->value;
        } else if (config.flags & EMU_STRICT_SHUFFLES) {
            return note_failure("%s: %s reads lane %d, which takes no part", name_of(thread->place).c_str(),
                                name_of(thread).c_str(), source);
        } else {
            thread->result = ~0ull;  // undefined: a NaN, or -1
        }
    }
}

inline void complete_vote(const Lanes& lanes, EmuWarpOp op) {
    uint32_t ballot = 0, taking_part = 0;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (!lanes.thread[lane]) continue;
        taking_part |= 1u << lane;
        if (lanes.thread[lane]->value) ballot |= 1u << lane;
    }
    for (Fiber* thread : lanes.thread) {
        if (!thread) continue;
        thread->result = op == EMU_BALLOT ? ballot : op == EMU_ANY ? ballot != 0 : ballot == taking_part;
    }
}

// Only __syncwarp orders memory: after a shuffle or a vote, the lanes' accesses are as unordered as before.
inline void complete_syncwarp(const Lanes& lanes) {
    uint32_t merged[WARP] = {};
    for (const Fiber* thread : lanes.thread) {
        if (!thread) continue;
        for (unsigned i = 0; i < WARP; i++) merged[i] = std::max(merged[i], thread->clock[i]);
    }
    for (Fiber* thread : lanes.thread) {
        if (!thread) continue;
        std::copy(merged, merged + WARP, thread->clock);
        thread->clock[thread->lane()]++;
    }
}

// Complete the collective that `thread` waits in, if all the lanes of its mask are there.
inline void complete_if_all_there(const Fiber* thread) {
    Block* block = thread->block;
    const unsigned warp = thread->warp(), first = warp * WARP;
    const unsigned count = std::min<unsigned>(WARP, (unsigned)block->threads.size() - first);
    const uint32_t existing = ~0u >> (WARP - count), mask = thread->mask & existing;
    const uint32_t exited = block->exited[warp];
    // The quick way out, taken by all but the last to arrive.
    if (!(mask & exited) && block->in_collective[warp] < __builtin_popcount(mask)) return;

    Lanes lanes;
    for (unsigned lane = 0; lane < count; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber* other = block->threads[first + lane];
        if (other->state == DONE) {
            if (config.flags & EMU_ALLOW_EXITED) continue;
            return note_failure("%s: mask %08x names %s, which has exited", name_of(thread->place).c_str(), thread->mask,
                                name_of(other).c_str());
        }
        if (other->state != AT_WARP || other->op != thread->op || other->mask != thread->mask) return;
        lanes.thread[lane] = other;
    }
    for (const Fiber* other : lanes.thread) {
        if (other && other->place.line != thread->place.line) {
            return note_failure("warp divergence: lanes under the mask %08x are in %s and in %s", thread->mask,
                                name_of(thread->place).c_str(), name_of(other->place).c_str());
        }
    }

    switch (thread->op) {
        case EMU_SYNCWARP: complete_syncwarp(lanes); break;
        case EMU_BALLOT:
        case EMU_ANY:
        case EMU_ALL: complete_vote(lanes, thread->op); break;
        default: complete_shuffle(lanes); break;
    }
    for (Fiber* other : lanes.thread) {
        if (!other) continue;
        make_ready(other);
        block->in_collective[warp]--;
    }
    counters.warp_collectives++;
}

// A thread has returned: those that wait may have waited for it alone.
inline void complete_without(const Fiber* exited) {
    Block* block = exited->block;
    if (block->waiting && block->waiting == block->alive) return release_barrier(block);
    const unsigned first = exited->warp() * WARP;
    for (unsigned i = first; i < std::min<size_t>(first + WARP, block->threads.size()); i++) {
        if (block->threads[i]->state == AT_WARP) complete_if_all_there(block->threads[i]);
    }
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) int emu_barrier(EmuBarrier kind, int predicate, EmuPlace place) {
    using namespace emulator;
    Fiber* thread = current;
    Block* block = thread->block;
    thread->state = AT_BARRIER;
    thread->place = place;
    thread->barrier = kind;
    thread->predicate = predicate;
    const bool exited_count = !(config.flags & EMU_ALLOW_EXITED);
    block->waiting++;
    if (block->waiting == (exited_count ? block->threads.size() : block->alive)) release_barrier(block);
    switch_to_scheduler();
    return thread->barrier_result;
}

extern "C" __attribute__((visibility("default"))) uint64_t emu_warp(EmuWarpOp op, unsigned mask, uint64_t value,
                                                                   int argument, int width, EmuPlace place) {
    using namespace emulator;
    Fiber* thread = current;
    if (!(mask >> thread->lane() & 1)) {
        EMU_FAIL("%s: %s is not in its own mask %08x", name_of(place).c_str(), name_of(thread).c_str(), mask);
    }
    thread->op = op;
    thread->mask = mask;
    thread->value = value;
    thread->argument = argument;
    thread->width = width;
    thread->place = place;
    thread->state = AT_WARP;
    thread->block->in_collective[thread->warp()]++;
    complete_if_all_there(thread);
    switch_to_scheduler();
    return thread->result;
}
