// The common part of all kernels: data types, the walk over a tensor, sums over a block and over blocks.
//
// A tensor is (N, C, S) with S adjacent elements per channel, contiguous; channels-last data is (N*S, C, 1).
// A block of THREADS threads has one group of adjacent channels and one of several splits of their elements:
//
//   blockIdx.x = group, blockIdx.y = split     (a sweep over the blocks is a sweep over memory)
//
// There are two ways to walk them, chosen by the host (launch.py), and compiled as COLUMNS:
//
//   COLUMNS  The tensor is a matrix of N rows and C*S columns. `lanes` threads side by side read V adjacent
//            columns each, 16 bytes, and keep to them down the rows: every thread knows its channels once and
//            for all. V divides C*S. For channels-last data, dense layers, and small maps such as 7 x 7.
//   ROWS     The group is one channel. Each of its N rows of S elements is walked in vectors from the first
//            16-byte boundary on. The elements before it and behind the last vector, the edges, are
//            walked element by element. For large maps.
//
// Sums of a thread are in the accumulator's type, over at most ITEMS (launch.py) elements each; all beyond is
// in float64 and in a fixed order, so that the same input and launch give the same bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FORMULA __device__ __forceinline__
#include "../../formulas.h"

#ifdef __CUDA_ARCH__
FORMULA void have_one(__half& value) { asm volatile("" : "+h"(reinterpret_cast<unsigned short&>(value))); }
FORMULA void have_one(__nv_bfloat16& value) { asm volatile("" : "+h"(reinterpret_cast<unsigned short&>(value))); }
#endif

constexpr int THREADS = 256;
constexpr int MAX_GROUP = 256;  // channels a group has at most
static_assert(MAX_GROUP <= THREADS, "a thread has each channel");

// Vectors of 16 bytes that a thread loads at once, of all tensors together. gpu.py --sweep tries others.
#ifndef LOADS
#define LOADS 4
#endif

// Blocks that a multiprocessor must have room for: 3 leave 80 registers a thread, 2 leave 128.
constexpr int MIN_BLOCKS = LOADS > 4 ? 2 : 3;

// The type that data is computed in.
template <typename T> struct AccumulatorOf { typedef float type; };
template <> struct AccumulatorOf<double> { typedef double type; };
template <typename T> using Accumulator = typename AccumulatorOf<T>::type;

// Widen a value. A bfloat16 is the upper half of a float: CUDA's own conversion takes one instruction more, from sm_90 on.
template <typename T> __device__ __forceinline__ Accumulator<T> widen(T value) { return static_cast<Accumulator<T>>(value); }
template <> __device__ __forceinline__ float widen(__nv_bfloat16 value)
{
    const unsigned short upper = __bfloat16_as_ushort(value);
#ifdef __CUDA_ARCH__
    float wide;
    asm("mov.b32 %0, {0, %1};" : "=f"(wide) : "h"(upper));
    return wide;
#else
    return __uint_as_float(static_cast<unsigned int>(upper) << 16);
#endif
}

// V adjacent elements, read and written at once.
template <typename T, int V> struct alignas(sizeof(T) * V) Vector { T values[V]; };

template <typename T, int V> __device__ __forceinline__ Vector<T, V> load(const T* from)
{
    return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <typename T, int V> __device__ __forceinline__ void store(T* to, const Vector<T, V>& vector)
{
#ifdef STREAMING_STORES  // a variant that gpu.py --sweep tries: what is written leaves the caches first
    if constexpr (sizeof(vector) == sizeof(uint4)) {
        __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&vector));
        return;
    }
#endif
    *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// A parameter or running statistic: of the data's type, or float32 beside 16-bit data.
template <typename T> __device__ __forceinline__ double read_parameter(const void* values, bool is_float, long long i)
{
    if (sizeof(T) == 2 && is_float) return static_cast<const float*>(values)[i];
    return static_cast<double>(widen(static_cast<const T*>(values)[i]));
}

template <typename T>
__device__ __forceinline__ void write_parameter(void* values, bool is_float, long long i, double value)
{
    if (sizeof(T) == 2 && is_float)
        static_cast<float*>(values)[i] = static_cast<float>(value);
    else
        static_cast<T*>(values)[i] = static_cast<T>(static_cast<Accumulator<T>>(value));
}

// The bits of an argument `flags`: which of these arrays are float32 though the data has 16 bits; and whether the
// normalization is in place, see formulas.h.
enum Flags { WEIGHT_IS_FLOAT = 1, BIAS_IS_FLOAT = 2, MEAN_IS_FLOAT = 4, VAR_IS_FLOAT = 8, IN_PLACE = 16 };

// The tensor's shape and how blocks share it. The host passes the fields one by one: see `GEOMETRY`.
struct Geometry {
    long long N, C, S;
    long long lanes;      // COLUMNS: threads side by side; ROWS: 1
    long long group;      // channels a group has (the last one may have fewer)
    long long per_split;  // COLUMNS: rows a split; ROWS: vectors a split
    long long groups, splits;
};
#define GEOMETRY                                                                                                     \
    long long N, long long C, long long S, long long lanes, long long group, long long per_split, long long groups,  \
        long long splits

// The end of each vector that the ranks add up, see comm/trailer.py: a sum that is not sound tells of a fault.
constexpr int TRAILER_LENGTH = 5;
#define TRAILER double fault, double low, double low_square, double high, double high_square
__device__ __forceinline__ void write_trailer(double* to, TRAILER)
{
    to[0] = fault;
    to[1] = low;
    to[2] = low_square;
    to[3] = high;
    to[4] = high_square;
}

// Whether the sum is right: no rank had a fault, and all were in the same call. The host may learn it later.
//
// trailer   [5]: sums over the ranks of fault, low, low², high and high², see comm/trailer.py
__device__ __forceinline__ bool is_sound(const double* trailer, long long ranks)
{
    // All are read at once: && would wait for each.
    return (trailer[0] == 0) & (ranks * trailer[2] == trailer[1] * trailer[1])
        & (ranks * trailer[4] == trailer[3] * trailer[3]);
}

// Write the trailer of a sum, which the host looks at when the kernel has ended, to memory of the host: so no copy stands
// between the sum and the kernel. One thread of all calls this.
//
// mailbox   [5] pinned memory, or null
__device__ __forceinline__ void tell_host(double* mailbox, const double* trailer)
{
    if (!mailbox) return;
#pragma unroll
    for (int i = 0; i < TRAILER_LENGTH; ++i) mailbox[i] = trailer[i];
}

// a / b for a below 2^16, by a reciprocal: an integer division has three times the instructions. Half off a
// multiple of b, the quotient is further from an integer than its error.
__device__ __forceinline__ int quotient(int a, int b)
{
    return static_cast<int>(__fdividef(static_cast<float>(a) + 0.5f, static_cast<float>(b)));
}

// The part of the tensor that a block works on.
struct Part {
    long long index, split, splits;  // of the group of channels, and which of its splits
    long long channel;               // the first
    int channels;
};

// The second pass over a tensor takes the blocks in reverse: the last ones of the first pass left their data in L2.
template <bool REVERSE> __device__ __forceinline__ Part part_of_block(const Geometry& g)
{
    Part part;
    part.index = REVERSE ? static_cast<unsigned int>(g.groups) - 1 - blockIdx.x : blockIdx.x;
    part.split = REVERSE ? static_cast<unsigned int>(g.splits) - 1 - blockIdx.y : blockIdx.y;
    part.splits = g.splits;
    part.channel = part.index * g.group;
    part.channels = static_cast<int>(min(g.group, g.C - part.channel));
    return part;
}

// Where a vector is, and the number of its byte in the activation's mask.
struct Place {
    long long element, mask;
};

// The vectors that this thread visits, one after the other.
template <int V, bool COLUMNS> class Cursor;

template <int V> class Cursor<V, true> {
public:
    __device__ __forceinline__ Cursor(const Geometry& g, const Part& part)
    {
        const int lanes = static_cast<int>(g.lanes), height = quotient(THREADS, lanes);
        const int y = quotient(threadIdx.x, lanes), x = static_cast<int>(threadIdx.x) - y * lanes;
        const long long width = g.C * g.S, column = part.channel * g.S + x * V;
        const long long row = part.split * g.per_split + y;
        const long long end = min(g.N, (part.split + 1) * g.per_split);
        const bool idle = y >= height || x * V >= part.channels * g.S;
        left_ = idle || row >= end ? 0 : static_cast<int>((end - row + height - 1) / height);
        element_ = row * width + column;
        step_ = height * width;
    }
    __device__ __forceinline__ bool in_range() const { return left_ > 0; }
    __device__ __forceinline__ bool is_vector() const { return true; }
    __device__ __forceinline__ Place place() const { return {element_, element_ / V}; }
    __device__ __forceinline__ void advance()
    {
        element_ += step_;
        --left_;
    }

private:
    long long element_, step_;
    int left_;
};

template <int V> class Cursor<V, false> {
public:
    __device__ __forceinline__ Cursor(const Geometry& g, const Part& part)
    {
        const long long slots = max(g.S / V, 1LL), mask_slots = g.S % V ? slots + 2LL * V : slots;  // of a row
        const long long first = part.split * g.per_split + threadIdx.x, row = first / slots;
        const long long end = min(g.N * slots, (part.split + 1) * g.per_split);
        left_ = first < end ? static_cast<int>((end - first + THREADS - 1) / THREADS) : 0;
        slots_ = static_cast<unsigned int>(slots);
        slot_ = static_cast<unsigned int>(first - row * slots);
        rest_ = static_cast<int>(g.S - slots * V);
        element_ = (row * g.C + part.channel) * g.S + static_cast<long long>(slot_) * V;
        mask_ = (row * g.C + part.channel) * mask_slots + slot_;
        // A row may have fewer vectors than there are threads.
        const unsigned int rows = quotient(THREADS, slots_);
        step_ = THREADS - rows * slots_;
        element_step_ = rows * (g.C * g.S) + static_cast<long long>(step_) * V;
        mask_step_ = rows * (g.C * mask_slots) + step_;
        element_wrap_ = g.C * g.S - slots * V;
        mask_wrap_ = g.C * mask_slots - slots;
    }
    __device__ __forceinline__ bool in_range() const { return left_ > 0; }
    // An unaligned row may have a vector less than the aligned ones.
    __device__ __forceinline__ bool is_vector() const { return V == 1 || slot_ + 1 < slots_ || head() <= rest_; }
    __device__ __forceinline__ Place place() const { return {element_ + head(), mask_}; }
    // Sums only: a division and products were a third of the instructions of the loop.
    __device__ __forceinline__ void advance()
    {
        slot_ += step_;
        element_ += element_step_;
        mask_ += mask_step_;
        if (slot_ >= slots_) {  // in the next row
            slot_ -= slots_;
            element_ += element_wrap_;
            mask_ += mask_wrap_;
        }
        --left_;
    }

private:
    // Elements before the row's first vector.
    __device__ __forceinline__ int head() const { return V == 1 ? 0 : static_cast<int>(-element_ & (V - 1)); }

    long long element_, element_step_, element_wrap_, mask_, mask_step_, mask_wrap_;  // without the head
    unsigned int slots_, slot_, step_;  // slots: the vectors of a row; launch.py sees to it that they are below 2^31
    int rest_, left_;                   // elements of a row that its vectors leave, and vectors to visit
};

// Show `body` the elements that this thread has. It is asked for
//   load<W>(place)           the W elements at a place, W being V, or 1 in the edges of a row;
//   begin(loaded, is_there)  before the first use of each batch of UNROLL loads, all under way at once;
//   use<W>(loaded, place)    to work on them.
template <int V, bool COLUMNS, int UNROLL, typename Body>
__device__ __forceinline__ void walk(const Geometry& g, const Part& part, Body& body)
{
    Cursor<V, COLUMNS> cursor(g, part);
    while (cursor.in_range()) {
        typename Body::template Loaded<V> loaded[UNROLL];
        Place place[UNROLL];
        bool is_there[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            is_there[i] = cursor.in_range() && cursor.is_vector();
            if (is_there[i]) {
                place[i] = cursor.place();
                loaded[i] = body.template load<V>(place[i]);
            }
            if (cursor.in_range()) cursor.advance();
        }
        body.begin(loaded, is_there);
#pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            if (is_there[i]) body.template use<V>(loaded[i], place[i]);
    }
    if constexpr (!COLUMNS && V > 1) {
        if (g.S % V == 0) return;
        // Each split has the edges of some rows: V places for those before the first vector, V for the rest.
        const long long rows = (g.N + part.splits - 1) / part.splits, slots = max(g.S / V, 1LL);
        const long long first = part.split * rows, end = min(g.N, first + rows);
#pragma unroll 1  // the registers are for the vectors
        for (long long i = first * 2 * V + threadIdx.x; i < end * 2 * V; i += THREADS) {
            const long long row = i / (2 * V) * g.C + part.channel;
            const int k = static_cast<int>(i % (2 * V));
            const long long head = min(-row * g.S & (V - 1), g.S), rest = head + (g.S - head) / V * V;
            const long long s = k < V ? k : rest + k - V;
            if (k < V ? s >= head : s >= g.S) continue;
            const Place place = {row * g.S + s, row * (slots + 2 * V) + slots + k};
            body.template use<1>(body.template load<1>(place), place);
        }
    }
}

// How many channels a vector may have elements of: in ROWS just the block's one.
template <int V, bool COLUMNS> constexpr int CHANNELS = COLUMNS ? V : 1;

// The number, within the group, of the channel that element e of this thread's vectors belongs to.
template <int V, bool COLUMNS> __device__ __forceinline__ int channel_of(const Geometry& g, const Part& part, int e)
{
    if (!COLUMNS) return 0;
    const int lanes = static_cast<int>(g.lanes), S = static_cast<int>(g.S), x = threadIdx.x % lanes;
    return min((x * V + e) / S, part.channels - 1);  // an idle thread's may be none of them
}

// Write the numbers of all elements' channels: one division, and steps.
template <int V, bool COLUMNS>
__device__ __forceinline__ void channels_of(const Geometry& g, const Part& part, int (&channels)[CHANNELS<V, COLUMNS>])
{
    if constexpr (COLUMNS) {
        const int lanes = static_cast<int>(g.lanes), S = static_cast<int>(g.S);
        const int first = (static_cast<int>(threadIdx.x) - quotient(threadIdx.x, lanes) * lanes) * V;
        int k = quotient(first, S), s = first - k * S;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            channels[e] = min(k, part.channels - 1);  // see above
            if (++s == S) {
                s = 0;
                ++k;
            }
        }
    } else {
        channels[0] = 0;
    }
}

// Two sums for each element of the vectors of each thread, in shared memory.
//
// Elements change places with their neighbours, so that there are few conflicts of banks: neither do eight threads side
// by side meet, which write, nor eight columns side by side, which are read.
template <int W> struct Entries {
    double2* all;

    // Element i of those of all threads, W of each.
    __device__ __forceinline__ double2& at(unsigned int i) const { return all[i ^ (i / 8 % W)]; }
    // Element w of this thread.
    __device__ __forceinline__ double2& operator[](int w) const
    {
        return all[threadIdx.x * W + (w ^ (threadIdx.x * W / 8 % W))];
    }
};

// Add up two values of every element of every thread, by channel, over the block and then over the splits.
//
// write     called with (entries): writes this thread's two values of the channel of element w of its vectors to
//           entries[w], for all w < CHANNELS
// partials  [splits][C][2]: the sums of the blocks
// counters  [groups]: how many blocks of a group are done; zero before the launch and after it
// finish    called with (channel, sum of the first, sum of the second) in the last block of a group, for each of its
//           channels by the thread of its number in the group. Returns whether this block was the last.
template <int V, bool COLUMNS, typename Write, typename Finish>
__device__ __forceinline__ bool sum_by_channel(const Geometry& g, const Part& part, double* partials,
                                               unsigned int* counters, Write write, Finish finish)
{
    constexpr int W = CHANNELS<V, COLUMNS>, WARP = 32;
    constexpr int AT_ONCE = 6;  // more would take registers from the walk
    __shared__ double2 shared[W * THREADS];
    const Entries<W> entries = {shared};
    write(entries);
    // Adjacent entries of a channel: S of them, or those of its vectors, which each thread adds up by itself.
    const int columns = COLUMNS ? static_cast<int>(g.S) : 1;
    const bool is_whole = W > 1 && columns % W == 0;
    const int stride = is_whole ? W : 1, S = is_whole ? columns / W : columns;
    if (is_whole) {
        double2 sum = entries[0];
#pragma unroll
        for (int w = 1; w < W; ++w) {
            sum.x += entries[w].x;
            sum.y += entries[w].y;
        }
        entries[0] = sum;
    }
    __syncthreads();  // publishes the entries
    // As many lanes of a warp share a channel as there are for each. Channels are side by side, as their columns are.
    const int power = COLUMNS ? min(__clz(static_cast<int>(g.group) - 1) - __clz(THREADS - 1), 5) : 5;
    const unsigned int width = 1u << power, jobs = WARP >> power, in_warp = threadIdx.x % WARP;
    const int lane = in_warp >> 5 - power, k = threadIdx.x / WARP * jobs + (in_warp & jobs - 1);
    double sums[2] = {0, 0};
    const auto add = [&](const double2& entry) {
        sums[0] += entry.x;
        sums[1] += entry.y;
    };
    if (!COLUMNS && k == 0) {
#pragma unroll
        for (int y = 0; y < THREADS; y += WARP) add(entries.at(y + lane));
    } else if (COLUMNS && k < part.channels) {
        const int lanes = static_cast<int>(g.lanes), height = quotient(THREADS, lanes), row = lanes * W;
        // Each begins at an entry s of row y of its channel, and goes on by so many rows and entries.
        const int first_y = quotient(lane, S), first_s = lane - first_y * S;
        const int step_y = quotient(width, S), step_s = width - step_y * S;
        const int step = step_y * row + step_s * stride, wrap = row - columns;
        int i = first_y * row + k * columns + first_s * stride;
        for (int y = first_y, s = first_s; y < height;) {
            add(entries.at(i));
            y += step_y;
            s += step_s;
            i += step;
            if (s >= S) {
                s -= S;
                ++y;
                i += wrap;
            }
        }
    }
    for (unsigned int distance = WARP / 2; distance >= jobs; distance /= 2) {
        sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], distance);
        sums[1] += __shfl_xor_sync(0xffffffffu, sums[1], distance);
    }
    if (lane == 0 && k < part.channels) {
        double* to = partials + (part.split * g.C + part.channel + k) * 2;
        to[0] = sums[0];
        to[1] = sums[1];
    }
    __syncthreads();  // publishes the partials within the block
    if (part.splits > 1) {
        bool is_last = false;
        if (threadIdx.x == 0) {
            __threadfence();  // the block's partials are visible before it counts as done
            is_last = atomicAdd(counters + part.index, 1u) == part.splits - 1;
            if (is_last) __threadfence();  // the other blocks' partials are, after they all have
        }
        // Tells all threads, and orders the reads below after the fence.
        if (!__syncthreads_or(is_last)) return false;
        if (threadIdx.x == 0) counters[part.index] = 0;
    }
    // The whole grid waits for this block: as many threads share the splits of a channel as there are, and each has
    // several loads under way. They are from L2: an L1 cache does not see the writes of other multiprocessors.
    const int number = quotient(threadIdx.x, part.channels), channel = threadIdx.x - number * part.channels;
    const int splits = static_cast<int>(part.splits);
    int threads = min(splits, quotient(THREADS, part.channels));
    sums[0] = sums[1] = 0;
    if (number < threads) {
        const double2* from = reinterpret_cast<const double2*>(partials) + number * g.C + part.channel + channel;
        const long long step = threads * g.C;
        for (int left = splits - number; left > 0; left -= AT_ONCE * threads, from += AT_ONCE * step) {
            double2 loaded[AT_ONCE] = {};
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (i * threads < left) loaded[i] = __ldcg(from + i * step);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                sums[0] += loaded[i].x;
                sums[1] += loaded[i].y;
            }
        }
    }
    for (int rest; threads > 1; threads = rest) {
        rest = (threads + 1) / 2;
        if (number < threads) shared[threadIdx.x] = {sums[0], sums[1]};
        __syncthreads();  // publishes the sums; what is read of them here is not written to in the next round
        if (number + rest < threads) {
            sums[0] += shared[threadIdx.x + rest * part.channels].x;
            sums[1] += shared[threadIdx.x + rest * part.channels].y;
        }
    }
    if (number == 0) finish(part.channel + channel, sums[0], sums[1]);
    return true;
}
