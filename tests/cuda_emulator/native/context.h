// Switching stacks: on x86-64 in a few instructions, elsewhere (or with EMU_UCONTEXT defined) by ucontext.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_UCONTEXT
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

#ifdef EMU_UCONTEXT

struct Context {
    ucontext_t registers;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = bytes;
    context.registers.uc_link = nullptr;  // entry never returns
    makecontext(&context.registers, entry, 0);
}

#else

struct Context {
    void* stack_pointer;
};

// Saves the registers that a call preserves on one stack and restores them from the other. The floating-point
// control words are left alone: kernels do not change them.
extern "C" void emu_switch_stacks(void** save, void* load);
asm(R"(
    .text
    .type emu_switch_stacks, @function
emu_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch_stacks, . - emu_switch_stacks
)");

inline void switch_context(Context& from, Context& to) { emu_switch_stacks(&from.stack_pointer, to.stack_pointer); }

// Lays out what emu_switch_stacks pops first: six registers, and the address that it returns to. At that
// point the stack pointer must be 8 off a multiple of 16, as after a call.
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
    void** top = (void**)(stack + bytes - 64);
    top[0] = (void*)entry;
    top[1] = nullptr;  // where entry would return to
    context.stack_pointer = top - 6;
}

#endif

}  // namespace emulator
