// How a tensor (N, C, S) is walked: row by row, or as a matrix whose columns keep to their channels.
//
//   rows      A row is the S adjacent elements of a channel in a sample; its constants stay in registers. For large maps.
//   columns   A row is a sample, or some: its constants are written out to arrays, for a tile of columns at a time, and used
//             for all rows. For channels-last data, dense layers, and small maps such as 7 x 7.
//
// The module needs only `Walk`, for the size of the mask; the passes need the rest.
#pragma once
#include <algorithm>
#include <memory>
#include <new>
#include "lanes.hpp"

namespace core {

constexpr i64 SMALL_MAP = 32;  // elements: shorter rows go by columns
constexpr i64 MIDDLE_MAP = 64; // and these, such as 7 x 7,
constexpr i64 MANY = 16;       // in so many samples: the constants that are written out serve them all
constexpr i64 NARROW = 512;    // columns: fewer are joined with those of the next samples, to whole vectors
constexpr i64 WIDE = 256;      // and narrow ones to that many
constexpr i64 TILE_BYTES = 4096;  // of a row of constants: five of them and the data stay in a cache of 32 KiB
constexpr i64 PIECE_BYTES = 256 << 10;  // what a second cache still holds of the pass before
constexpr i64 CHUNK = 512;     // elements of a row at a time, whose sums stay in the accumulator's type: 16 a lane, which
                               // are 16 * 2^-24 = 1e-6 off at most
constexpr i64 GROUP = 16;      // rows whose columns are added up in the accumulator's type: as many

struct Shape {
    i64 N, C, S;
    i64 size() const { return N * C * S; }
};

struct Walk {
    bool by_columns;
    i64 width;          // elements of a row
    i64 rows, rest;     // whole rows, and the elements of a last one that is not whole
    i64 mask_width;     // bytes of a row in a mask

    explicit Walk(Shape shape)
    {
        by_columns = shape.S < (shape.N < MANY ? SMALL_MAP : MIDDLE_MAP);
        width = shape.S;
        if (by_columns) {
            width = shape.C * shape.S;
            if (width && width < NARROW) {
                i64 unit = 1;  // samples that are whole vectors together
                while (width * unit % 8) unit *= 2;
                const i64 wanted = width < WIDE / 4 ? WIDE / width / unit * unit : unit;
                width *= std::max<i64>(1, std::min(std::max(wanted, unit), shape.N));
            }
        }
        rows = width ? shape.size() / width : 0;
        rest = width ? shape.size() % width : 0;
        mask_width = (width + 7) / 8;
    }
    // Rows are divided into pieces of at most `most` elements, a multiple of 8, that begin with bytes of a mask. The last one
    // is not shorter than a vector.
    i64 piece_before(i64 end, i64 most) const  // where it begins
    {
        const i64 start = (end - 1) / most * most;
        return start > 0 && end - start < 8 ? start - 8 : start;
    }
    i64 piece_behind(i64 start, i64 most) const  // where it ends
    {
        const i64 end = std::min(width, start + most);
        return end < width && width - end < 8 ? end - 8 : end;
    }
    // Whether to work on some rows at once, which spares loads of constants. Where each row has several lines, that makes
    // caches fetch too little ahead.
    bool rows_together(i64 itemsize) const { return width * itemsize <= 512; }
    i64 mask_bytes() const { return (rows + (rest > 0)) * mask_width; }
};

// What the module asks of a pass.
struct Task {
    Shape shape;
    const void *x, *dy, *residual;  // of the tensor's type, contiguous; null where a pass does not need them
    void* out;                      // y, dresidual or dx
    uint8_t* mask;                  // which elements the activation blocked; null: computed again from x
    const double *mean, *scale, *offset;   // (C,), the latter two rounded to the accumulator's type
    const double *factor, *constant;       // (C,); null: dx = g * scale
    double *shift, *sum, *product;         // (C,): results, but of the gradients' sums the shift is the rounded mean
    double slope;
    Activation activation;
    bool streams;  // whether `out` is so large that it need not go through the caches
};

// The passes for a type of data and an instruction set.
struct Passes {
    void (*statistics)(const Task&);       // shift, Σ(x - shift), Σ(x - shift)²
    void (*normalize)(const Task&);        // y, mask
    void (*reduce_gradients)(const Task&); // Σ g, Σ g (x - shift), dresidual
    void (*input_gradient)(const Task&);   // dx
};

// Where a pass writes a tensor: to its memory, or to a buffer that is copied there past the caches. That saves reading what
// is overwritten, but only by whole cache lines: lines of which halves are stored both ways take several times as long.
template <class T> class Output {
public:
    Output(void* to, bool streams) : to_(static_cast<T*>(to)), streams_(streams && STREAMS) {}
    bool is(const void* array) const { return to_ == array; }
    ~Output()
    {
        copy(used_);
#if defined(__SSE2__)
        if (streams_) _mm_sfence();
#endif
    }
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;

    // Return where to write the n elements from `at` on, at most CAPACITY.
    INLINE T* room(i64 at, i64 n)
    {
        if (!streams_) return to_ + at;
        if (at != start_ + used_ || used_ + n > CAPACITY) copy_lines(at);
        T* result = buffer_ + used_;
        used_ += n;
        return result;
    }

private:
#if defined(__SSE2__)
    static constexpr bool STREAMS = true;
#else
    static constexpr bool STREAMS = false;
#endif
    static constexpr i64 LINE = 64;
    static constexpr i64 CAPACITY = 16384 / static_cast<i64>(sizeof(typename Element<T>::A)) + LINE;

    // Make room for what begins at `next`: whole lines go to memory, and the rest stays if it is to be continued.
    __attribute__((noinline)) void copy_lines(i64 next)
    {
        const bool continues = next == start_ + used_;
        const i64 past = static_cast<i64>(reinterpret_cast<uintptr_t>(to_ + next) % LINE / sizeof(T));
        const i64 kept = continues ? std::min(past, used_) : 0, copied = used_ - kept;
        copy(copied);
        std::memmove(buffer_, buffer_ + copied, kept * sizeof(T));
        start_ = continues ? start_ + copied : next;
        used_ = kept;
    }

    void copy(i64 count)
    {
#if defined(__SSE2__)
        char *to = reinterpret_cast<char*>(to_ + start_), *end = to + count * sizeof(T);
        const char* from = reinterpret_cast<const char*>(buffer_);
        if (!count) return;
        const i64 head = std::min<i64>(-reinterpret_cast<uintptr_t>(to) % LINE, end - to);
        std::memcpy(to, from, head);
        for (to += head, from += head; to + LINE <= end; to += LINE, from += LINE)
            for (int part = 0; part < LINE; part += 16)
                _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
        std::memcpy(to, from, end - to);
#endif
    }

    T* to_;
    bool streams_;
    i64 start_ = 0, used_ = 0;  // elements in the buffer, and where the first of them goes
    alignas(LINE) T buffer_[CAPACITY];
};

// A constant of a row's channel, or those of a row's columns.
template <class A> struct OfChannel {
    typename Lanes<A>::V value;
    INLINE void set(double constant) { value = all_lanes<typename Lanes<A>::V>(static_cast<A>(constant)); }
    INLINE auto at(i64) const { return value; }
};
template <class A> struct OfColumns {
    static constexpr i64 TILE = TILE_BYTES / sizeof(A);
    alignas(64) A values[TILE];
    INLINE auto at(i64 i) const { return Lanes<A>::load(values + i); }
    // Write out the constants of the n columns from the first on.
    void set(const double* constants, Shape shape, i64 first, i64 n)
    {
        i64 c = first / shape.S % shape.C, left = shape.S - first % shape.S;
        if (shape.S == 1)
            for (i64 i = 0; i < n; c = 0)
                for (; c < shape.C && i < n; ++c, ++i) values[i] = static_cast<A>(constants[c]);
        else
            for (i64 i = 0; i < n; left = shape.S, c = c + 1 < shape.C ? c + 1 : 0) {
                const A constant = static_cast<A>(constants[c]);
                for (const i64 end = std::min(n, i + left); i < end; ++i) values[i] = constant;
            }
    }
};

// --- Passes that work element by element ------------------------------------------------------------------------------------
//
// They begin at the end, in pieces: the last ones are what a cache still holds of the pass before. Within a piece they go
// forwards, as processors fetch ahead. A job has, for OfChannel and OfColumns,
//   constants(c), or constants(first, n)   set the constants of a channel's rows, or of n columns
//   lines<R>(at, mask, n, stride, mask_stride)   work on n elements in R rows; those of the first begin at `at`

template <class Job> void sweep_rows(Job& job, Shape shape, const Walk& walk, i64 itemsize)
{
    const i64 rows = shape.N * shape.C, piece = std::max<i64>(1, PIECE_BYTES / (shape.S * itemsize));
    for (i64 stop = rows; stop > 0; stop -= piece) {
        const i64 start = std::max<i64>(0, stop - piece);
        i64 c = start % shape.C;
        for (i64 row = start; row < stop; ++row, c = c + 1 < shape.C ? c + 1 : 0) {
            job.constants(c);
            for (i64 i = 0, end; i < shape.S; i = end) {
                end = walk.piece_behind(i, CHUNK);
                job.template lines<1>(row * shape.S + i, row * walk.mask_width + i / 8, end - i, 0, 0);
            }
        }
    }
}

template <class Job> void sweep_columns(Job& job, const Walk& walk, i64 itemsize)
{
    constexpr int R = 4;  // rows that use a vector of constants while it is in a register
    const bool one_by_one = !walk.rows_together(itemsize);
    for (i64 end = walk.width, tile; end > 0; end = tile) {
        tile = walk.piece_before(end, Job::TILE);
        const i64 n = end - tile, piece = std::max<i64>(R, PIECE_BYTES / (n * itemsize) / R * R);
        job.constants(tile, n);
        if (tile < walk.rest)
            job.template lines<1>(walk.rows * walk.width + tile, walk.rows * walk.mask_width + tile / 8,
                                  std::min(n, walk.rest - tile), 0, 0);
        for (i64 stop = walk.rows; stop > 0; stop -= piece) {
            i64 row = std::max<i64>(0, stop - piece);
            for (; row + R <= stop && !one_by_one; row += R)
                job.template lines<R>(row * walk.width + tile, row * walk.mask_width + tile / 8, n, walk.width,
                                      walk.mask_width);
            for (; row < stop; ++row)
                job.template lines<1>(row * walk.width + tile, row * walk.mask_width + tile / 8, n, 0, 0);
        }
    }
}

// --- Sums of a and of a * b, per channel -------------------------------------------------------------------------------------
//
// Those of a piece of a row, or of a column in some rows, are in the accumulator's type, all beyond in float64. A job also has
//   open(at, n)                          say that results for the n elements from `at` on come next
//   pair(at, i, mask, line, a, b, which)   set a and b, vectors at element i of what begins at `at`

template <class Job> void sum_rows(Job& job, Shape shape, const Walk& walk, double* sum, double* product)
{
    using V = typename Job::V;
    constexpr i64 W = Job::W;
    for (i64 c = 0; c < shape.C; ++c) sum[c] = product[c] = 0;
    for (i64 row = 0, c = 0; row < shape.N * shape.C; ++row, c = c + 1 < shape.C ? c + 1 : 0) {
        job.constants(c);
        Doubles sums{}, products{};
        for (i64 first = 0, end; first < shape.S; first = end) {
            end = walk.piece_behind(first, CHUNK);
            const i64 at = row * shape.S + first, mask = row * walk.mask_width + first / 8, n = end - first;
            job.open(at, n);
            V s[4]{}, p[4]{}, a, b;
            i64 i = 0;
            for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    job.pair(at, i + k * W, mask, 0, a, b, All{});
                    s[k] += a;
                    p[k] += a * b;
                }
            for (; i < n; i += W) {
                const i64 from = std::min(i, n - W);
                job.pair(at, from, mask, 0, a, b, From{i - from});
                s[0] += a;
                p[0] += a * b;
            }
            add_to(sums, (s[0] + s[1]) + (s[2] + s[3]));
            add_to(products, (p[0] + p[1]) + (p[2] + p[3]));
        }
        sum[c] += total(sums);
        product[c] += total(products);
    }
}

// The sums of the columns of a tile.
template <class A> struct ColumnSums {
    static constexpr i64 TILE = OfColumns<A>::TILE, W = Lanes<A>::W;
    alignas(64) A sum[TILE], product[TILE];

    void clear(i64 n)
    {
        const i64 padded = (n + W - 1) / W * W;
        std::memset(sum, 0, padded * sizeof(A));
        std::memset(product, 0, padded * sizeof(A));
    }
    INLINE void add(i64 i, typename Lanes<A>::V a, typename Lanes<A>::V b)
    {
        Lanes<A>::store(sum + i, Lanes<A>::load(sum + i) + a);
        Lanes<A>::store(product + i, Lanes<A>::load(product + i) + b);
    }
    // Add those of the n columns from the first on to their channels'.
    void add_to_channels(Shape shape, i64 first, i64 n, double* sums, double* products) const
    {
        i64 c = first / shape.S % shape.C, left = shape.S - first % shape.S;
        if (shape.S == 1) {
            for (i64 i = 0; i < n; c = 0)
                for (; c < shape.C && i < n; ++c, ++i) {
                    sums[c] += sum[i];
                    products[c] += product[i];
                }
            return;
        }
        for (i64 i = 0; i < n; left = shape.S, c = c + 1 < shape.C ? c + 1 : 0) {
            const i64 end = std::min(n, i + left);
            double s[2] = {}, p[2] = {};
            for (; i + 2 <= end; i += 2)
                for (int k = 0; k < 2; ++k) {
                    s[k] += sum[i + k];
                    p[k] += product[i + k];
                }
            if (i < end) {
                s[0] += sum[i];
                p[0] += product[i++];
            }
            sums[c] += s[0] + s[1];
            products[c] += p[0] + p[1];
        }
    }
};

template <class Job> void sum_columns(Job& job, Shape shape, const Walk& walk, double* sum, double* product)
{
    using V = typename Job::V;
    constexpr i64 W = Job::W;
    constexpr int R = 4;
    ColumnSums<typename Job::A> sums;
    const bool together = walk.rows_together(sizeof(*job.x));
    for (i64 c = 0; c < shape.C; ++c) sum[c] = product[c] = 0;
    for (i64 tile = 0, end; tile < walk.width; tile = end) {
        end = walk.piece_behind(tile, Job::TILE);
        const i64 n = end - tile, rows = walk.rows + (tile < walk.rest);
        job.constants(tile, n);
        for (i64 row = 0; row < rows;) {
            const i64 stop = std::min(rows, row + GROUP);
            sums.clear(n);
            for (; together && row + R <= std::min(stop, walk.rows); row += R) {
                const i64 at = row * walk.width + tile, mask = row * walk.mask_width + tile / 8;
                job.open(at, R * n);
                each_vector<W>(n, [&](i64 i, auto which) __attribute__((always_inline)) {
                    V a[R], b[R];
#pragma GCC unroll 4
                    for (int k = 0; k < R; ++k)
                        job.pair(at + k * walk.width, i, mask + k * walk.mask_width, k * walk.width, a[k], b[k], which);
                    sums.add(i, (a[0] + a[1]) + (a[2] + a[3]), (a[0] * b[0] + a[1] * b[1]) + (a[2] * b[2] + a[3] * b[3]));
                });
            }
            for (; row < std::min(stop, walk.rows) && n >= W; ++row) {
                const i64 at = row * walk.width + tile, mask = row * walk.mask_width + tile / 8;
                job.open(at, n);
                each_vector<W>(n, [&](i64 i, auto which) __attribute__((always_inline)) {
                    V a, b;
                    job.pair(at, i, mask, 0, a, b, which);
                    sums.add(i, a, a * b);
                });
            }
            for (; row < stop; ++row) {
                const i64 at = row * walk.width + tile, mask = row * walk.mask_width + tile / 8;
                const i64 there = row < walk.rows ? n : std::min(n, walk.rest - tile);
                job.open(at, there);
                V a, b;
                for (i64 i = 0; there >= W && i < there; i += W) {
                    const i64 from = std::min(i, there - W);
                    job.pair(at, from, mask, 0, a, b, From{i - from});
                    sums.add(from, a, a * b);
                }
                if (there < W) {
                    job.pair(at, 0, mask, 0, a, b, First{there});
                    sums.add(0, a, a * b);
                }
            }
            sums.add_to_channels(shape, tile, n, sum, product);
        }
    }
}

}  // namespace core
