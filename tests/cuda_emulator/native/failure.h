// How an error in a kernel ends the launch: the first one is kept, and the faulty thread never runs again.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace emulator {

inline std::string format_list(const char* format, va_list values) {
    char text[2000];
    vsnprintf(text, sizeof text, format, values);
    return text;
}

__attribute__((format(printf, 1, 2))) inline std::string formatted(const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::string text = format_list(format, values);
    va_end(values);
    return text;
}

// From the scheduler, or where the calling thread can go on until it next waits.
__attribute__((format(printf, 1, 2))) inline void note_failure(const char* format, ...) {
    va_list values;
    va_start(values, format);
    if (!failed) failure_message = format_list(format, values);
    va_end(values);
    failed = true;
}

// From a kernel's thread: the launch ends here. Its stack is abandoned, as a GPU abandons a faulty kernel.
[[noreturn]] inline void abandon_thread() {
    if (!current) {
        fprintf(stderr, "CUDA emulator: %s (outside of a kernel)\n", failure_message.c_str());
        abort();
    }
    switch_context(current->context, scheduler_context);
    abort();
}

#define EMU_FAIL(...) (emulator::note_failure(__VA_ARGS__), emulator::abandon_thread())

inline std::string name_of(const Fiber* thread) {
    const Index& b = thread->block->index;
    const Index& t = thread->index;
    return formatted("block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

inline std::string name_of(const EmuPlace& place) {
    return formatted("%s at %s:%d", place.what, place.file, place.line);
}

}  // namespace emulator
