// Statistics of one rank: the tensor is read once, and the vector that the ranks add up is written.
//
// Each thread sums x - shift and (x - shift)² in the accumulator's type, about a shift of its own: a value that it
// meets, so that little cancels at any offset, and the median of three, so that an outlier is seldom taken. If one was,
// the thread sums again, about its mean. The sums of the threads are moved to one float64 pivot per channel and added up
// (formulas of Chan, Golub and LeVeque 1983 for the shift of a sum of squares). The last block of a channel to be done
// writes its part of the vector
//
//   [n pivot (C) | n pivot² (C) | Σ(x - pivot) (C) | Σ(x - pivot)² + 2 pivot Σ(x - pivot) (C) | n | trailer (5)]
//
// about the pivot rounded to 12 bits, for the reason given in backends/__init__.py.
//
// Traffic: the tensor once, and 32 bytes per channel and split. Launch: THREADS threads, groups by splits blocks.
#include "common.cuh"

template <typename A> __device__ __forceinline__ A median(A a, A b, A c)
{
    const A low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c > high ? high : c;
}

template <typename A> __device__ __forceinline__ A finite_or_zero(A value) { return isfinite(value) ? value : A(0); }

// The first value of a channel, about which the sums of the threads are united.
template <typename T> __device__ __forceinline__ Accumulator<T> as_pivot(T value) { return finite_or_zero(widen(value)); }

// Load the pivot of a channel. Each thread has one, which is under way beside the first vectors.
template <typename T, bool COLUMNS>
__device__ __forceinline__ T load_pivot(const T* x, const Geometry& g, const Part& part)
{
    T pivot = static_cast<T>(Accumulator<T>(0));
    const unsigned int column = COLUMNS ? threadIdx.x * static_cast<unsigned int>(g.S) : 0;
    if (threadIdx.x < part.channels && g.N > 0) pivot = x[part.channel * g.S + column];
    have(pivot);
    return pivot;
}

// Sums of one thread.
template <typename T, int V, bool COLUMNS> struct Moments {
    using A = Accumulator<T>;
    static constexpr int W = CHANNELS<V, COLUMNS>;
    template <int WIDTH> using Loaded = Vector<T, WIDTH>;

    const T* x;
    A shift[W] = {};
    A sum[V] = {}, square[V] = {};
    int count = 0;  // values summed about each shift
    bool has_shift = false, may_recentre = true;

    template <int WIDTH> __device__ __forceinline__ Loaded<WIDTH> load(const Place& place) const
    {
        return ::load<T, WIDTH>(x + place.element);
    }

    template <int WIDTH, int UNROLL>
    __device__ __forceinline__ void begin(const Vector<T, WIDTH> (&loaded)[UNROLL], const bool (&is_there)[UNROLL])
    {
        if (has_shift || !is_there[0]) return;
        has_shift = true;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            shift[w] = widen(loaded[0].values[w]);
            if constexpr (UNROLL > 2)
                if (is_there[1] && is_there[2])
                    shift[w] = median(shift[w], widen(loaded[1].values[w]), widen(loaded[2].values[w]));
            shift[w] = finite_or_zero(shift[w]);
        }
    }

    template <int WIDTH> __device__ __forceinline__ void use(const Loaded<WIDTH>& loaded, const Place&)
    {
        if (!has_shift) {  // in the edges of a row, whose thread found no vector
            has_shift = true;
            shift[0] = finite_or_zero(widen(loaded.values[0]));
        }
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
            const A difference = widen(loaded.values[e]) - shift[COLUMNS ? e : 0];
            sum[e] += difference;
            square[e] += difference * difference;
        }
        count += COLUMNS ? 1 : WIDTH;
    }

    // The sums about shift w.
    template <typename Sum> __device__ __forceinline__ void totals(int w, Sum& of_differences, Sum& of_squares) const
    {
        of_differences = sum[w];
        of_squares = square[w];
        if constexpr (!COLUMNS) {
#pragma unroll
            for (int e = 1; e < V; ++e) {
                of_differences += sum[e];
                of_squares += square[e];
            }
        }
    }

    // Called when all is summed. Returns whether to do it again: once, if a shift turns out to be so far from the mean,
    // 3.6 standard deviations, that the squares are of little else. Of normal data that is true of hardly any thread;
    // float64 has digits to spare.
    __device__ __forceinline__ bool recentre()
    {
        bool is_far = false;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            A differences, squares;
            totals(w, differences, squares);
            if (!(may_recentre && differences * differences > A(0.93) * count * squares && isfinite(squares))) continue;
            is_far = true;
            shift[w] += differences / count;
        }
        may_recentre = false;
        if (!is_far) return false;
        count = 0;
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] = square[e] = 0;
        return true;
    }
};

// Adds Σ(x - pivot) and Σ(x - pivot)² in float64 to the entries of sum_by_channel.
template <typename T, int V, bool COLUMNS> struct WideMoments {
    template <int WIDTH> struct Loaded {};

    const T* x;
    const Geometry& g;
    const Part& part;
    Entries<CHANNELS<V, COLUMNS>> entries;

    template <int WIDTH> __device__ __forceinline__ Loaded<WIDTH> load(const Place&) const { return {}; }

    template <typename L, typename B> __device__ __forceinline__ void begin(const L&, const B&) const {}

    template <int WIDTH> __device__ __forceinline__ void use(const Loaded<WIDTH>&, const Place& place) const
    {
#pragma unroll 1  // rarely run: the registers are for the rest of the kernel
        for (int e = 0; e < WIDTH; ++e) {
            const int w = COLUMNS ? e : 0;
            const double pivot = as_pivot(x[(part.channel + channel_of<V, COLUMNS>(g, part, w)) * g.S]);
            const double difference = static_cast<double>(widen(x[place.element + e])) - pivot;
            entries[w].x += difference;
            entries[w].y += difference * difference;
        }
    }
};

// Write the sums of a thread, moved to the pivots of the channels, to the entries of sum_by_channel.
template <typename T, int V, bool COLUMNS>
__device__ __forceinline__ void write_about_pivots(const Moments<T, V, COLUMNS>& moments, const Geometry& g,
                                                   const Part& part, T pivot,
                                                   const Entries<CHANNELS<V, COLUMNS>>& entries)
{
    using A = Accumulator<T>;
    constexpr int W = CHANNELS<V, COLUMNS>;
    bool finite = true;
    int channels[W];
    channels_of<V, COLUMNS>(g, part, channels);
    // The pivots go to all threads by the memory of the entries.
    A* staged = reinterpret_cast<A*>(entries.all);
    A pivots[W];
    if (threadIdx.x < part.channels) staged[threadIdx.x] = as_pivot(pivot);
    __syncthreads();  // publishes the pivots
#pragma unroll
    for (int w = 0; w < W; ++w) pivots[w] = staged[channels[w]];
    __syncthreads();  // all have read the pivots
#pragma unroll
    for (int w = 0; w < W; ++w) {
        double sum, square;
        moments.totals(w, sum, square);
        const double distance = static_cast<double>(moments.shift[w]) - pivots[w];
        const double moved = sum + moments.count * distance;
        entries[w] = {moved, square + distance * (sum + moved)};
        finite &= isfinite(square);
    }
    // Differences above 1e19 have squares beyond float32: once more, in float64.
    if (sizeof(Accumulator<T>) == 4 && !finite) {
        for (int w = 0; w < W; ++w) entries[w] = {0, 0};
        WideMoments<T, V, COLUMNS> wide = {moments.x, g, part, entries};
        walk<V, COLUMNS, 1>(g, part, wide);
    }
}

// x         [N, C, S]
// local     [3, C] pivot, Σ(x - pivot) and Σ(x - pivot)²; null if not wanted
// vector    [4 * C + 6] for the ranks to add up, ending in the trailer
// partials  [splits, C, 2], counters [groups]: see sum_by_channel
template <typename T, int V, bool COLUMNS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    statistics(const T* __restrict__ x, GEOMETRY, double* __restrict__ local, double* __restrict__ vector, TRAILER,
               double* partials, unsigned int* counters)
{
    const Geometry g = {N, C, S, lanes, group, per_split, groups, splits};
    const Part part = part_of_block<false>(g);

    const T pivot = load_pivot<T, COLUMNS>(x, g, part);
    Moments<T, V, COLUMNS> moments;
    moments.x = x;
    do
        walk<V, COLUMNS, LOADS>(g, part, moments);
    while (sizeof(Accumulator<T>) == 4 && moments.recentre());

    const double n = static_cast<double>(g.N * g.S);
    const bool is_last = sum_by_channel<V, COLUMNS>(
        g, part, partials, counters,
        [&](const Entries<CHANNELS<V, COLUMNS>>& entries) { write_about_pivots(moments, g, part, pivot, entries); },
        [&](long long c, double sum, double square) {
            const double first = as_pivot(pivot);
            if (local) {
                local[c] = first;
                local[g.C + c] = sum;
                local[2 * g.C + c] = square;
            }
            write_sums(vector, c, g.C, n, first, sum, square);
        });
    if (is_last && part.index == 0 && threadIdx.x == 0) {
        vector[4 * g.C] = n;
        write_trailer(vector + 4 * g.C + 1, fault, low, low_square, high, high_square);
    }
}

// The second vector of float64 data: [Σ(x - mean)² (C) | trailer (5)] about the mean over all ranks.
//
// local     [3, C] from `statistics`
// vector    [4 * C + 6] of all ranks
// squares   [C + 5]
// mailbox   [5] or null: the host's, for the trailer of the vector
// Launch: one thread per channel.
__global__ void __launch_bounds__(THREADS)
    centered_squares(const double* __restrict__ local, const double* __restrict__ vector, double n, long long C,
               double* __restrict__ squares, TRAILER, double* mailbox)
{
    const long long c = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (c < C)
        squares[c] = centered_square(moments_of(sums_of(vector, c, C)).mean, n, local[c], local[C + c], local[2 * C + c]);
    if (c == 0) {
        write_trailer(squares + C, fault, low, low_square, high, high_square);
        tell_host(mailbox, vector + 4 * C + 1);
    }
}
