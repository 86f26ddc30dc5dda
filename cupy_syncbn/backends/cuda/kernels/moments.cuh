// The statistics of a channel in the vector that the ranks have added up in the forward.
#pragma once

// Round to 12 significant bits, by Veltkamp's splitting (Dekker 1971). Contracted to fused multiply-adds, which have no
// rounding in between, it would give back the value as it is.
__device__ __forceinline__ double round_to_12_bits(double value)
{
    const double scaled = __dmul_rn(value, 2199023255553.0);  // 2^41 + 1
    return __dsub_rn(scaled, __dsub_rn(scaled, value));
}

struct ChannelMoments {
    double mean, m2, count;  // m2 = Σ(x - mean)²
};

// vector    [4 * C + 6]: sums over the ranks of the vectors that `statistics` writes
__device__ __forceinline__ ChannelMoments moments_of(const double* vector, long long c, long long C)
{
    const double pivot_sum = vector[c], pivot_square = vector[C + c];
    const double sum = vector[2 * C + c], square = vector[3 * C + c], count = vector[4 * C];
    const double n = fmax(count, 1.0);
    const double pivot = round_to_12_bits(pivot_sum / n);
    const double rest = pivot_sum - n * pivot;  // exact, as are the products in the next line but one
    const double shifted = rest + sum;
    const double m2 = (pivot_square - pivot * pivot_sum) - pivot * rest + (square - 2 * pivot * sum - shifted * shifted / n);
    return {pivot + shifted / n, m2, count};
}

// Whether the sum is right: no rank had a fault, and all were in the same call. The host may learn it later.
//
// trailer   [5]: sums over the ranks of fault, low, low², high and high², see comm/trailer.py
__device__ __forceinline__ bool is_sound(const double* trailer, long long ranks)
{
    return trailer[0] == 0 && ranks * trailer[2] == trailer[1] * trailer[1] && ranks * trailer[4] == trailer[3] * trailer[3];
}
