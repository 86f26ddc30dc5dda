// What the runtime knows: memory, threads, blocks, and the launch that is under way.
//
// Everything is global: a launch runs in one thread of the host, to its end.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "interface.h"

struct Index {  // uint3 and dim3 without NVIDIA's headers
    unsigned x, y, z;
};

namespace emulator {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t SHARED_LIMIT = 48 << 10;   // what a CUDA kernel gets without asking for more
constexpr size_t SHARED_GAP = 256;          // between two shared variables, so that a step over the end is seen
constexpr size_t ARENA_BYTES = 256 << 10;   // holds SHARED_LIMIT and the gaps

// ---- Happens-before -----------------------------------------------------------------------------
// Time within a block is counted in two ways: in barriers that the thread has passed (its epoch), and, between two
// barriers, by a vector clock over the lanes of its warp, which __syncwarp merges.

// One access to a piece of memory, as the race check remembers it.
struct Access {
    uint32_t launch, block, epoch, lane_clock;
    uint16_t thread;
    bool atomic;  // or volatile
};

// What a thread had behind it when it fenced: all that its block did before `epoch`, and this of its own warp.
struct Release {
    uint32_t epoch;
    uint32_t clock[WARP];
};

// Whose releases are known, by (block, thread).
typedef std::map<std::pair<uint32_t, uint16_t>, Release> View;

// The last accesses to one granule of memory: a write, and two of the reads since then that are in no order.
struct Cell {
    Access write, first_read, last_read;
};

// ---- Memory -------------------------------------------------------------------------------------
struct Allocation {
    char* base;
    size_t size;
    std::string name;
    const void* key;                // of a shared variable
    uint8_t* written;               // one byte for each byte: not 0 once something has been written there
    size_t granule;                 // bytes a cell; halved when a smaller access comes
    std::vector<Cell> cells;        // empty until the race check needs them
    std::unique_ptr<uint8_t[]> own_written;
};

// ---- Threads and blocks -------------------------------------------------------------------------
enum ThreadState : uint8_t { READY, AT_BARRIER, AT_WARP, DONE };

struct Block;

// One CUDA thread.
struct Fiber {
    Context context;
    char* stack;
    Block* block;
    Index index;
    unsigned linear;        // its number in the block
    ThreadState state;
    EmuPlace place;         // where it waits

    EmuBarrier barrier;
    int predicate, barrier_result;

    EmuWarpOp op;
    uint32_t mask;
    uint64_t value, result;
    int argument, width;

    uint32_t epoch;
    uint32_t clock[WARP];
    View acquired;          // ordered before what it does now
    View observed;          // seen by an atomic; acquired at the next fence
    bool has_released;
    Release release;        // as of its last fence
    View release_view;      // what it had acquired by then, which its release passes on
    unsigned spins;         // atomics and volatile accesses since it was last switched to

    unsigned lane() const { return linear % WARP; }
    unsigned warp() const { return linear / WARP; }
};

// A set of threads of a block, as bits.
struct ThreadSet {
    uint64_t words[MAX_THREADS / 64];
    unsigned count;
};

struct Block {
    Index index;
    uint32_t linear;
    unsigned slot;                      // whose fibers and arena it uses
    std::vector<Fiber*> threads;
    unsigned waiting, alive;            // threads at the barrier; threads that have not returned
    uint32_t exited[MAX_THREADS / WARP];
    uint8_t in_collective[MAX_THREADS / WARP];
    ThreadSet ready, later;             // `later` run once nobody else can
    unsigned last_run;
    char* arena;
    size_t arena_used, shared_bytes;
    std::vector<std::unique_ptr<Allocation>> shared;
    View view;                          // acquired by any of its threads before the last barrier
};

// ---- The launch under way -----------------------------------------------------------------------
inline const EmuKernel* kernel;
inline void** kernel_arguments;
inline EmuLaunch config;
inline EmuCounters counters;
inline uint32_t launch_number = 0;
inline std::mt19937 random_numbers;
inline Fiber* current;              // null while the scheduler runs
inline Context scheduler_context;
inline std::map<const void*, View> released_through;  // by the address of the atomic or volatile variable

inline bool failed;
inline std::string failure_message;
inline const void* failure_address;     // of the faulty instruction, or null
inline const Allocation* failure_allocation;

}  // namespace emulator

extern "C" {
extern Index emu_thread_index, emu_block_index, emu_block_size, emu_grid_size;
}
