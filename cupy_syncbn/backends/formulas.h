// The formulas that the CUDA kernels and the CPU core have in common: NVRTC and C++ compilers take them from here.
//
// V is a number, or a vector of numbers that the CPU core computes at once. Each product and sum is rounded by itself,
// so that all instruction sets give the same bits, and the kernels on the tests' emulator give them too. A GPU contracts
// products and sums where that changes no promise.
#pragma once

#ifdef FORMULA  // common.cuh defines it: functions of a GPU
// Not to be contracted: see round_to_12_bits.
FORMULA double exact_product(double a, double b) { return __dmul_rn(a, b); }
FORMULA double exact_difference(double a, double b) { return __dsub_rn(a, b); }
#else  // a C++ compiler is told to contract nothing
#include <math.h>
#define FORMULA inline __attribute__((always_inline))
FORMULA double exact_product(double a, double b) { return a * b; }
FORMULA double exact_difference(double a, double b) { return a - b; }
#endif

// Have these values loaded here, all under way at once. A GPU's compiler would load each where it is used, and wait there.
#ifdef __CUDA_ARCH__
FORMULA void have_one(double& value) { asm volatile("" : "+d"(value)); }
FORMULA void have_one(float& value) { asm volatile("" : "+f"(value)); }
#else
template <typename Value> FORMULA void have_one(Value&) {}
#endif
template <typename... Values> FORMULA void have(Values&... values) { (have_one(values), ...); }

// --- The vector of the forward; see backends/vector.py ------------------------------------------------------------------

// Round to 12 significant bits, by Veltkamp's splitting (Dekker 1971). Contracted to fused multiply-adds, which have no
// rounding in between, it would give back the value as it is.
FORMULA double round_to_12_bits(double value)
{
    const double scaled = exact_product(value, 2199023255553.0);  // 2^41 + 1
    return exact_difference(scaled, exact_difference(scaled, value));
}

// Write the part of the vector that belongs to a channel, from the sums of its n values about `shift`.
//
// vector    [4 * C + 1]: n pivot (C), n pivot² (C), Σ(x - pivot) (C), Σ(x - pivot)² + 2 pivot Σ(x - pivot) (C), n
FORMULA void write_sums(double* vector, long long c, long long C, double n, double shift, double sum, double square)
{
    const double pivot = round_to_12_bits(shift), rest = shift - pivot;
    square += rest * (2 * sum + n * rest);
    sum += n * rest;
    vector[c] = n * pivot;
    vector[C + c] = n * pivot * pivot;
    vector[2 * C + c] = sum;
    vector[3 * C + c] = square + 2 * pivot * sum;
}

// What the vector has of a channel.
struct ChannelSums {
    double n_pivot, n_pivot_square, sum, square, count;
};

FORMULA ChannelSums sums_of(const double* vector, long long c, long long C)
{
    ChannelSums sums = {vector[c], vector[C + c], vector[2 * C + c], vector[3 * C + c], vector[4 * C]};
    have(sums.n_pivot, sums.n_pivot_square, sums.sum, sums.square, sums.count);
    return sums;
}

struct ChannelMoments {
    double mean, m2, count;  // m2 = Σ(x - mean)²
};

// Return the moments of a channel from the sum of the ranks' vectors.
FORMULA ChannelMoments moments_of(const ChannelSums& of)
{
    const double n = fmax(of.count, 1.0);
    const double pivot = round_to_12_bits(of.n_pivot / n);
    const double rest = of.n_pivot - n * pivot;  // exact, as are the products in the next line but one
    const double shifted = rest + of.sum;
    const double m2 = (of.n_pivot_square - pivot * of.n_pivot) - pivot * rest
        + (of.square - 2 * pivot * of.sum - shifted * shifted / n);
    return {pivot + shifted / n, m2, of.count};
}

// Return Σ(x - mean)² from a rank's sums about `shift` (Chan, Golub and LeVeque 1983): for float64 data.
FORMULA double centered_square(double mean, double n, double shift, double sum, double square)
{
    const double distance = mean - shift;
    return square - distance * (2 * sum - n * distance);
}

// --- The step at each element -------------------------------------------------------------------------------------------

FORMULA double variance_of(double m2, double count)
{
    return (m2 < 0 ? 0 : m2) / fmax(count, 1.0);  // NaN stays NaN
}

FORMULA double unbiased(double var, double count) { return var * (count / fmax(count - 1, 1.0)); }

// Return the new value of a running statistic.
FORMULA double updated(double old_value, double value, double momentum)
{
    const double keep = 1 - momentum;  // 0 * inf would keep an infinity for ever
    return keep == 0 ? value : keep * old_value + momentum * value;
}

// y = (x - shift) * scale + offset, in the accumulator's type A. The shift is the mean rounded to it.
template <typename A> struct Step {
    double invstd;
    A shift, scale, offset;
};

template <typename A> FORMULA Step<A> step_of(double mean, double var, double eps, double weight, double bias)
{
    const double invstd = 1 / sqrt(var + eps), factor = invstd * weight;
    const A shift = static_cast<A>(mean);
    return {invstd, shift, static_cast<A>(factor), static_cast<A>(bias - (mean - static_cast<double>(shift)) * factor)};
}

// One function, so that the backward finds the same bits as the forward.
template <typename V> FORMULA V affine(V x, V shift, V scale, V offset)
{
#ifdef __CUDA_ARCH__
    return fma(x - shift, scale, offset);
#else
    return (x - shift) * scale + offset;
#endif
}

// --- Activations --------------------------------------------------------------------------------------------------------

// The last is LEAKY_RELU where a backward has its output in place of its input.
enum Activation { IDENTITY, RELU, LEAKY_RELU, INVERTED_LEAKY_RELU };

// Whether the activation's slope below zero is that at `value`: as in torch, at NaN unless it is zero.
template <Activation ACTIVATION, typename V> FORMULA auto is_blocked(V value)
{
    if constexpr (ACTIVATION == RELU)
        return value <= 0;
    else
        return !(value > 0);
}

// The activation of a value, or its derivative times a gradient, which was blocked or not.
template <Activation ACTIVATION, typename V, typename Mask> FORMULA V let_through(V value, Mask blocked, V slope)
{
    if constexpr (ACTIVATION == RELU) {
        const V zero = {};  // 0 * inf would be NaN
        return blocked ? zero : value;
    } else {
        const V low = slope * value;
        return blocked ? low : value;
    }
}

// --- Normalization in place (Rota Bulò, Porzi and Kontschieder 2018) ------------------------------------------------------
//
// The backward has y alone, and z = (x - mean) invstd weight + bias from it. With z for x, bias for the mean and 1 / weight
// for invstd its formulas are the same.

// Return the weight that is used: with one closer to zero, y would tell nothing of x.
FORMULA double invertible(double weight)
{
    const double least = 1e-5;
    return fabs(weight) < least ? copysign(least, weight) : weight;
}

// Return the input of a leaky ReLU from its output.
template <typename V> FORMULA V before_leaky_relu(V y, V inverse_slope)
{
    const V one = V{} + 1;  // by a factor: a GPU makes one instruction of the product and the difference that follows
    return y * (y > 0 ? one : inverse_slope);
}

// --- Gradients (Ioffe and Szegedy 2015, with the sums taken out) ----------------------------------------------------------

// Return Σ g (x - mean) from Σ g and Σ g (x - shift).
FORMULA double about_mean(double product, double sum, double mean, double shift) { return product - sum * (mean - shift); }

// dx = (g + ((x - shift) * factor + constant)) * scale
template <typename A> struct GradientStep {
    A factor, constant;
};

template <typename A>
FORMULA GradientStep<A> gradient_step_of(double sum_dy, double sum_dy_xmu, double count, double mean, double invstd)
{
    const double distance = mean - static_cast<double>(static_cast<A>(mean));
    const double factor = invstd * invstd * sum_dy_xmu / -count;
    return {static_cast<A>(factor), static_cast<A>(sum_dy / -count - distance * factor)};
}

template <typename V> FORMULA V input_gradient_of(V g, V x, V shift, V factor, V constant, V scale)
{
    return (g + ((x - shift) * factor + constant)) * scale;
}
