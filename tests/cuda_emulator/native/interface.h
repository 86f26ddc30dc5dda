// What the compiled kernels (cuda_on_cpu.h), the runtime (runtime.cpp) and Python (launch.py) tell each other.
//
// launch.py mirrors these structs with ctypes: change both together.
#pragma once
#include <cstddef>
#include <cstdint>

// One parameter of a kernel: a pointer to, or a value of, something of `kind` and `size`.
struct EmuParameter {
    char is_pointer;
    char kind;      // f floating point, h __half, b __nv_bfloat16, i signed, u unsigned, ? bool, s struct, v void
    uint16_t size;  // of the value, or of what the pointer points to; 1 for void
};

struct EmuKernel {
    const char* name;
    void (*invoke)(void* function, void** arguments);  // unpacks the arguments as cuLaunchKernel does
    void* function;
    int parameter_count;
    const EmuParameter* parameters;
};

enum EmuOrder : uint32_t { EMU_FORWARD, EMU_REVERSE, EMU_RANDOM };

enum EmuFlag : uint32_t {
    EMU_CHECK_RACES = 1,
    EMU_CHECK_WRITTEN = 2,      // reads of memory that nobody has written
    EMU_ALLOW_EXITED = 4,       // barriers and warp collectives do without threads that have returned
    EMU_STRICT_SHUFFLES = 8,    // a shuffle from a lane that takes no part is an error, not a NaN
};

struct EmuLaunch {
    uint32_t grid[3], block[3];
    uint32_t dynamic_shared_bytes;
    uint32_t order;             // EmuOrder
    uint32_t seed;
    uint32_t resident_blocks;   // how many blocks are under way at once
    uint32_t flags;             // EmuFlag
    uint32_t preempt_per_mille; // probability of a switch at a checked access, an atomic or a fence
    uint64_t switch_limit;      // between threads; more of them are taken for a livelock
};

struct EmuCounters {
    uint64_t switches, barriers, warp_collectives, reads, writes, read_bytes, write_bytes, atomics;
};

struct EmuFailure {
    char message[2048];
    char library[1024];         // where the faulty instruction is, for addr2line; empty where the message says it
    uint64_t offset;
    uint64_t allocation;        // base address of the device memory concerned, or 0
};

// The place of a call in the kernel's source: a default argument is evaluated where the caller stands.
struct EmuPlace {
    const char* what;
    const char* file;
    int line;
};

enum EmuBarrier { EMU_BARRIER_PLAIN, EMU_BARRIER_COUNT, EMU_BARRIER_AND, EMU_BARRIER_OR };

enum EmuWarpOp {
    EMU_SYNCWARP,
    EMU_SHUFFLE_INDEX,
    EMU_SHUFFLE_UP,
    EMU_SHUFFLE_DOWN,
    EMU_SHUFFLE_XOR,
    EMU_BALLOT,
    EMU_ANY,
    EMU_ALL,
};

extern "C" {
// Called by kernels.
int emu_barrier(EmuBarrier kind, int predicate, EmuPlace place);
uint64_t emu_warp(EmuWarpOp op, unsigned mask, uint64_t value, int argument, int width, EmuPlace place);
void* emu_shared(const void* key, size_t size, size_t alignment, const char* name);
void* emu_dynamic_shared();
void emu_fence();
void emu_atomic(const void* address, size_t size, const void* caller);
void emu_load(const void* address, size_t size, size_t alignment, bool read_only, const void* caller);
void emu_store(const void* address, size_t size, size_t alignment, const void* caller);
void emu_sleep();
void emu_fail_at(const char* message, EmuPlace place);
}
