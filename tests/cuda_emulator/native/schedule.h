// Which thread runs next, and switching between the scheduler and the threads.
#pragma once
#include <algorithm>

#include "failure.h"
#include "state.h"

namespace emulator {

inline void add(ThreadSet& set, unsigned thread) {
    set.words[thread / 64] |= 1ull << thread % 64;
    set.count++;
}

inline void remove(ThreadSet& set, unsigned thread) {
    set.words[thread / 64] &= ~(1ull << thread % 64);
    set.count--;
}

// Return the first (or the last) member in [from, to), or -1.
inline int find_member(const ThreadSet& set, unsigned from, unsigned to, bool last = false) {
    if (from >= to) return -1;
    const int first_word = from / 64, last_word = (to - 1) / 64;
    const int step = last ? -1 : 1;
    for (int word = last ? last_word : first_word; first_word <= word && word <= last_word; word += step) {
        uint64_t bits = set.words[word];
        if (word == first_word) bits &= ~0ull << from % 64;
        if (word == last_word && to % 64) bits &= ~0ull >> (64 - to % 64);
        if (bits) return word * 64 + (last ? 63 - __builtin_clzll(bits) : __builtin_ctzll(bits));
    }
    return -1;
}

// Return a member, beginning the search at `start` and going round [from, to).
inline int find_member_around(const ThreadSet& set, unsigned from, unsigned to, unsigned start) {
    const int found = find_member(set, start, to);
    return found >= 0 ? found : find_member(set, from, std::min(start, to));
}

inline void make_ready(Fiber* thread) {
    thread->state = READY;
    thread->spins = 0;
    add(thread->block->ready, thread->linear);
}

// Take one of the threads that can run, by the order of the launch.
inline Fiber* take_ready(Block* block) {
    const unsigned count = (unsigned)block->threads.size();
    int chosen = -1;
    if (config.order == EMU_FORWARD) {
        chosen = find_member(block->ready, 0, count);
    } else if (config.order == EMU_REVERSE) {
        chosen = find_member(block->ready, 0, count, true);
    } else {
        // Seven times in eight stay in the warp: a warp collective is then soon complete.
        const uint32_t draw = random_numbers();
        const unsigned warp = block->last_run / WARP * WARP, pick = draw / 8;
        if (draw % 8) {
            chosen = find_member_around(block->ready, warp, std::min(warp + WARP, count), warp + pick % WARP);
        }
        if (chosen < 0) chosen = find_member_around(block->ready, 0, count, pick % count);
    }
    remove(block->ready, chosen);
    block->last_run = (unsigned)chosen;
    return block->threads[chosen];
}

inline void run_thread(Fiber* thread) {
    current = thread;
    emu_thread_index = thread->index;
    emu_block_index = thread->block->index;
    counters.switches++;
    switch_context(scheduler_context, thread->context);
    current = nullptr;
}

inline void switch_to_scheduler() { switch_context(current->context, scheduler_context); }

// Let the others run, and go on once none of them can: what a waiting loop needs.
inline void yield_to_all() {
    current->state = READY;
    current->spins = 0;
    add(current->block->later, current->linear);
    switch_to_scheduler();
}

inline void maybe_preempt() {
    if (!config.preempt_per_mille || random_numbers() % 1000 >= config.preempt_per_mille) return;
    if (random_numbers() % 2) return yield_to_all();
    make_ready(current);
    switch_to_scheduler();
}

// A thread that keeps looking at an atomic or a volatile waits for another one, which must get to run.
inline void count_spin() {
    if (++current->spins > 64) yield_to_all();
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emu_sleep() { emulator::yield_to_all(); }
