// Backward: reduce the gradients of a rank to the vector that the ranks add up, then apply it.
//
//   g = dy, or slope * dy where the activation's input was at most 0
//   reduce_gradients   sum_dy = Σ g, sum_dy_xmu = Σ g (x - mean); with a residual also dresidual = g
//   input_gradient     dx = (g - sum_dy / count - (x - mean) invstd² sum_dy_xmu / count) invstd weight
//
// (Ioffe and Szegedy 2015, with the sums taken out.) The activation's input is computed again from x, to the same
// bits, unless a residual was added: then a mask of the forward tells. `input_gradient` also writes the gradients of
// weight and bias. Behind a normalization in place, x is its output: see formulas.h.
//
// Traffic: dy and x once each, then dy and x once more and dx; dresidual once, and the mask, if there are any. The
// blocks of the second kernel go through memory in the reverse order of the first, whose last reads may be in L2.
// Launch: THREADS threads, groups by splits blocks.
#include "common.cuh"

// The values that both kernels load, and the gradient behind the activation.
template <typename T, int V, bool COLUMNS, bool RESIDUAL, Activation ACTIVATION> struct Gradient {
    using A = Accumulator<T>;
    static constexpr int W = CHANNELS<V, COLUMNS>;
    static constexpr bool INVERTS = ACTIVATION == INVERTED_LEAKY_RELU;
    static constexpr bool COMPUTES_MASK = ACTIVATION != IDENTITY && !RESIDUAL && !INVERTS;
    template <int WIDTH> struct Loaded {
        Vector<T, WIDTH> dy, x;
        unsigned int blocked;
    };

    const T *dy, *x;
    const unsigned char* mask;
    bool reads_x;
    A shift[W], scale[W], offset[W], slope, inverse_slope;

    template <int WIDTH> __device__ __forceinline__ Loaded<WIDTH> load(const Place& place) const
    {
        Loaded<WIDTH> loaded;
        loaded.dy = ::load<T, WIDTH>(dy + place.element);
        if (reads_x) loaded.x = ::load<T, WIDTH>(x + place.element);
        if constexpr (ACTIVATION != IDENTITY && RESIDUAL) loaded.blocked = mask[place.mask];
        return loaded;
    }

    template <typename L, typename B> __device__ __forceinline__ void begin(const L&, const B&) const {}

    // What was normalized, or its z.
    template <int WIDTH> __device__ __forceinline__ A input(const Loaded<WIDTH>& loaded, int e) const
    {
        const A value = widen(loaded.x.values[e]);
        if constexpr (INVERTS) return before_leaky_relu(value, inverse_slope);
        return value;
    }

    template <int WIDTH> __device__ __forceinline__ A gradient(const Loaded<WIDTH>& loaded, int e) const
    {
        const A value = widen(loaded.dy.values[e]);
        if constexpr (ACTIVATION != IDENTITY) {
            const int w = COLUMNS ? e : 0;
            bool blocked;
            if constexpr (RESIDUAL)
                blocked = loaded.blocked >> e & 1;
            else if constexpr (INVERTS)
                blocked = is_blocked<ACTIVATION>(widen(loaded.x.values[e]));  // it keeps the sign
            else
                blocked = is_blocked<ACTIVATION>(
                    affine(widen(loaded.x.values[e]), shift[w], scale[w], offset[w]));
            return let_through<ACTIVATION>(value, blocked, slope);
        }
        return value;
    }

    // Each constant is read and converted by one thread, for all of the block. A barrier comes next. Returns the mean.
    //
    // c   the channel, number k of the block
    __device__ __forceinline__ double stage(const Geometry& g, int k, long long c, const double* saved, A* staged) const
    {
        double mean = saved[c], scale = saved[2 * g.C + c], offset = COMPUTES_MASK ? saved[3 * g.C + c] : 0;
        have(mean, scale, offset);
        staged[k] = static_cast<A>(mean);
        staged[MAX_GROUP + k] = static_cast<A>(scale);
        if constexpr (COMPUTES_MASK) staged[2 * MAX_GROUP + k] = static_cast<A>(offset);
        return mean;
    }

    // Take the constants of this thread's channels.
    __device__ __forceinline__ void take(const int (&channels)[W], const A* staged)
    {
#pragma unroll
        for (int w = 0; w < W; ++w) {
            shift[w] = staged[channels[w]];
            scale[w] = staged[MAX_GROUP + channels[w]];
            if constexpr (COMPUTES_MASK) offset[w] = staged[2 * MAX_GROUP + channels[w]];
        }
    }
};

template <typename T, int V, bool COLUMNS, bool RESIDUAL, Activation ACTIVATION>
struct Reduce : Gradient<T, V, COLUMNS, RESIDUAL, ACTIVATION> {
    using A = Accumulator<T>;
    using Base = Gradient<T, V, COLUMNS, RESIDUAL, ACTIVATION>;
    template <int WIDTH> using Loaded = typename Base::template Loaded<WIDTH>;

    T* dresidual;
    A sum[V] = {}, product[V] = {};

    template <int WIDTH> __device__ __forceinline__ void use(const Loaded<WIDTH>& loaded, const Place& place)
    {
        Vector<T, WIDTH> result;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
            const A g = this->gradient(loaded, e);
            sum[e] += g;
            product[e] += g * (this->input(loaded, e) - this->shift[COLUMNS ? e : 0]);
            result.values[e] = static_cast<T>(g);
        }
        if constexpr (RESIDUAL) store(dresidual + place.element, result);
    }

    // See sum_by_channel.
    __device__ __forceinline__ void write(const Entries<Base::W>& entries) const
    {
        constexpr int W = Base::W;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            double total = sum[w], products = product[w];
            if constexpr (!COLUMNS) {
#pragma unroll
                for (int e = 1; e < V; ++e) {
                    total += sum[e];
                    products += product[e];
                }
            }
            entries[w] = {total, products};
        }
    }
};

// dy, x, dresidual   [N, C, S]; dresidual is null without RESIDUAL
// mask               from `normalize`; null unless RESIDUAL and an ACTIVATION
// saved              [4 * C + 1] from `normalize`
// global_sums        [2 * C + 5] for the ranks to add up: sum_dy, sum_dy_xmu, trailer
// local_sums         [2 * C] the same, which stays this rank's
// partials  [splits, C, 2], counters [groups]: see sum_by_channel
template <typename T, int V, bool COLUMNS, bool RESIDUAL, Activation ACTIVATION>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    reduce_gradients(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dresidual,
                     const unsigned char* __restrict__ mask, GEOMETRY, const double* __restrict__ saved, Accumulator<T> slope,
                     double* __restrict__ global_sums, double* __restrict__ local_sums, TRAILER,
                     double* partials, unsigned int* counters)
{
    using A = Accumulator<T>;
    const Geometry g = {N, C, S, lanes, group, per_split, groups, splits};
    const Part part = part_of_block<false>(g);

    __shared__ A staged[3 * MAX_GROUP];

    Reduce<T, V, COLUMNS, RESIDUAL, ACTIVATION> body;
    body.dy = dy;
    body.x = x;
    body.reads_x = true;
    body.dresidual = dresidual;
    body.mask = mask;
    body.slope = slope;
    if (body.INVERTS) body.inverse_slope = 1 / slope;
    const int k = threadIdx.x;
    if (k < part.channels) body.stage(g, k, part.channel + k, saved, staged);
    __syncthreads();  // publishes what was staged
    int channels[body.W];
    channels_of<V, COLUMNS>(g, part, channels);
    body.take(channels, staged);
    walk<V, COLUMNS, LOADS / 2>(g, part, body);

    const bool is_last = sum_by_channel<V, COLUMNS>(
        g, part, partials, counters, [&](const Entries<CHANNELS<V, COLUMNS>>& entries) { body.write(entries); },
        [&](long long c, double sum, double product) {
            const double mean = saved[c];
            product = about_mean(product, sum, mean, static_cast<A>(mean));
            global_sums[c] = local_sums[c] = sum;
            global_sums[g.C + c] = local_sums[g.C + c] = product;
        });
    if (is_last && part.index == 0 && threadIdx.x == 0)
        write_trailer(global_sums + 2 * g.C, fault, low, low_square, high, high_square);
}

// dx = (g + ((x - shift) * factor + constant)) * scale, or g * scale
template <typename T, int V, bool COLUMNS, bool RESIDUAL, Activation ACTIVATION>
struct Apply : Gradient<T, V, COLUMNS, RESIDUAL, ACTIVATION> {
    using A = Accumulator<T>;
    using Base = Gradient<T, V, COLUMNS, RESIDUAL, ACTIVATION>;
    template <int WIDTH> using Loaded = typename Base::template Loaded<WIDTH>;

    T* dx;
    const double* sums;  // null if there are none: this takes fewer registers than a bool
    A factor[Base::W], constant[Base::W];

    template <int WIDTH> __device__ __forceinline__ void use(const Loaded<WIDTH>& loaded, const Place& place) const
    {
        Vector<T, WIDTH> result;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
            const int w = COLUMNS ? e : 0;
            A g = this->gradient(loaded, e);
            if (sums)
                g = input_gradient_of(g, this->input(loaded, e), this->shift[w], factor[w], constant[w], this->scale[w]);
            else
                g *= this->scale[w];
            result.values[e] = static_cast<T>(g);
        }
        store(dx + place.element, result);
    }
};

// dy, x, dx        [N, C, S]; dx may be dy; behind a ReLU of a sum with a residual, dy is its dresidual
// mask             from `normalize`; null unless RESIDUAL and an ACTIVATION
// saved            [4 * C + 1] from `normalize`
// sums             [2 * C] sum_dy and sum_dy_xmu over the batch of the statistics; null if they were constants
// parameter_sums   [2 * C] those that the gradients of weight and bias are of; these are scaled by parameter_scale
// dweight, dbias   [C] or null, of the types told by flags
// mailbox          [5] or null: the host's, for the trailer of `sums`
template <typename T, int V, bool COLUMNS, bool RESIDUAL, Activation ACTIVATION>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    input_gradient(const T* dy, const T* __restrict__ x, T* dx,
                   const unsigned char* __restrict__ mask, GEOMETRY, const double* __restrict__ saved, Accumulator<T> slope,
                   const double* sums, const double* parameter_sums, double parameter_scale,
                   void* __restrict__ dweight, void* __restrict__ dbias, long long flags, double* mailbox)
{
    using A = Accumulator<T>;
    const Geometry g = {N, C, S, lanes, group, per_split, groups, splits};
    const Part part = part_of_block<true>(g);
    __shared__ A staged[3 * MAX_GROUP];
    __shared__ A factors[MAX_GROUP];
    __shared__ A constants[MAX_GROUP];

    Apply<T, V, COLUMNS, RESIDUAL, ACTIVATION> body;
    const int k = threadIdx.x;
    if (k < part.channels) {
        const long long c = part.channel + k;
        double invstd = saved[g.C + c], count = 0, sum_dy = 0, sum_dy_xmu = 0;
        if (sums) {
            count = saved[4 * g.C];
            sum_dy = sums[c];
            sum_dy_xmu = sums[g.C + c];
        }
        have(invstd, count, sum_dy, sum_dy_xmu);
        const double mean = body.stage(g, k, c, saved, staged);
        if (sums) {
            const GradientStep<A> step = gradient_step_of<A>(sum_dy, sum_dy_xmu, count, mean, invstd);
            factors[k] = step.factor;
            constants[k] = step.constant;
        }
        if (part.split == 0) {
            if (c == 0) tell_host(mailbox, sums + 2 * g.C);
            if (dweight)
                write_parameter<T>(dweight, flags & WEIGHT_IS_FLOAT, c,
                                   parameter_sums[g.C + c] * invstd * parameter_scale);
            if (dbias) write_parameter<T>(dbias, flags & BIAS_IS_FLOAT, c, parameter_sums[c] * parameter_scale);
        }
    }
    __syncthreads();  // publishes the constants

    body.dy = dy;
    body.x = x;
    body.dx = dx;
    body.mask = mask;
    body.sums = sums;
    body.reads_x = sums || body.COMPUTES_MASK || body.INVERTS;
    body.slope = slope;
    if (body.INVERTS) body.inverse_slope = 1 / slope;
    int channels[body.W];
    channels_of<V, COLUMNS>(g, part, channels);
    body.take(channels, staged);
    if (sums) {
#pragma unroll
        for (int w = 0; w < body.W; ++w) {
            body.factor[w] = factors[channels[w]];
            body.constant[w] = constants[channels[w]];
        }
    }
    walk<V, COLUMNS, LOADS / 2>(g, part, body);
}
