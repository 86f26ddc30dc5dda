// The runtime of the emulator: runs a grid on one thread of the host, each CUDA thread on a stack of its own.
//
// All of it is one translation unit, so that g++ inlines the check of an access into the hook that asks for it.
// Compile it without sanitizers.
#include <sys/mman.h>

#include "collectives.h"
#include "failure.h"
#include "happens_before.h"
#include "memory.h"
#include "sanitizer_hooks.h"
#include "schedule.h"
#include "state.h"

EMU_API Index emu_thread_index, emu_block_index, emu_block_size, emu_grid_size;
Index emu_thread_index, emu_block_index, emu_block_size, emu_grid_size;

EMU_API void emu_fail_at(const char* message, EmuPlace place) {
    EMU_FAIL("%s, at %s:%d by %s", message, place.file, place.line, emulator::name_of(emulator::current).c_str());
}

namespace emulator {

// A resident block takes a slot: the stacks of its threads, and the arena for its shared memory.
struct Slot {
    std::vector<std::unique_ptr<Fiber>> fibers;
    char* arena = nullptr;
};

static std::vector<Slot> slots;

static char* map_pages(size_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pages == MAP_FAILED) {
        fprintf(stderr, "CUDA emulator: out of memory\n");
        abort();
    }
    return (char*)pages;
}

static void provide_slots(unsigned count, unsigned threads) {
    if (slots.size() < count) slots.resize(count);
    for (unsigned i = 0; i < count; i++) {
        Slot& slot = slots[i];
        if (!slot.arena) slot.arena = map_pages(ARENA_BYTES);
        while (slot.fibers.size() < threads) {
            slot.fibers.push_back(std::make_unique<Fiber>());
            slot.fibers.back()->stack = map_pages(STACK_BYTES);
        }
    }
}

// Where every thread begins, on its own stack.
static void thread_entry() {
    kernel->invoke(kernel->function, kernel_arguments);
    current->state = DONE;
    current->block->alive--;
    current->block->exited[current->warp()] |= 1u << current->lane();
    switch_to_scheduler();
    abort();  // nobody switches back to a thread that is done
}

static std::unique_ptr<Block> start_block(uint32_t linear, unsigned slot, unsigned threads) {
    auto block = std::make_unique<Block>();  // all zero
    const uint32_t* grid = config.grid;
    const uint32_t* size = config.block;
    block->linear = linear;
    block->index = {linear % grid[0], linear / grid[0] % grid[1], linear / grid[0] / grid[1]};
    block->slot = slot;
    block->arena = slots[slot].arena;
    block->alive = threads;
    for (unsigned i = 0; i < threads; i++) {
        Fiber* thread = slots[slot].fibers[i].get();
        thread->block = block.get();
        thread->linear = i;
        thread->index = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
        thread->epoch = 0;
        std::fill(thread->clock, thread->clock + WARP, 0u);
        thread->clock[thread->lane()] = 1;
        thread->acquired.clear();
        thread->observed.clear();
        thread->release_view.clear();
        thread->has_released = false;
        // Stacks that begin at the same place in their pages would compete for a few lines of the cache.
        prepare_context(thread->context, thread->stack, STACK_BYTES - i % 64 * 192, thread_entry);
        block->threads.push_back(thread);
        make_ready(thread);
    }
    return block;
}

// Return a block in which a thread can run, or which is done; begin the search at `start`.
static Block* find_runnable(std::vector<std::unique_ptr<Block>>& live, size_t start) {
    for (int attempt = 0; attempt < 2; attempt++) {
        for (size_t i = 0; i < live.size(); i++) {
            Block* block = live[(start + i) % live.size()].get();
            if (block->ready.count || !block->alive) return block;
        }
        // Now those run that wanted to let the others go first.
        for (auto& block : live) std::swap(block->ready, block->later);
    }
    return nullptr;
}

static void report_deadlock(const Block* block) {
    std::map<std::string, int> waiting;
    for (const Fiber* thread : block->threads) {
        std::string where = thread->state == DONE ? "exited" : "at " + name_of(thread->place);
        if (thread->state == AT_WARP) where += formatted(" with the mask %08x", thread->mask);
        waiting[where]++;
    }
    std::string list;
    for (const auto& [where, count] : waiting) {
        list += (list.empty() ? "" : "; ") + std::to_string(count) + (count == 1 ? " thread " : " threads ") + where;
    }
    note_failure("deadlock, for instance a divergent barrier, in block (%u,%u,%u): %s", block->index.x, block->index.y,
                 block->index.z, list.c_str());
}

static void run_grid() {
    const unsigned threads = config.block[0] * config.block[1] * config.block[2];
    const uint32_t blocks = config.grid[0] * config.grid[1] * config.grid[2];
    const unsigned resident = std::max(1u, std::min(config.resident_blocks, blocks));
    provide_slots(resident, threads);

    std::vector<uint32_t> to_do(blocks);  // taken from the back
    for (uint32_t i = 0; i < blocks; i++) to_do[i] = config.order == EMU_REVERSE ? i : blocks - 1 - i;
    if (config.order == EMU_RANDOM) std::shuffle(to_do.begin(), to_do.end(), random_numbers);
    std::vector<unsigned> free_slots;
    for (unsigned slot = resident; slot-- > 0;) free_slots.push_back(slot);
    std::vector<std::unique_ptr<Block>> live;
    size_t start = 0;

    while (!failed) {
        while (!to_do.empty() && !free_slots.empty()) {
            live.push_back(start_block(to_do.back(), free_slots.back(), threads));
            to_do.pop_back();
            free_slots.pop_back();
        }
        if (live.empty()) return;
        if (config.order == EMU_RANDOM && random_numbers() % 16 == 0) start = random_numbers();
        Block* block = find_runnable(live, start);
        if (!block) return report_deadlock(live[0].get());
        if (!block->alive) {
            free_slots.push_back(block->slot);
            live.erase(std::find_if(live.begin(), live.end(), [&](auto& b) { return b.get() == block; }));
            continue;
        }
        Fiber* thread = take_ready(block);
        run_thread(thread);
        if (thread->state == DONE && config.flags & EMU_ALLOW_EXITED) complete_without(thread);
        if (counters.switches > config.switch_limit) {
            note_failure("gave up after %llu switches between threads: a livelock?",
                         (unsigned long long)config.switch_limit);
        }
    }
}

static void describe_failure(EmuFailure* failure) {
    *failure = {};
    snprintf(failure->message, sizeof failure->message, "%s", failure_message.c_str());
    if (failure_allocation && !failure_allocation->key) failure->allocation = (uint64_t)failure_allocation->base;
    Dl_info library;
    if (failure_address && dladdr(failure_address, &library) && library.dli_fname) {
        snprintf(failure->library, sizeof failure->library, "%s", library.dli_fname);
        // The hook returns to after its call: one byte less is within it.
        failure->offset = (uint64_t)((const char*)failure_address - (const char*)library.dli_fbase) - 1;
    }
}

}  // namespace emulator

// Run a kernel to its end. Return 0, or 1 and the failure. Python has checked the sizes of grid and block.
EMU_API int emu_launch(const EmuKernel* kernel, const EmuLaunch* launch, void** arguments, EmuCounters* counters,
                       EmuFailure* failure) {
    using namespace emulator;
    emulator::kernel = kernel;
    kernel_arguments = arguments;
    config = *launch;
    emulator::counters = {};
    launch_number++;
    random_numbers.seed(launch->seed);
    released_through.clear();
    forget_recent();
    find_library_segments();
    failed = false;
    failure_message.clear();
    failure_address = nullptr;
    failure_allocation = nullptr;
    emu_block_size = {launch->block[0], launch->block[1], launch->block[2]};
    emu_grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};

    run_grid();

    *counters = emulator::counters;
    if (failed) describe_failure(failure);
    return failed ? 1 : 0;
}
