// The passes over tensors of the type CORE_ELEMENT, for the instruction set that this file is compiled for, CORE_LEVEL.
//
//   statistics         x               -> per channel shift, Σ(x - shift), Σ(x - shift)²
//   normalize          x, residual     -> y = activation((x - shift) * scale + offset + residual), mask
//   reduce_gradients   dy, x, mask     -> per channel Σ g, Σ g (x - shift); dresidual = g
//   input_gradient     dy, x, mask     -> dx = (g + ((x - shift) * factor + constant)) * scale
//
// g is dy behind the activation, whose sign is computed again from x, to the same bits; with a residual the mask tells.
// Behind a normalization in place, x is its output: see formulas.h.
#include <cmath>
#include <type_traits>
#include "walk.hpp"

namespace core {
namespace {

using T = CORE_ELEMENT;
using A = Element<T>::A;
using V = Element<T>::V;

// How a pass knows which elements the activation blocked.
enum Gate { FROM_X, FROM_MASK };

template <bool BY_COLUMNS> struct Job {
    using A = core::A;
    using V = core::V;
    static constexpr i64 W = Element<T>::W, TILE = OfColumns<A>::TILE;
    using Constants = std::conditional_t<BY_COLUMNS, OfColumns<A>, OfChannel<A>>;

    const Task& task;
    const T* const x;
    const V slope;
    Output<T> output;
    Constants shift;

    Job(const Task& task, const Walk& walk)
        : task(task), x(static_cast<const T*>(task.x)), slope(all_lanes<V>(static_cast<A>(task.slope))),
          output(task.out, task.streams && (!BY_COLUMNS || walk.width <= TILE))  // in one piece
    {
    }
    // Set constants for the rows of a channel, or for some columns.
    INLINE void set(Constants& to, const double* from, i64 c) const { to.set(from[c]); }
    INLINE void set(Constants& to, const double* from, i64 first, i64 n) const { to.set(from, task.shape, first, n); }
};

// Run a job by the walk that suits the shape.
template <template <bool> class Of> void sweep(const Task& task)
{
    const Walk walk(task.shape);
    if (walk.by_columns) {
        Of<true> job(task, walk);
        sweep_columns(job, walk, sizeof(T));
    } else {
        Of<false> job(task, walk);
        sweep_rows(job, task.shape, walk, sizeof(T));
    }
}

template <template <bool> class Of> void sum(const Task& task)
{
    const Walk walk(task.shape);
    if (walk.by_columns) {
        Of<true> job(task, walk);
        sum_columns(job, task.shape, walk, task.sum, task.product);
    } else {
        Of<false> job(task, walk);
        sum_rows(job, task.shape, walk, task.sum, task.product);
    }
}

// --- Statistics -------------------------------------------------------------------------------------------------------------

template <bool BY_COLUMNS> struct Statistics : Job<BY_COLUMNS> {
    using Job<BY_COLUMNS>::Job;
    template <class... Where> INLINE void constants(Where... where) { this->set(this->shift, this->task.shift, where...); }
    INLINE void open(i64, i64) {}
    template <class Which> INLINE void pair(i64 at, i64 i, i64, i64, V& a, V& b, Which which)
    {
        a = b = counted(load(this->x + at + i, which) - this->shift.at(i), which);
    }
};

// Write to task.shift a value near each channel's mean, or 0 where zero lies within the data: the mean of up to 8 values.
void guess_shifts(const Task& task)
{
    const auto [N, C, S] = task.shape;
    const T* x = static_cast<const T*>(task.x);
    const auto add = [](double& sum, double& square, T element) {
        const double value = value_of(element);
        sum += value;
        square += value * value;
    };
    double *sum = task.shift, *square = task.product;
    i64 taken = 0;
    if (S == 1) {  // row by row, as they lie
        for (i64 c = 0; c < C; ++c) sum[c] = square[c] = 0;
        for (; taken < std::min<i64>(N, 8); ++taken) {
            const T* row = x + taken * N / std::min<i64>(N, 8) * C;
            for (i64 c = 0; c < C; ++c) add(sum[c], square[c], row[c]);
        }
    } else {  // two cache lines of a channel
        const i64 of_line = std::min<i64>(S / 2, 4);
        taken = 2 * of_line;
        for (i64 c = 0; c < C; ++c) {
            const T *first = x + c * S, *last = x + ((N - 1) * C + c) * S + S / 2;
            double of_channel = 0, squares = 0;
            for (i64 s = 0; s < of_line; ++s) add(of_channel, squares, first[s]);
            for (i64 s = 0; s < of_line; ++s) add(of_channel, squares, last[s]);
            sum[c] = of_channel;
            square[c] = squares;
        }
    }
    for (i64 c = 0; c < C; ++c) {
        const double mean = sum[c] / taken;
        const bool is_outside = mean * sum[c] > 0.5 * square[c] && std::isfinite(mean);  // mean² > var
        task.shift[c] = is_outside ? static_cast<double>(static_cast<A>(mean)) : 0;
    }
}

// Sum a channel in float64 about its mean, if that is finite: squares may exceed the range of float32, and values may be so
// far from the shift that their squares are of little else.
void sum_again(const Task& task, i64 c)
{
    const auto [N, C, S] = task.shape;
    const T* x = static_cast<const T*>(task.x) + c * S;
    double sum = 0, deviations = 0, squares = 0;
    for (i64 n = 0; n < N; ++n)
        for (i64 s = 0; s < S; ++s) sum += value_of(x[n * C * S + s]);
    const double mean = sum / static_cast<double>(N * S);
    if (!std::isfinite(mean)) return;
    for (i64 n = 0; n < N; ++n)
        for (i64 s = 0; s < S; ++s) {
            const double deviation = value_of(x[n * C * S + s]) - mean;
            deviations += deviation;
            squares += deviation * deviation;
        }
    task.shift[c] = mean;
    task.sum[c] = deviations;
    task.product[c] = squares;
}

void statistics(const Task& task)
{
    guess_shifts(task);
    sum<Statistics>(task);
    const double n = static_cast<double>(task.shape.N * task.shape.S);
    for (i64 c = 0; c < task.shape.C; ++c) {
        const double sum = task.sum[c], square = task.product[c];
        const bool is_far = sum * sum > 0.9 * n * square;  // the mean is 3 standard deviations from the shift
        if (is_far || !std::isfinite(square)) sum_again(task, c);
    }
}

// --- Normalize --------------------------------------------------------------------------------------------------------------

template <bool BY_COLUMNS, bool RESIDUAL, Activation ACTIVATION> struct Normalize : Job<BY_COLUMNS> {
    using Job<BY_COLUMNS>::Job;
    typename Job<BY_COLUMNS>::Constants scale, offset;

    template <class... Where> INLINE void constants(Where... where)
    {
        this->set(this->shift, this->task.mean, where...);
        this->set(scale, this->task.scale, where...);
        this->set(offset, this->task.offset, where...);
    }
    template <int R> void lines(i64 at, i64 mask, i64 n, i64 stride, i64 mask_stride)
    {
        const T *from = this->x + at, *residual = static_cast<const T*>(this->task.residual) + (RESIDUAL ? at : 0);
        T* to = this->output.room(at, R * n);
        uint8_t* bits = this->task.mask + (RESIDUAL && ACTIVATION != IDENTITY ? mask : 0);
        if (R > 1 || n >= W) return vectors<R>(from, residual, to, bits, n, stride, mask_stride);
        T x[W] = {}, added[W] = {}, y[W];
        std::memcpy(x, from, n * sizeof(T));
        if (RESIDUAL) std::memcpy(added, residual, n * sizeof(T));
        vectors<1>(x, added, y, bits, W, 0, 0);
        std::memcpy(to, y, n * sizeof(T));
    }

private:
    static constexpr i64 W = Job<BY_COLUMNS>::W;

    template <int R>
    void vectors(const T* from, const T* residual, T* to, uint8_t* bits, i64 n, i64 stride, i64 mask_stride) const
    {
        V last[R] = {};  // y may be x
        for (int k = 0; k < R && n % W; ++k) last[k] = load(from + k * stride + n - W, All{});
        each_vector<W>(n, [&](i64 i, auto which) __attribute__((always_inline)) {
            const V shift = this->shift.at(i), scale = this->scale.at(i), offset = this->offset.at(i);
#pragma GCC unroll 4
            for (int k = 0; k < R; ++k) {
                const V x = std::is_same_v<decltype(which), All> ? load(from + k * stride + i, which) : last[k];
                V value = affine(x, shift, scale, offset);
                if constexpr (RESIDUAL) value += load(residual + k * stride + i, which);
                if constexpr (ACTIVATION != IDENTITY) {
                    const auto blocked = is_blocked<ACTIVATION>(value);
                    if constexpr (RESIDUAL) write_bits<W>(bits + k * mask_stride, i, signs((V)blocked), which);
                    value = let_through<ACTIVATION>(value, blocked, this->slope);
                }
                store(to + k * stride + i, value, which);
            }
        });
    }
};

// --- Gradients --------------------------------------------------------------------------------------------------------------

// The gradient behind the activation.
template <bool BY_COLUMNS, Activation ACTIVATION, Gate GATE> struct Gradient : Job<BY_COLUMNS> {
    using Base = Gradient;
    using Job<BY_COLUMNS>::Job;
    typename Job<BY_COLUMNS>::Constants scale, offset;
    V inverse_slope = all_lanes<V>(1 / static_cast<A>(this->task.slope));  // is used where the slope is not 0

    template <class... Where> INLINE void constants(Where... where)
    {
        this->set(this->shift, this->task.mean, where...);
        this->set(scale, this->task.scale, where...);
        if constexpr (ACTIVATION != IDENTITY && ACTIVATION != INVERTED_LEAKY_RELU && GATE == FROM_X)
            this->set(offset, this->task.offset, where...);
    }
    // What was normalized, or its z.
    template <class Which> INLINE V input(const T* from, Which which) const
    {
        const V value = load(from, which);
        if constexpr (ACTIVATION == INVERTED_LEAKY_RELU) return before_leaky_relu(value, inverse_slope);
        return value;
    }
    INLINE V behind(V g, V value, i64 i, const uint8_t* mask) const
    {
        if constexpr (ACTIVATION == INVERTED_LEAKY_RELU)
            return let_through<ACTIVATION>(g, is_blocked<ACTIVATION>(value), this->slope);
        else if constexpr (ACTIVATION != IDENTITY && GATE == FROM_X)
            return let_through<ACTIVATION>(
                g, is_blocked<ACTIVATION>(affine(value, this->shift.at(i), scale.at(i), offset.at(i))), this->slope);
        else if constexpr (ACTIVATION != IDENTITY)
            return let_through<ACTIVATION>(g, lanes_of_bits(mask, i, V{}), this->slope);
        return g;
    }
};

template <bool BY_COLUMNS, Activation ACTIVATION, bool DRESIDUAL>
struct Reduce : Gradient<BY_COLUMNS, ACTIVATION, DRESIDUAL ? FROM_MASK : FROM_X> {
    using Reduce::Base::Base;
    T* dresidual = nullptr;

    INLINE void open(i64 at, i64 n)
    {
        if constexpr (DRESIDUAL) dresidual = this->output.room(at, n);
    }
    template <class Which> INLINE void pair(i64 at, i64 i, i64 mask, i64 line, V& a, V& b, Which which)
    {
        const V value = this->input(this->x + at + i, which);
        const V g = this->behind(load(static_cast<const T*>(this->task.dy) + at + i, which), value, i, this->task.mask + mask);
        if constexpr (DRESIDUAL) store(dresidual + line + i, g, which);
        a = counted(g, which);
        b = counted(value - this->shift.at(i), which);
    }
};

template <bool BY_COLUMNS, Activation ACTIVATION, Gate GATE, bool SUMS>
struct InputGradient : Gradient<BY_COLUMNS, ACTIVATION, GATE> {
    using InputGradient::Base::Base;
    typename Job<BY_COLUMNS>::Constants factor, constant;

    template <class... Where> INLINE void constants(Where... where)
    {
        InputGradient::Base::constants(where...);
        if constexpr (SUMS) {
            this->set(factor, this->task.factor, where...);
            this->set(constant, this->task.constant, where...);
        }
    }
    template <int R> void lines(i64 at, i64 mask, i64 n, i64 stride, i64 mask_stride)
    {
        const T *from = this->x + at, *dy = static_cast<const T*>(this->task.dy) + at;
        T* to = this->output.room(at, R * n);
        const uint8_t* bits = this->task.mask + mask;
        if (R > 1 || n >= W) return vectors<R>(from, dy, to, bits, n, stride, mask_stride);
        T x[W] = {}, g[W] = {}, dx[W];
        std::memcpy(x, from, n * sizeof(T));
        std::memcpy(g, dy, n * sizeof(T));
        vectors<1>(x, g, dx, bits, W, 0, 0);
        std::memcpy(to, dx, n * sizeof(T));
    }

private:
    static constexpr i64 W = Job<BY_COLUMNS>::W;

    template <int R>
    void vectors(const T* from, const T* dy, T* to, const uint8_t* bits, i64 n, i64 stride, i64 mask_stride) const
    {
        V last[R] = {};  // dx may be dy
        for (int k = 0; k < R && n % W; ++k) last[k] = load(dy + k * stride + n - W, All{});
        each_vector<W>(n, [&](i64 i, auto which) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int k = 0; k < R; ++k) {
                V g = std::is_same_v<decltype(which), All> ? load(dy + k * stride + i, which) : last[k], value{};
                if constexpr (SUMS || (ACTIVATION != IDENTITY && GATE == FROM_X)) value = this->input(from + k * stride + i, which);
                g = this->behind(g, value, i, bits + k * mask_stride);
                if constexpr (SUMS)
                    g = input_gradient_of(g, value, this->shift.at(i), factor.at(i), constant.at(i), this->scale.at(i));
                else
                    g *= this->scale.at(i);
                store(to + k * stride + i, g, which);
            }
        });
    }
};

// --- Which instance -----------------------------------------------------------------------------------------------------------

template <bool RESIDUAL, Activation ACTIVATION> struct Normalizes {
    template <bool BY_COLUMNS> using Of = Normalize<BY_COLUMNS, RESIDUAL, ACTIVATION>;
};
template <Activation ACTIVATION, bool DRESIDUAL> struct Reduces {
    template <bool BY_COLUMNS> using Of = Reduce<BY_COLUMNS, ACTIVATION, DRESIDUAL>;
};
template <Activation ACTIVATION, Gate GATE, bool SUMS> struct InputGradients {
    template <bool BY_COLUMNS> using Of = InputGradient<BY_COLUMNS, ACTIVATION, GATE, SUMS>;
};

template <Activation ACTIVATION> void normalize_by(const Task& task)
{
    if (task.residual)
        sweep<Normalizes<true, ACTIVATION>::template Of>(task);
    else
        sweep<Normalizes<false, ACTIVATION>::template Of>(task);
}

// Sum the gradients of a channel in float64: products may exceed the range of float32.
template <Activation ACTIVATION> void sum_gradients_again(const Task& task, i64 c)
{
    const auto [N, C, S] = task.shape;
    const Walk walk(task.shape);
    const T *x = static_cast<const T*>(task.x), *dy = static_cast<const T*>(task.dy);
    const A shift = static_cast<A>(task.mean[c]), scale = static_cast<A>(task.scale[c]);
    const A offset = static_cast<A>(task.offset[c]), slope = static_cast<A>(task.slope);
    double sum = 0, product = 0;
    for (i64 n = 0; n < N; ++n)
        for (i64 s = 0; s < S; ++s) {
            const i64 i = (n * C + c) * S + s, column = i % walk.width;
            A value = value_of(x[i]), g = value_of(dy[i]);
            if constexpr (ACTIVATION == INVERTED_LEAKY_RELU) {
                value = before_leaky_relu(value, 1 / slope);
                g = let_through<ACTIVATION>(g, is_blocked<ACTIVATION>(value), slope);
            } else if constexpr (ACTIVATION != IDENTITY) {
                const bool blocked = task.mask ? task.mask[i / walk.width * walk.mask_width + column / 8] >> column % 8 & 1
                                               : is_blocked<ACTIVATION>(affine(value, shift, scale, offset));
                g = let_through<ACTIVATION>(g, blocked, slope);
            }
            sum += g;
            product += static_cast<double>(g) * static_cast<double>(value - shift);
        }
    task.sum[c] = sum;
    task.product[c] = product;
}

template <Activation ACTIVATION> void reduce_by(const Task& task)
{
    if (ACTIVATION != INVERTED_LEAKY_RELU && task.out)  // that has no residual
        sum<Reduces<ACTIVATION, ACTIVATION != INVERTED_LEAKY_RELU>::template Of>(task);
    else
        sum<Reduces<ACTIVATION, false>::template Of>(task);
    if constexpr (sizeof(A) == 4)
        for (i64 c = 0; c < task.shape.C; ++c)
            if (!std::isfinite(task.sum[c]) || !std::isfinite(task.product[c])) sum_gradients_again<ACTIVATION>(task, c);
}

template <Activation ACTIVATION, Gate GATE> void input_gradient_by(const Task& task)
{
    if (task.factor)
        sweep<InputGradients<ACTIVATION, GATE, true>::template Of>(task);
    else
        sweep<InputGradients<ACTIVATION, GATE, false>::template Of>(task);
}

void normalize(const Task& task)
{
    switch (task.activation) {
    case IDENTITY: return normalize_by<IDENTITY>(task);
    case RELU: return normalize_by<RELU>(task);
    default: return normalize_by<LEAKY_RELU>(task);
    }
}

void reduce_gradients(const Task& task)
{
    switch (task.activation) {
    case IDENTITY: return reduce_by<IDENTITY>(task);
    case RELU: return reduce_by<RELU>(task);
    case LEAKY_RELU: return reduce_by<LEAKY_RELU>(task);
    case INVERTED_LEAKY_RELU: return reduce_by<INVERTED_LEAKY_RELU>(task);
    }
}

void input_gradient(const Task& task)
{
    switch (task.activation) {
    case IDENTITY: return input_gradient_by<IDENTITY, FROM_X>(task);
    case RELU: return input_gradient_by<RELU, FROM_X>(task);  // with a residual, dresidual is behind it
    case LEAKY_RELU: return task.mask ? input_gradient_by<LEAKY_RELU, FROM_MASK>(task) : input_gradient_by<LEAKY_RELU, FROM_X>(task);
    case INVERTED_LEAKY_RELU: return input_gradient_by<INVERTED_LEAKY_RELU, FROM_X>(task);
    }
}

}  // namespace

#define JOIN_(level, element) passes_##level##_##element
#define JOIN(level, element) JOIN_(level, element)
extern const Passes JOIN(CORE_LEVEL, CORE_ELEMENT);
const Passes JOIN(CORE_LEVEL, CORE_ELEMENT) = {statistics, normalize, reduce_gradients, input_gradient};

}  // namespace core
