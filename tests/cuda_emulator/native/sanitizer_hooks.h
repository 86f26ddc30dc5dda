// What g++ calls in checked kernels: the functions of libtsan at each access to memory, and of libubsan where an
// operation is undefined.
//
// The kernels are compiled with -fsanitize=thread and parts of -fsanitize=undefined, but linked without those
// libraries: these are their place-holders. A hook that g++ wants and is not here is an error of the linker.
#pragma once
#include "memory.h"

#define EMU_INSTRUCTION __builtin_return_address(0)

#define EMU_ACCESS_HOOKS(size)                                                                       \
    EMU_API void __tsan_read##size(void* p) {                                                        \
        emulator::check_access(p, size, size, emulator::READ, EMU_INSTRUCTION);                      \
    }                                                                                                \
    EMU_API void __tsan_write##size(void* p) {                                                       \
        emulator::check_access(p, size, size, emulator::WRITE, EMU_INSTRUCTION);                     \
    }                                                                                                \
    EMU_API void __tsan_volatile_read##size(void* p) {                                               \
        emulator::check_access(p, size, size, emulator::READ | emulator::VOLATILE, EMU_INSTRUCTION); \
    }                                                                                                \
    EMU_API void __tsan_volatile_write##size(void* p) {                                              \
        emulator::check_access(p, size, size, emulator::WRITE | emulator::VOLATILE, EMU_INSTRUCTION); \
    }                                                                                                \
    EMU_API void __tsan_unaligned_read##size(void* p) {                                              \
        emulator::check_access(p, size, 1, emulator::READ, EMU_INSTRUCTION);                         \
    }                                                                                                \
    EMU_API void __tsan_unaligned_write##size(void* p) {                                             \
        emulator::check_access(p, size, 1, emulator::WRITE, EMU_INSTRUCTION);                        \
    }                                                                                                \
    EMU_API void __tsan_unaligned_volatile_read##size(void* p) {                                     \
        emulator::check_access(p, size, 1, emulator::READ | emulator::VOLATILE, EMU_INSTRUCTION);    \
    }                                                                                                \
    EMU_API void __tsan_unaligned_volatile_write##size(void* p) {                                    \
        emulator::check_access(p, size, 1, emulator::WRITE | emulator::VOLATILE, EMU_INSTRUCTION);   \
    }
EMU_ACCESS_HOOKS(1)
EMU_ACCESS_HOOKS(2)
EMU_ACCESS_HOOKS(4)
EMU_ACCESS_HOOKS(8)
EMU_ACCESS_HOOKS(16)

EMU_API void __tsan_read_range(void* p, size_t size) {
    if (size) emulator::check_access(p, size, 1, emulator::READ, EMU_INSTRUCTION);
}
EMU_API void __tsan_write_range(void* p, size_t size) {
    if (size) emulator::check_access(p, size, 1, emulator::WRITE, EMU_INSTRUCTION);
}
EMU_API void __tsan_func_entry(void*) {}
EMU_API void __tsan_func_exit() {}
EMU_API void __tsan_init() {}

// ---- Undefined behaviour ------------------------------------------------------------------------
// The data of every handler begins with the place in the source.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

struct TypeDescriptor {
    uint16_t kind, info;
    char name[1];
};

struct TypeMismatch {
    SourceLocation location;
    const TypeDescriptor* type;
    unsigned char log_alignment, kind;
};

EMU_API void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
    using namespace emulator;
    if (!current) return;
    const size_t alignment = (size_t)1 << data->log_alignment;
    const SourceLocation& place = data->location;
    if (!address) {
        EMU_FAIL("access through a null pointer to %s at %s:%u by %s", data->type->name, place.file, place.line,
                 name_of(current).c_str());
    }
    if (address % alignment == 0) {  // of -fsanitize=object-size, as `&array[length]` alone is no error
        EMU_FAIL("index out-of-bounds: %s beyond the end of an array or object at %s:%u by %s", data->type->name,
                 place.file, place.line, name_of(current).c_str());
    }
    EMU_FAIL("misaligned access: %p is no multiple of %zu, as %s needs, at %s:%u by %s", (void*)address, alignment,
             data->type->name, place.file, place.line, name_of(current).c_str());
}

#define EMU_UNDEFINED(handler, meaning)                                                                       \
    EMU_API void __ubsan_handle_##handler(SourceLocation* place, uint64_t a, uint64_t b) {                    \
        if (emulator::current) {                                                                              \
            EMU_FAIL("undefined behaviour: " meaning " (%lld, %lld) at %s:%u by %s", (long long)a, (long long)b, \
                     place->file, place->line, emulator::name_of(emulator::current).c_str());                 \
        }                                                                                                     \
    }
EMU_UNDEFINED(add_overflow, "overflow of +")
EMU_UNDEFINED(sub_overflow, "overflow of -")
EMU_UNDEFINED(mul_overflow, "overflow of *")
EMU_UNDEFINED(negate_overflow, "overflow of a negation")
EMU_UNDEFINED(divrem_overflow, "division by zero or overflow of /")
EMU_UNDEFINED(shift_out_of_bounds, "shift out of bounds")
EMU_UNDEFINED(out_of_bounds, "index out-of-bounds")
EMU_UNDEFINED(load_invalid_value, "invalid bool or enum")
EMU_UNDEFINED(builtin_unreachable, "unreachable code reached")
EMU_UNDEFINED(missing_return, "no return value")
