// Normalize, forward: finish the statistics of all ranks, update the running ones, and write y, in one launch.
//
//   y = activation((x - shift) * scale + offset + residual)
//   shift = mean rounded to the accumulator's type, scale = invstd * weight, offset = bias - (mean - shift) * scale
//
// Each block finishes the statistics of its own channels: that takes some 50 operations in float64 per channel, and
// spares a launch. The blocks of the first split also update the running statistics and save values for the backward.
//
// Traffic: x once, y once, the residual once, and with a residual before an activation a byte of mask a vector. The
// blocks go through memory in the reverse order of `statistics`, whose last reads may still be in L2.
// Launch: THREADS threads, groups by splits blocks, as for `statistics`.
#include "common.cuh"

// Writes y; RESIDUAL: adds a residual; ACTIVATION: with `slope` below zero.
template <typename T, int V, bool COLUMNS, bool RESIDUAL, Activation ACTIVATION> struct Normalize {
    using A = Accumulator<T>;
    static constexpr int W = CHANNELS<V, COLUMNS>;
    template <int WIDTH> struct Loaded {
        Vector<T, WIDTH> x, residual;
    };

    const T *x, *residual;
    T* y;
    unsigned char* mask;
    A shift[W], scale[W], offset[W], slope;

    template <int WIDTH> __device__ __forceinline__ Loaded<WIDTH> load(const Place& place) const
    {
        Loaded<WIDTH> loaded;
        loaded.x = ::load<T, WIDTH>(x + place.element);
        if constexpr (RESIDUAL) loaded.residual = ::load<T, WIDTH>(residual + place.element);
        return loaded;
    }

    template <typename L, typename B> __device__ __forceinline__ void begin(const L&, const B&) const {}

    template <int WIDTH> __device__ __forceinline__ void use(const Loaded<WIDTH>& loaded, const Place& place) const
    {
        Vector<T, WIDTH> result;
        unsigned int blocked = 0;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
            const int w = COLUMNS ? e : 0;
            A value = affine(widen(loaded.x.values[e]), shift[w], scale[w], offset[w]);
            if constexpr (RESIDUAL) value += widen(loaded.residual.values[e]);
            if constexpr (ACTIVATION != IDENTITY) {
                const bool is = is_blocked<ACTIVATION>(value);
                blocked |= static_cast<unsigned int>(is) << e;
                value = let_through<ACTIVATION>(value, is, slope);
            }
            result.values[e] = static_cast<T>(value);
        }
        store(y + place.element, result);
        if constexpr (RESIDUAL && ACTIVATION != IDENTITY) mask[place.mask] = static_cast<unsigned char>(blocked);
    }
};

// Whether the sums that the statistics are made of are right: of float64 data there are two.
__device__ __forceinline__ bool are_sound(const double* vector, const double* squares, long long C, long long ranks)
{
    return is_sound(vector + 4 * C + 1, ranks) && (!squares || is_sound(squares + C, ranks));
}

// x, y, residual   [N, C, S]; y may be x; residual is null without RESIDUAL
// mask             a byte per vector: bit e tells of element e whether the activation blocks it. Null unless RESIDUAL
//                  and an ACTIVATION, as without a residual the backward computes it again
// vector           [4 * C + 6] of all ranks; null to normalize by the running statistics
// squares          [C + 5] of all ranks, for float64 data; null for others
// weight, bias, running_mean, running_var   [C] or null, of the types told by flags
// num_batches_tracked   [1] or null
// momentum         share of the batch in the running statistics; negative for 1 / num_batches_tracked
// ranks            how many have been added up, if the running statistics are to be updated; else 0
// saved            [4 * C + 1]: mean, invstd, scale, offset, and the count over all ranks; in place mean and invstd are
//                  those of z, see formulas.h
// counter          [1]: zero before the launch and after it; null unless num_batches_tracked goes up
// mailbox          [5] or null: the host's, for the trailer of the squares, or of the vector where there are none
template <typename T, int V, bool COLUMNS, bool RESIDUAL, Activation ACTIVATION>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    normalize(const T* x, T* y, const T* __restrict__ residual, unsigned char* __restrict__ mask, GEOMETRY,
              const double* __restrict__ vector, const double* __restrict__ squares, const void* __restrict__ weight,
              const void* __restrict__ bias, void* running_mean, void* running_var, long long* num_batches_tracked,
              long long flags, double momentum, long long ranks, double eps, Accumulator<T> slope,
              double* __restrict__ saved, unsigned int* counter, double* mailbox)
{
    using A = Accumulator<T>;
    const Geometry g = {N, C, S, lanes, group, per_split, groups, splits};
    const Part part = part_of_block<true>(g);
    __shared__ A shifts[MAX_GROUP];
    __shared__ A scales[MAX_GROUP];
    __shared__ A offsets[MAX_GROUP];

    const bool updates = ranks > 0 && part.split == 0;  // the running statistics, if the sums are sound
    const int k = threadIdx.x;
    if (k < part.channels) {
        const long long c = part.channel + k;
        double mean, var, count = 0, factor, constant;
        const auto read_affine = [&] {
            factor = weight ? read_parameter<T>(weight, flags & WEIGHT_IS_FLOAT, c) : 1;
            constant = bias ? read_parameter<T>(bias, flags & BIAS_IS_FLOAT, c) : 0;
        };
        if (vector) {
            const ChannelSums sums = sums_of(vector, c, g.C);
            const double square = squares ? squares[c] : 0;
            read_affine();  // under way beside the sums
            const ChannelMoments moments = moments_of(sums);
            mean = moments.mean;
            count = moments.count;
            var = variance_of(squares ? square : moments.m2, count);
        } else {
            mean = read_parameter<T>(running_mean, flags & MEAN_IS_FLOAT, c);
            var = read_parameter<T>(running_var, flags & VAR_IS_FLOAT, c);
            read_affine();
        }
        if (flags & IN_PLACE) factor = invertible(factor);
        const Step<A> step = step_of<A>(mean, var, eps, factor, constant);
        shifts[k] = step.shift;
        scales[k] = step.scale;
        offsets[k] = step.offset;
        if (part.split == 0) {
            saved[c] = flags & IN_PLACE ? constant : mean;
            saved[g.C + c] = flags & IN_PLACE ? 1 / factor : step.invstd;
            saved[2 * g.C + c] = step.scale;
            saved[3 * g.C + c] = step.offset;
        }
        if (part.split == 0 && c == 0) {
            saved[4 * g.C] = count;
            tell_host(mailbox, squares ? squares + g.C : vector + 4 * g.C + 1);
        }
        // Looked at only here: what the walk needs waits for no more than its own sums.
        if (updates && count > 0 && are_sound(vector, squares, g.C, ranks)) {
            const double share = momentum < 0 ? 1.0 / (*num_batches_tracked + 1) : momentum;
            const double old_mean = read_parameter<T>(running_mean, flags & MEAN_IS_FLOAT, c);
            const double old_var = read_parameter<T>(running_var, flags & VAR_IS_FLOAT, c);
            write_parameter<T>(running_mean, flags & MEAN_IS_FLOAT, c, updated(old_mean, mean, share));
            write_parameter<T>(running_var, flags & VAR_IS_FLOAT, c,
                               updated(old_var, unbiased(var, count), share));
        }
    }
    __syncthreads();  // publishes the constants; all have read num_batches_tracked

    // It goes up by one when every group has read it.
    if (updates && num_batches_tracked && threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(counter, 1u) == g.groups - 1) {
            __threadfence();
            *counter = 0;
            if (vector[4 * g.C] > 0 && are_sound(vector, squares, g.C, ranks)) ++*num_batches_tracked;
        }
    }

    Normalize<T, V, COLUMNS, RESIDUAL, ACTIVATION> body;
    body.x = x;
    body.y = y;
    body.residual = residual;
    body.mask = mask;
    body.slope = slope;
    int channels[body.W];
    channels_of<V, COLUMNS>(g, part, channels);
#pragma unroll
    for (int w = 0; w < body.W; ++w) {
        body.shift[w] = shifts[channels[w]];
        body.scale[w] = scales[channels[w]];
        body.offset[w] = offsets[channels[w]];
    }
    walk<V, COLUMNS, RESIDUAL ? LOADS / 2 : LOADS>(g, part, body);
}
