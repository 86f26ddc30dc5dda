// Vectors of a processor's lanes: 32 bytes of what data is computed in, by GCC's vector extensions.
//
// All instruction sets compute in the same lanes, those with shorter registers in several of them, so that sums, too, have
// the same bits on all. A vector is loaded by dereferencing: GCC 12 would take a memcpy of 32 bytes through the stack.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include "../../formulas.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace core {

using i64 = int64_t;

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef float FloatsInMemory __attribute__((vector_size(32), aligned(4), may_alias));
typedef double DoublesInMemory __attribute__((vector_size(32), aligned(8), may_alias));
typedef uint16_t HalvesInMemory __attribute__((vector_size(16), aligned(2), may_alias));

// --- Elements: what they are computed in, and how they are loaded and stored -----------------------------------------------

struct float16 {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};
typedef float float32;
typedef double float64;

// The lanes of an accumulator's type.
template <class A> struct Lanes;
template <> struct Lanes<float> {
    using V = Floats;
    static constexpr int W = 8;
    static INLINE V load(const float* from) { return *reinterpret_cast<const FloatsInMemory*>(from); }
    static INLINE void store(float* to, V v) { *reinterpret_cast<FloatsInMemory*>(to) = v; }
};
template <> struct Lanes<double> {
    using V = Doubles;
    static constexpr int W = 4;
    static INLINE V load(const double* from) { return *reinterpret_cast<const DoublesInMemory*>(from); }
    static INLINE void store(double* to, V v) { *reinterpret_cast<DoublesInMemory*>(to) = v; }
};

template <class T> struct Element : Lanes<T> {
    using A = T;
};

template <> struct Element<bfloat16> : Lanes<float> {
    using A = float;
    static INLINE V load(const bfloat16* from)
    {
#ifdef __AVX2__
        return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
#else
        const Halves halves = *reinterpret_cast<const HalvesInMemory*>(from);
        return (V)(__builtin_convertvector(halves, Words) << 16);
#endif
    }
    static INLINE void store(bfloat16* to, V v)
    {
        const Words bits = (Words)v, is_number = (Words)(v == v);
        const Words half = 0x7FFF + ((bits >> 16) & 1);          // to nearest, ties to even
        const Words result = (bits + (half & is_number)) >> 16;  // a NaN of arithmetic is quiet: its upper half is one too
#ifdef __AVX2__
        const __m256i words = (__m256i)result;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
        *reinterpret_cast<HalvesInMemory*>(to) = __builtin_convertvector(result, Halves);
#endif
    }
};

template <> struct Element<float16> : Lanes<float> {
    using A = float;
#ifdef __F16C__
    static INLINE V load(const float16* from) { return (V)_mm256_cvtph_ps((__m128i)*reinterpret_cast<const HalvesInMemory*>(from)); }
    static INLINE void store(float16* to, V v) { *reinterpret_cast<HalvesInMemory*>(to) = (Halves)_mm256_cvtps_ph((__m256)v, 0); }
#else
    // Not in line: they are long.
    static __attribute__((noinline)) V load(const float16* from)
    {
        const Halves halves = *reinterpret_cast<const HalvesInMemory*>(from);
        // The product changes the bias of the exponent, and is exact for subnormals too.
        const Words bits = __builtin_convertvector(halves, Words), sign = (bits & 0x8000) << 16;
        const V scaled = (V)((bits & 0x7FFF) << 13) * 0x1p112f;
        const Words is_special = (Words)((bits & 0x7C00) == 0x7C00), is_nan = (Words)((bits & 0x7FFF) > 0x7C00);
        return (V)((Words)scaled | (is_special & 0x7F800000u) | (is_nan & 0x00400000u) | sign);
    }
    static __attribute__((noinline)) void store(float16* to, V v)
    {
        const Words bits = (Words)v, sign = (bits >> 16) & 0x8000, body = bits & 0x7FFFFFFF;
        const Words normal = (body - (112u << 23) + 0xFFF + ((body >> 13) & 1)) >> 13;  // to nearest, ties to even
        const Words subnormal = (Words)((V)body + 0.5f) - 0x3F000000u;                  // the sum rounds
        const Words is_small = (Words)(body < 0x38800000u), is_big = (Words)(body >= 0x477FF000u);
        const Words is_nan = (Words)(body > 0x7F800000u);
        const Words special = 0x7C00u | (is_nan & (0x0200u | ((body >> 13) & 0x3FF)));
        const Words finite = (subnormal & is_small) | (normal & ~is_small);
        *reinterpret_cast<HalvesInMemory*>(to) = __builtin_convertvector((special & is_big) | (finite & ~is_big) | sign, Halves);
    }
#endif
};

// Which lanes of a vector count. At the end of a row a vector begins early enough to end with it, and its first lanes, which
// the one before has computed, are computed once more; sums leave them out.
struct All {
    static constexpr i64 skipped = 0;
};
struct From {
    i64 skipped;
};
// In rows shorter than a vector: the first ones.
struct First {
    i64 count;
    static constexpr i64 skipped = 0;
};

template <class T, class Which> INLINE auto load(const T* from, Which) { return Element<T>::load(from); }
// The other lanes are zero.
template <class T> INLINE auto load(const T* from, First first)
{
    T elements[Element<T>::W] = {};
    std::memcpy(elements, from, first.count * sizeof(T));
    return Element<T>::load(elements);
}

template <class T, class Which> INLINE void store(T* to, typename Element<T>::V v, Which) { Element<T>::store(to, v); }
template <class T> INLINE void store(T* to, typename Element<T>::V v, First first)
{
    T elements[Element<T>::W];
    Element<T>::store(elements, v);
    std::memcpy(to, elements, first.count * sizeof(T));
}

template <class T> INLINE typename Element<T>::A value_of(T element) { return load(&element, First{1})[0]; }
template <> INLINE float value_of(float element) { return element; }
template <> INLINE float value_of(bfloat16 element)
{
    const uint32_t bits = static_cast<uint32_t>(element.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
#ifdef __F16C__
template <> INLINE float value_of(float16 element) { return _cvtsh_ss(element.bits); }
#endif
template <> INLINE double value_of(double element) { return element; }

template <class V, class A> INLINE V all_lanes(A value) { return value - V{}; }

// The vector with zeros in the lanes that do not count.
template <class V> INLINE V counted(V v, All) { return v; }
template <class V, class Which> INLINE V counted(V v, Which which)
{
    auto lane = v > 0;  // of its type: integers of as many bits
    for (int i = 0; i < static_cast<int>(sizeof v / sizeof v[0]); ++i) lane[i] = i;
    using Integers = decltype(lane);
    using Integer = std::decay_t<decltype(lane[0])>;
    if constexpr (std::is_same_v<Which, From>)
        return (V)((Integers)v & (lane >= static_cast<Integer>(which.skipped)));
    else
        return (V)((Integers)v & (lane < static_cast<Integer>(which.count)));
}

// Call body(i, which) for the vectors that cover n elements: as many as a vector has, at least.
template <int W, class Body> INLINE void each_vector(i64 n, Body body)
{
    i64 i = 0;
    for (; i + W <= n; i += W) body(i, All{});
    if (i < n) body(n - W, From{W - (n - i)});
}

// --- Masks: a bit per element -----------------------------------------------------------------------------------------------

// The signs of the lanes.
INLINE unsigned signs(Floats v)
{
#if defined(__AVX__)
    return _mm256_movemask_ps((__m256)v);
#elif defined(__SSE2__)
    __m128 half[2];
    std::memcpy(half, &v, 32);
    return _mm_movemask_ps(half[0]) | _mm_movemask_ps(half[1]) << 4;
#else
    unsigned bits = 0;
    for (int lane = 0; lane < 8; ++lane) bits |= ((Words)v)[lane] >> 31 << lane;
    return bits;
#endif
}
INLINE unsigned signs(Doubles v)
{
    typedef uint64_t Bits __attribute__((vector_size(32)));
    unsigned bits = 0;
    for (int lane = 0; lane < 4; ++lane) bits |= static_cast<unsigned>(((Bits)v)[lane] >> 63) << lane;
    return bits;
}

// Write the bits of the vector at element i of a row, but for those of lanes that do not count.
template <int W, class Which> INLINE void write_bits(uint8_t* mask, i64 i, unsigned bits, Which which)
{
    i += which.skipped;  // a multiple of W
    bits >>= which.skipped;
    if (W == 8 || i % 8 == 0)
        mask[i / 8] = static_cast<uint8_t>(bits);
    else
        mask[i / 8] |= bits << 4;
}

// Return lanes of ones where the bits of the vector at element i are set.
template <int W> INLINE int32_t bits_at(const uint8_t* mask, i64 i)
{
    const int shift = i % 8;
    const unsigned bits = mask[i / 8] | (shift + W > 8 ? mask[i / 8 + 1] << 8 : 0);
    return static_cast<int32_t>(bits >> shift);
}
INLINE auto lanes_of_bits(const uint8_t* mask, i64 i, Floats)
{
    typedef int32_t Integers __attribute__((vector_size(32)));
    const Integers each = {1, 2, 4, 8, 16, 32, 64, 128};
    return ((bits_at<8>(mask, i) - Integers{}) & each) != 0;
}
INLINE auto lanes_of_bits(const uint8_t* mask, i64 i, Doubles)
{
    typedef int64_t Integers __attribute__((vector_size(32)));
    const Integers each = {1, 2, 4, 8};
    return ((static_cast<int64_t>(bits_at<4>(mask, i)) - Integers{}) & each) != 0;
}

// --- Sums -----------------------------------------------------------------------------------------------------------------

// Add the lanes of v to four float64 sums.
INLINE void add_to(Doubles& sums, Floats v)
{
    float lanes[8];
    Lanes<float>::store(lanes, v);
    const Doubles low = {lanes[0], lanes[1], lanes[2], lanes[3]}, high = {lanes[4], lanes[5], lanes[6], lanes[7]};
    sums += low + high;
}
INLINE void add_to(Doubles& sums, Doubles v) { sums += v; }
INLINE double total(Doubles v) { return (v[0] + v[1]) + (v[2] + v[3]); }

}  // namespace core
