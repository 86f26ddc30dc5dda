// Device and shared memory, and the check of each access: bounds, alignment, never-written bytes, data races.
#pragma once
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <deque>

#include "happens_before.h"
#include "state.h"

namespace emulator {

// ---- Device memory ------------------------------------------------------------------------------
constexpr size_t DEVICE_ALIGNMENT = 512;        // as CuPy's memory pool gives
constexpr size_t DEVICE_MARGIN = 4096 + 512;    // of no array, on both sides; gives no larger alignment than 512
constexpr size_t QUARANTINE_BYTES = 32 << 20;   // freed memory that is kept, so that its addresses stay invalid

inline std::map<const char*, std::unique_ptr<Allocation>> device_memory;  // by base address
inline std::deque<std::unique_ptr<Allocation>> freed_memory;              // the latest last
inline size_t freed_bytes = 0;

inline size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// An allocation is followed by its map of written bytes, in the same piece of the heap.
inline size_t padded_bytes(size_t size) { return round_up(size, DEVICE_ALIGNMENT) + DEVICE_MARGIN; }

inline void return_to_heap(Allocation* allocation) { free(allocation->base - DEVICE_MARGIN); }

inline bool inside(const Allocation& allocation, const char* address) {
    return address >= allocation.base && address < allocation.base + allocation.size;
}

// ---- Finding what an address belongs to ---------------------------------------------------------
// One instruction mostly accesses one array, so what it found last is tried first.
constexpr size_t RECENT = 1024;
inline Allocation* recently_found[RECENT];

inline void forget_recent() { std::fill(recently_found, recently_found + RECENT, nullptr); }

inline Allocation* find_allocation(const char* address, const void* instruction) {
    Allocation*& recent = recently_found[(uintptr_t)instruction / 4 % RECENT];
    if (recent && inside(*recent, address)) return recent;
    for (auto& shared : current->block->shared) {
        if (inside(*shared, address)) return shared.get();  // not remembered: it lives no longer than its block
    }
    auto next = device_memory.upper_bound(address);
    if (next == device_memory.begin()) return nullptr;
    Allocation* found = std::prev(next)->second.get();
    return inside(*found, address) ? recent = found : nullptr;
}

// Constants and statics of the kernel's own library may be accessed: they are not checked.
inline std::vector<std::pair<const char*, const char*>> library_segments;

inline void find_library_segments() {
    library_segments.clear();
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
            std::vector<std::pair<const char*, const char*>> segments;
            bool is_kernels = false;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type != PT_LOAD) continue;
                const char* begin = (const char*)info->dlpi_addr + header.p_vaddr;
                segments.emplace_back(begin, begin + header.p_memsz);
                is_kernels |= segments.back().first <= (char*)kernel && (char*)kernel < segments.back().second;
            }
            if (is_kernels) library_segments = segments;
            return is_kernels ? 1 : 0;
        },
        nullptr);
}

inline bool in_kernels_library(const char* address) {
    for (const auto& segment : library_segments) {
        if (segment.first <= address && address < segment.second) return true;
    }
    return false;
}

// ---- The check of an access ---------------------------------------------------------------------
enum AccessKind : unsigned {
    READ = 0,
    WRITE = 1,
    VOLATILE = 2,
    ATOMIC = 4,
    READ_ONLY = 8,  // through the read-only cache
};

inline const char* name_of_kind(unsigned kind) { return kind & ATOMIC ? "atomic" : kind & WRITE ? "write" : "read"; }

inline std::string name_of(const Access& access) {
    const Index& size = emu_block_size;
    const Index& grid = emu_grid_size;
    return formatted("block (%u,%u,%u) thread (%u,%u,%u)", access.block % grid.x, access.block / grid.x % grid.y,
                     access.block / grid.x / grid.y, access.thread % size.x, access.thread / size.x % size.y,
                     access.thread / size.x / size.y);
}

// One access, with all that a message may want to say about it.
struct Attempt {
    const char* address;
    size_t size;
    unsigned kind;
    const void* instruction;

    [[noreturn]] void fail(const Allocation* allocation, const std::string& message) const {
        failure_address = instruction;
        failure_allocation = allocation;
        EMU_FAIL("%s", message.c_str());
    }

    std::string place(const Allocation& allocation) const {
        return formatted("'%s' at byte %td of %zu, by %s", allocation.name.c_str(), address - allocation.base,
                         allocation.size, name_of(current).c_str());
    }
};

[[noreturn]] inline void fail_outside(const Attempt& attempt) {
    for (const auto& freed : freed_memory) {
        if (!inside(*freed, attempt.address)) continue;
        attempt.fail(freed.get(), formatted("out-of-bounds %s of %zu bytes: %s, which has been freed",
                                            name_of_kind(attempt.kind), attempt.size, attempt.place(*freed).c_str()));
    }
    const Allocation* nearest = nullptr;
    auto distance = [&](const Allocation& a) {
        return attempt.address < a.base ? a.base - attempt.address : attempt.address - (a.base + a.size) + 1;
    };
    auto consider = [&](const Allocation& a) {
        if (!nearest || distance(a) < distance(*nearest)) nearest = &a;
    };
    for (const auto& shared : current->block->shared) consider(*shared);
    for (const auto& [base, allocation] : device_memory) consider(*allocation);
    if (!attempt.address || !nearest || distance(*nearest) > (1 << 20)) {
        attempt.fail(nullptr, formatted("out-of-bounds %s of %zu bytes at address %p, near no array, by %s",
                                        name_of_kind(attempt.kind), attempt.size, (void*)attempt.address,
                                        name_of(current).c_str()));
    }
    attempt.fail(nearest, formatted("out-of-bounds %s of %zu bytes, nearest to %s", name_of_kind(attempt.kind),
                                    attempt.size, attempt.place(*nearest).c_str()));
}

inline void check_written(const Attempt& attempt, const Allocation& allocation, size_t offset) {
    const uint8_t* written = allocation.written + offset;
    for (size_t i = 0; i < attempt.size; i++) {
        if (written[i]) continue;
        attempt.fail(&allocation, formatted("%s of uninitialised memory: %s", name_of_kind(attempt.kind),
                                            attempt.place(allocation).c_str()));
    }
}

// Make the cells small enough that an access covers whole ones: a cell that is halved was accessed in both halves.
inline void refine_cells(Allocation& allocation, size_t offset, size_t size) {
    size_t granule = allocation.cells.empty() ? 16 : allocation.granule;
    while (granule > 1 && (offset % granule || size % granule)) granule /= 2;
    if (allocation.cells.empty()) {
        allocation.granule = granule;
        allocation.cells.resize((allocation.size + granule - 1) / granule);
    } else if (granule < allocation.granule) {
        const size_t parts = allocation.granule / granule;
        std::vector<Cell> finer((allocation.size + granule - 1) / granule);
        for (size_t i = 0; i < finer.size(); i++) finer[i] = allocation.cells[i / parts];
        allocation.cells.swap(finer);
        allocation.granule = granule;
    }
}

inline void check_race_in_cell(const Attempt& attempt, const Allocation& allocation, Cell& cell) {
    Fiber* thread = current;
    const bool writes = attempt.kind & (WRITE | ATOMIC);
    const Access access{launch_number,       thread->block->linear,    thread->epoch, thread->clock[thread->lane()],
                        (uint16_t)thread->linear, (attempt.kind & (ATOMIC | VOLATILE)) != 0};
    if (attempt.kind & READ_ONLY && cell.write.launch == launch_number) {
        attempt.fail(&allocation, formatted("__ldg of what %s writes in the same launch: %s",
                                            name_of(cell.write).c_str(), attempt.place(allocation).c_str()));
    }
    auto conflicts = [&](const Access& other) {
        return !(access.atomic && other.atomic) && !ordered_before(other, thread);
    };
    const Access* conflict = nullptr;
    const char* conflicting = "write";
    if (conflicts(cell.write)) {
        conflict = &cell.write;
    } else if (writes) {
        conflicting = "read";
        if (conflicts(cell.first_read)) conflict = &cell.first_read;
        if (conflicts(cell.last_read)) conflict = &cell.last_read;
    }
    if (conflict) {
        attempt.fail(&allocation, formatted("data race: this %s and a %s by %s are in no order: %s",
                                            name_of_kind(attempt.kind), conflicting, name_of(*conflict).c_str(),
                                            attempt.place(allocation).c_str()));
    }
    if (writes) {
        cell.write = access;
        cell.first_read.launch = cell.last_read.launch = 0;
    } else if (ordered_before(cell.first_read, thread)) {
        cell.first_read = access;  // what comes after this read comes after that one, too
    } else {
        cell.last_read = access;
    }
}

// `alignment` is what the instruction needs, or 1.
inline void check_access(const void* pointer, size_t size, size_t alignment, unsigned kind, const void* instruction) {
    Fiber* thread = current;
    const char* address = (const char*)pointer;
    if (!thread || (address >= thread->stack && address < thread->stack + STACK_BYTES)) return;  // its own variables
    if (kind & (VOLATILE | ATOMIC)) count_spin();
    maybe_preempt();
    // Nothing may switch from here to the access itself, which follows the return: of two atomics, the one that is
    // recorded first must be done first.
    const Attempt attempt{address, size, kind, instruction};
    Allocation* allocation = find_allocation(address, instruction);
    if (!allocation) {
        if (in_kernels_library(address)) return;
        fail_outside(attempt);
    }
    const size_t offset = address - allocation->base;
    if (offset + size > allocation->size) {
        attempt.fail(allocation, formatted("out-of-bounds %s of %zu bytes: %s", name_of_kind(kind), size,
                                           attempt.place(*allocation).c_str()));
    }
    if ((uintptr_t)address % alignment) {
        attempt.fail(allocation, formatted("misaligned %s of %zu bytes: %s", name_of_kind(kind), size,
                                           attempt.place(*allocation).c_str()));
    }

    const bool writes = kind & (WRITE | ATOMIC);
    if (kind & ATOMIC) {
        counters.atomics++;
    } else if (writes) {
        counters.writes++;
        counters.write_bytes += size;
    } else {
        counters.reads++;
        counters.read_bytes += size;
    }

    if (config.flags & EMU_CHECK_WRITTEN && (!writes || kind & ATOMIC)) check_written(attempt, *allocation, offset);
    if (writes) memset(allocation->written + offset, 1, size);
    if (config.flags & EMU_CHECK_RACES) {
        refine_cells(*allocation, offset, size);
        const size_t first = offset / allocation->granule, last = (offset + size - 1) / allocation->granule;
        for (size_t i = first; i <= last; i++) check_race_in_cell(attempt, *allocation, allocation->cells[i]);
    }
    if (kind & VOLATILE && config.flags & EMU_CHECK_RACES) writes ? publish(address) : observe(address);
}

}  // namespace emulator

#define EMU_API extern "C" __attribute__((visibility("default")))

EMU_API void emu_atomic(const void* address, size_t size, const void* caller) {
    using namespace emulator;
    check_access(address, size, size, ATOMIC, caller);
    if (!(config.flags & EMU_CHECK_RACES)) return;
    observe(address);
    publish(address);
}

EMU_API void emu_load(const void* address, size_t size, size_t alignment, bool read_only, const void* caller) {
    using namespace emulator;
    check_access(address, size, alignment, read_only ? READ | READ_ONLY : READ, caller);
}

EMU_API void emu_store(const void* address, size_t size, size_t alignment, const void* caller) {
    emulator::check_access(address, size, alignment, emulator::WRITE, caller);
}

// ---- Shared memory ------------------------------------------------------------------------------
EMU_API void* emu_shared(const void* key, size_t size, size_t alignment, const char* name) {
    using namespace emulator;
    Block* block = current->block;
    for (auto& known : block->shared) {
        if (known->key == key) return known->base;
    }
    block->shared_bytes += size;
    if (block->shared_bytes > SHARED_LIMIT) {
        EMU_FAIL("'%s' brings the block's shared memory to %zu bytes, of %zu", name, block->shared_bytes, SHARED_LIMIT);
    }
    const size_t at = round_up(block->arena_used + SHARED_GAP, std::max<size_t>(alignment, 16));
    block->arena_used = at + size;
    if (block->arena_used + SHARED_GAP > ARENA_BYTES) EMU_FAIL("too many shared variables for the emulator");
    auto shared = std::make_unique<Allocation>();
    shared->base = block->arena + at;
    shared->size = size;
    shared->name = name;
    shared->key = key;
    shared->own_written.reset(new uint8_t[size]());
    shared->written = shared->own_written.get();
    memset(shared->base, 0xff, size);
    block->shared.push_back(std::move(shared));
    return block->shared.back()->base;
}

EMU_API void* emu_dynamic_shared() {
    static const char key = 0;
    return emu_shared(&key, emulator::config.dynamic_shared_bytes, 16, "dynamic shared memory");
}

// ---- Device memory for Python -------------------------------------------------------------------
// `written` receives the address of the map of written bytes.
EMU_API void* emu_allocate(size_t size, const char* name, void** written) {
    using namespace emulator;
    const size_t padded = padded_bytes(size);
    char* block = (char*)aligned_alloc(4096, round_up(DEVICE_MARGIN + padded + size, 4096));
    if (!block) return nullptr;
    auto allocation = std::make_unique<Allocation>();
    allocation->base = block + DEVICE_MARGIN;
    allocation->size = size;
    allocation->name = name;
    allocation->written = (uint8_t*)allocation->base + padded;
    memset(block, 0xff, DEVICE_MARGIN + padded);  // NaN in every floating-point format
    memset(allocation->written, 0, size);
    *written = allocation->written;
    char* base = allocation->base;
    device_memory[base] = std::move(allocation);
    return base;
}

EMU_API void emu_free(void* base) {
    using namespace emulator;
    auto found = device_memory.find((const char*)base);
    if (found == device_memory.end()) return;
    forget_recent();
    std::unique_ptr<Allocation> allocation = std::move(found->second);
    device_memory.erase(found);
    memset(allocation->base, 0xff, allocation->size);
    allocation->cells = {};
    freed_bytes += allocation->size + DEVICE_MARGIN;
    freed_memory.push_back(std::move(allocation));
    while (freed_bytes > QUARANTINE_BYTES) {
        freed_bytes -= freed_memory.front()->size + DEVICE_MARGIN;
        return_to_heap(freed_memory.front().get());
        freed_memory.pop_front();
    }
}
