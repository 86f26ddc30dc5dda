// CUDA C++ for g++ -std=c++17: what a kernel's translation unit includes first.
//
// It stands for what NVRTC has built in: the keywords, threadIdx and its like, barriers, warp collectives,
// atomics, cached loads and stores, mathematics. The 16-bit types are NVIDIA's own, whose conversions on the
// host have the device's bits. prepass.py has rewritten __shared__ and __launch_bounds__ before.
#pragma once
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "interface.h"

#define CUDA_ON_CPU 1

// NVIDIA's headers define these for a host compiler; a kernel's text needs them empty.
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __align__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __builtin_assume(condition) ((void)0)
#define __shared__ a_shared_declaration_that_prepass_py_does_not_know
#define __launch_bounds__(...) launch_bounds_that_prepass_py_does_not_know

// ---- Indices ------------------------------------------------------------------------------------
// They are const, as in CUDA: within one thread they never change, and g++ asks for no check of their reads. For a
// dim3, which has a constructor, it would.
extern "C" {
extern const uint3 emu_thread_index, emu_block_index, emu_block_size, emu_grid_size;
}
#define threadIdx emu_thread_index
#define blockIdx emu_block_index
#define blockDim emu_block_size
#define gridDim emu_grid_size
static const int warpSize = 32;

// ---- Barriers, fences, warp collectives ---------------------------------------------------------
#define EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_PLACE(name) (EmuPlace{name, file, line})

inline void __syncthreads(EMU_CALLER) { emu_barrier(EMU_BARRIER_PLAIN, 0, EMU_PLACE("__syncthreads")); }
inline int __syncthreads_count(int predicate, EMU_CALLER) {
    return emu_barrier(EMU_BARRIER_COUNT, predicate, EMU_PLACE("__syncthreads_count"));
}
inline int __syncthreads_and(int predicate, EMU_CALLER) {
    return emu_barrier(EMU_BARRIER_AND, predicate, EMU_PLACE("__syncthreads_and"));
}
inline int __syncthreads_or(int predicate, EMU_CALLER) {
    return emu_barrier(EMU_BARRIER_OR, predicate, EMU_PLACE("__syncthreads_or"));
}
inline void __threadfence() { emu_fence(); }
inline void __threadfence_system() { emu_fence(); }
// Orders nothing between blocks, so taking it for nothing errs on the strict side.
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emu_sleep(); }
inline void __trap(EMU_CALLER) { emu_fail_at("the kernel called __trap", EMU_PLACE("__trap")); }

namespace emu {

template <class T, class... Types>
constexpr bool is_one_of = (std::is_same_v<T, Types> || ...);

template <class T>
constexpr bool is_16_bit = is_one_of<T, __half, __half2, __nv_bfloat16, __nv_bfloat162>;

// CUDA has these functions for some types only, and this header must not have them for more.
template <class T>
constexpr bool can_shuffle =
    is_16_bit<T> || is_one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>;

template <class T>
constexpr bool can_load_with_hint =
    can_shuffle<T> ||
    is_one_of<T, char, signed char, unsigned char, short, unsigned short, char2, uchar2, char4, uchar4, short2,
              ushort2, short4, ushort4, int2, uint2, int4, uint4, longlong2, ulonglong2, float2, float4, double2>;

template <class T>
inline T shuffle(EmuWarpOp op, unsigned mask, T value, int argument, int width, EmuPlace place) {
    static_assert(can_shuffle<T>, "CUDA shuffles no such type");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = emu_warp(op, mask, bits, argument, width, place);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMU_CALLER) {
    return emu::shuffle(EMU_SHUFFLE_INDEX, mask, value, lane, width, EMU_PLACE("__shfl_sync"));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_CALLER) {
    return emu::shuffle(EMU_SHUFFLE_UP, mask, value, (int)delta, width, EMU_PLACE("__shfl_up_sync"));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_CALLER) {
    return emu::shuffle(EMU_SHUFFLE_DOWN, mask, value, (int)delta, width, EMU_PLACE("__shfl_down_sync"));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMU_CALLER) {
    return emu::shuffle(EMU_SHUFFLE_XOR, mask, value, lane_mask, width, EMU_PLACE("__shfl_xor_sync"));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_CALLER) {
    emu_warp(EMU_SYNCWARP, mask, 0, 0, 32, EMU_PLACE("__syncwarp"));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_CALLER) {
    return (unsigned)emu_warp(EMU_BALLOT, mask, predicate != 0, 0, 32, EMU_PLACE("__ballot_sync"));
}
inline int __any_sync(unsigned mask, int predicate, EMU_CALLER) {
    return (int)emu_warp(EMU_ANY, mask, predicate != 0, 0, 32, EMU_PLACE("__any_sync"));
}
inline int __all_sync(unsigned mask, int predicate, EMU_CALLER) {
    return (int)emu_warp(EMU_ALL, mask, predicate != 0, 0, 32, EMU_PLACE("__all_sync"));
}

// ---- Atomics ------------------------------------------------------------------------------------
// All CUDA threads run in one thread of the host and switch only where the runtime lets them, so a plain
// read-modify-write is atomic. emu_atomic checks the address and tells the race check.
namespace emu {

template <class T>
struct exactly {  // keeps a parameter out of template argument deduction
    typedef T type;
};

template <class T, class Update>
__attribute__((noinline, no_sanitize("thread", "undefined"))) T atomic(T* address, Update update) {
    emu_atomic(address, sizeof(T), __builtin_return_address(0));
    T old = *address;
    *address = update(old);
    return old;
}

}  // namespace emu

#define EMU_ATOMIC(name, updated)                                                        \
    template <class T>                                                                   \
    inline T name(T* address, typename emu::exactly<T>::type value) {                    \
        return emu::atomic(address, [value](T old) -> T { return updated; });                \
    }
EMU_ATOMIC(atomicAdd, (T)(old + value))
EMU_ATOMIC(atomicSub, (T)(old - value))
EMU_ATOMIC(atomicExch, ((void)old, value))
EMU_ATOMIC(atomicMax, old > value ? old : value)
EMU_ATOMIC(atomicMin, old < value ? old : value)
EMU_ATOMIC(atomicAnd, (T)(old & value))
EMU_ATOMIC(atomicOr, (T)(old | value))
EMU_ATOMIC(atomicXor, (T)(old ^ value))
EMU_ATOMIC(atomicInc, old >= value ? T(0) : (T)(old + 1))
EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : (T)(old - 1))
template <class T>
inline T atomicCAS(T* address, typename emu::exactly<T>::type expected, typename emu::exactly<T>::type value) {
    return emu::atomic(address, [=](T old) -> T { return old == expected ? value : old; });
}

// ---- Loads and stores with a cache hint ---------------------------------------------------------
// In checked kernels they ask for the check themselves, so that a fault is reported at their caller's line.
#ifdef __SANITIZE_THREAD__
#define EMU_HINTED __attribute__((noinline, no_sanitize("thread", "undefined")))
#define EMU_CHECK_LOAD(read_only) \
    emu_load(address, sizeof(T), alignof(T), read_only, __builtin_return_address(0))
#define EMU_CHECK_STORE() emu_store(address, sizeof(T), alignof(T), __builtin_return_address(0))
#else
#define EMU_HINTED inline
#define EMU_CHECK_LOAD(read_only) ((void)0)
#define EMU_CHECK_STORE() ((void)0)
#endif

#define EMU_LOAD(name, read_only)           \
    template <class T>                      \
    EMU_HINTED T name(const T* address) {   \
        static_assert(emu::can_load_with_hint<T>, "CUDA loads no such type with a hint"); \
        EMU_CHECK_LOAD(read_only);          \
        return *address;                    \
    }
EMU_LOAD(__ldg, true)  // through the read-only cache: nothing may write there in the same launch
EMU_LOAD(__ldca, false)
EMU_LOAD(__ldcg, false)
EMU_LOAD(__ldcs, false)
EMU_LOAD(__ldcv, false)
EMU_LOAD(__ldlu, false)

#define EMU_STORE(name)                                                         \
    template <class T>                                                          \
    EMU_HINTED void name(T* address, typename emu::exactly<T>::type value) {    \
        static_assert(emu::can_load_with_hint<T>, "CUDA stores no such type with a hint"); \
        EMU_CHECK_STORE();                                                      \
        *address = value;                                                       \
    }
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwb)
EMU_STORE(__stwt)

// ---- Bits ---------------------------------------------------------------------------------------
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll((unsigned long long)value) : 64; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}

namespace emu {

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// What g++ cannot make a part of an fma.
template <class T>
inline T alone(T value) {
    asm("" : "+m"(value));
    return value;
}

}  // namespace emu

inline float __int_as_float(int value) { return emu::bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return emu::bit_cast<float>(value); }
inline int __float_as_int(float value) { return emu::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return emu::bit_cast<unsigned>(value); }
inline double __longlong_as_double(long long value) { return emu::bit_cast<double>(value); }
inline long long __double_as_longlong(double value) { return emu::bit_cast<long long>(value); }

// ---- Mathematics --------------------------------------------------------------------------------
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }
inline float __frsqrt_rn(float x) { return (float)(1.0 / ::sqrt((double)x)); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return emu::alone(a) + emu::alone(b); }
inline float __fsub_rn(float a, float b) { return emu::alone(a) - emu::alone(b); }
inline float __fmul_rn(float a, float b) { return emu::alone(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float x) { return expf(x); }
inline double __dadd_rn(double a, double b) { return emu::alone(a) + emu::alone(b); }
inline double __dsub_rn(double a, double b) { return emu::alone(a) - emu::alone(b); }
inline double __dmul_rn(double a, double b) { return emu::alone(a * b); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return ::sqrt(x); }
inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
inline float __double2float_rn(double x) { return (float)x; }

#define EMU_MIN_MAX(A, B, R)                                            \
    inline R min(A a, B b) { return (R)a < (R)b ? (R)a : (R)b; }        \
    inline R max(A a, B b) { return (R)a > (R)b ? (R)a : (R)b; }
EMU_MIN_MAX(int, int, int)
EMU_MIN_MAX(unsigned, unsigned, unsigned)
EMU_MIN_MAX(int, unsigned, unsigned)
EMU_MIN_MAX(unsigned, int, unsigned)
EMU_MIN_MAX(long, long, long)
EMU_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMU_MIN_MAX(long long, long long, long long)
EMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return ::fmin(a, b); }
inline double max(double a, double b) { return ::fmax(a, b); }

// ---- What prepass.py and build.py write into the text -------------------------------------------
namespace emu {

// A shared variable is a reference to memory that the block owns. `key` is a static of the declaration, so
// that each declaration, in each instance of a template, has its own memory, with its own bounds.
template <class T>
inline T& shared(const void* key, const char* name) {
    return *static_cast<T*>(emu_shared(key, sizeof(T), alignof(T), name));
}

inline void launch_bounds(unsigned threads, unsigned = 0, unsigned = 0, EMU_CALLER) {
    if (blockDim.x * blockDim.y * blockDim.z > threads) {
        emu_fail_at("the block has more threads than __launch_bounds__ allows", EMU_PLACE("__launch_bounds__"));
    }
}

template <class T>
constexpr char kind_of() {
    typedef std::remove_cv_t<T> U;
    if (std::is_void_v<U>) return 'v';
    if (std::is_same_v<U, __half>) return 'h';
    if (std::is_same_v<U, __nv_bfloat16>) return 'b';
    if (std::is_same_v<U, bool>) return '?';
    if (std::is_floating_point_v<U>) return 'f';
    if (std::is_integral_v<U>) return std::is_signed_v<U> ? 'i' : 'u';
    return 's';
}

template <class T>
constexpr uint16_t size_of() {
    if constexpr (std::is_void_v<T>) return 1;
    else return sizeof(T);
}

template <class P>
constexpr EmuParameter describe() {
    typedef std::remove_pointer_t<P> T;
    return {std::is_pointer_v<P>, kind_of<T>(), size_of<T>()};
}

template <class... P, size_t... I>
__attribute__((noinline, no_sanitize("thread", "undefined")))
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
}

template <class... P>
struct Signature {
    static constexpr EmuParameter parameters[sizeof...(P) + 1] = {describe<P>()..., {}};
    static void invoke(void* kernel, void** arguments) {
        call((void (*)(P...))kernel, arguments, std::index_sequence_for<P...>());
    }
};

template <class... P>
EmuKernel export_kernel(const char* name, void (*kernel)(P...)) {
    typedef Signature<P...> S;
    return {name, S::invoke, (void*)kernel, (int)sizeof...(P), S::parameters};
}

}  // namespace emu

#define EMU_EXPORT(number, ...)                                                                   \
    extern "C" __attribute__((visibility("default"))) const EmuKernel* emu_kernel_##number() {    \
        static const EmuKernel kernel = emu::export_kernel(#__VA_ARGS__, __VA_ARGS__);            \
        return &kernel;                                                                           \
    }
