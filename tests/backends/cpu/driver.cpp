// Steps by the core's passes, without Python: test_other_processors.py compiles it for another processor, with kernels.cpp.
//
// It reads cases from the standard input and writes their results to the standard output, as module.cpp computes them:
//
//   Header | x | dy | residual, if there is one | weight (C) | bias (C) | mean (C) | var (C), all four in float64
//   vector (4 C + 1) | squares (C), of float64 data | y | dresidual, if there is a residual | sums (2 C) | dx
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "walk.hpp"

namespace core {

extern const Passes passes_baseline_float16, passes_baseline_bfloat16, passes_baseline_float32, passes_baseline_float64;

namespace {

const Passes* const PASSES[] = {&passes_baseline_float16, &passes_baseline_bfloat16, &passes_baseline_float32,
                                &passes_baseline_float64};
const i64 SIZES[] = {2, 2, 4, 8};
constexpr double EPS = 1e-5;

struct Header {
    i64 type, N, C, S, has_slope, has_residual, is_training;
    double slope;
};

using Bytes = std::vector<char>;
using Values = std::vector<double>;

template <class T> void read(std::vector<T>& values)
{
    if (fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) std::exit(2);
}
template <class T> void write(const std::vector<T>& values)
{
    if (fwrite(values.data(), sizeof(T), values.size(), stdout) != values.size()) std::exit(3);
}

template <class F> void each_channel(i64 C, F f)
{
    for (i64 c = 0; c < C; ++c) f(c);
}

// A is the accumulator's type.
template <class A> void step(const Header& header)
{
    const i64 C = header.C;
    const Shape shape = {header.N, C, header.S};
    const Passes& passes = *PASSES[header.type];
    const i64 itemsize = SIZES[header.type], bytes = shape.size() * itemsize;
    const double n = static_cast<double>(header.N * header.S);
    Bytes x(bytes), dy(bytes), residual(header.has_residual ? bytes : 0), y(bytes), dresidual(residual.size()), dx(bytes);
    Values weight(C), bias(C), mean(C), var(C);
    for (Bytes* each : {&x, &dy, &residual}) read(*each);
    for (Values* each : {&weight, &bias, &mean, &var}) read(*each);
    const auto run = [&](void (*pass)(const Task&), const Task& task) {
        if (shape.size()) pass(task);
    };

    Task task{};
    task.shape = shape;
    task.x = x.data();
    task.slope = header.slope;
    task.activation = !header.has_slope ? IDENTITY : header.slope == 0 ? RELU : LEAKY_RELU;

    Values shift(C), sum(C), square(C), vector(4 * C + 1), squares(sizeof(A) == 8 ? C : 0);
    task.shift = shift.data();
    task.sum = sum.data();
    task.product = square.data();
    run(passes.statistics, task);
    each_channel(C, [&](i64 c) { write_sums(vector.data(), c, C, n, shift[c], sum[c], square[c]); });
    vector[4 * C] = n;
    write(vector);

    const double count = header.is_training ? n : 0;
    each_channel(squares.size(), [&](i64 c) {
        squares[c] = centered_square(moments_of(sums_of(vector.data(), c, C)).mean, n, shift[c], sum[c], square[c]);
    });
    write(squares);
    if (header.is_training)
        each_channel(C, [&](i64 c) {
            const ChannelMoments moments = moments_of(sums_of(vector.data(), c, C));
            mean[c] = moments.mean;
            var[c] = variance_of(sizeof(A) == 8 ? squares[c] : moments.m2, moments.count);
        });

    Values invstd(C), scale(C), offset(C);
    each_channel(C, [&](i64 c) {
        const Step<A> of_channel = step_of<A>(mean[c], var[c], EPS, weight[c], bias[c]);
        invstd[c] = of_channel.invstd;
        scale[c] = of_channel.scale;
        offset[c] = of_channel.offset;
    });
    std::vector<uint8_t> mask(header.has_residual && header.has_slope ? Walk(shape).mask_bytes() : 0);
    task.mask = mask.empty() ? nullptr : mask.data();
    task.residual = header.has_residual ? residual.data() : nullptr;
    task.mean = mean.data();
    task.scale = scale.data();
    task.offset = offset.data();
    task.out = y.data();
    task.streams = true;
    run(passes.normalize, task);
    write(y);

    Values sums(2 * C);
    task.dy = dy.data();
    task.out = header.has_residual ? dresidual.data() : nullptr;
    task.sum = sums.data();
    task.product = sums.data() + C;
    run(passes.reduce_gradients, task);
    write(dresidual);
    if (shape.size())
        each_channel(C, [&](i64 c) {
            sums[C + c] = about_mean(sums[C + c], sums[c], mean[c], static_cast<double>(static_cast<A>(mean[c])));
        });
    write(sums);

    Values factor(C), constant(C);
    each_channel(C, [&](i64 c) {
        const GradientStep<A> of_channel = gradient_step_of<A>(sums[c], sums[C + c], count, mean[c], invstd[c]);
        factor[c] = of_channel.factor;
        constant[c] = of_channel.constant;
    });
    if (header.is_training) {
        task.factor = factor.data();
        task.constant = constant.data();
    }
    if (header.has_residual && (task.activation != LEAKY_RELU || itemsize > 2)) {  // dresidual is behind the activation
        task.dy = dresidual.data();
        task.activation = IDENTITY;
    }
    task.out = dx.data();
    run(passes.input_gradient, task);
    write(dx);
}

}  // namespace
}  // namespace core

int main()
{
    core::Header header;
    while (fread(&header, sizeof header, 1, stdin) == 1)
        header.type == 3 ? core::step<double>(header) : core::step<float>(header);
    return 0;
}
