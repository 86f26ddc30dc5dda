// Correct kernels, which must give right results under every schedule. `statistics` can be asked for a bug.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

// ---- A reduction over blocks, whose last block to finish merges what all have found -------------
enum Bug {
    NONE,
    MISSING_BARRIER,
    MISSING_RELEASE,   // no fence before the atomic
    MISSING_ACQUIRE,   // no fence after the atomic
    LATE_ACQUIRE,      // ... but after the barrier, where it does not order what the other threads read
    ONE_TOO_MANY,
    SHUFFLE_WIDTH,     // half warps never meet
};

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <Bug bug>
__device__ double warp_sum(double value) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, offset, bug == SHUFFLE_WIDTH ? WARP / 2 : WARP);
    }
    return value;
}

// The sum over the block, in its first warp. V says how much shared memory it takes, as in a vectorised kernel.
template <int V, Bug bug>
__device__ double block_sum(double value) {
    __shared__ double entries[WARP * V];  // of a template's size, in a __device__ function
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    value = warp_sum<bug>(value);
    if (lane == 0) entries[warp * V] = value;
    if (bug != MISSING_BARRIER) __syncthreads();
    value = warp == 0 && lane < warps ? entries[lane * V] : 0.0;
    __syncthreads();  // entries may be used again
    return warp == 0 ? warp_sum<bug>(value) : 0.0;
}

// total[c] = the sum of x (C, S) over S. Grid: (blocks per channel, C). partial: (C, gridDim.x);
// arrived: (C,), zero before and after.
template <typename T, int V, Bug bug>
__global__ void __launch_bounds__(64 * V)
sum_channels(const T* __restrict__ x, long long S, double* __restrict__ partial, unsigned* __restrict__ arrived,
             double* __restrict__ total) {
    __shared__ bool is_last;
    const int c = blockIdx.y, blocks = gridDim.x;
    const long long end = S + (bug == ONE_TOO_MANY);
    double sum = 0.0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < end; i += (long long)blocks * blockDim.x) {
        sum += to_float(x[c * S + i]);
    }
    sum = block_sum<V, bug>(sum);
    if (threadIdx.x == 0) {
        partial[c * blocks + blockIdx.x] = sum;
        if (bug != MISSING_RELEASE) __threadfence();
        is_last = atomicAdd(&arrived[c], 1u) == (unsigned)blocks - 1;
        if (bug != MISSING_ACQUIRE && bug != LATE_ACQUIRE) __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    if (bug == LATE_ACQUIRE && threadIdx.x == 0) __threadfence();
    sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += __ldcg(&partial[c * blocks + i]);
    sum = block_sum<V, bug>(sum);
    if (threadIdx.x == 0) {
        total[c] = sum;
        arrived[c] = 0;
    }
}

// ---- Vectors ------------------------------------------------------------------------------------
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
    T values[V];
};

__device__ void scale(float& value, float by) { value *= by; }
__device__ void scale(__half& value, float by) { value = __float2half_rn(__half2float(value) * by); }
__device__ void scale(__nv_bfloat16& value, float by) { value = __float2bfloat16_rn(__bfloat162float(value) * by); }

// y = by * x in vectors of V; count is a multiple of V.
template <typename T, int V>
__global__ void scale_vectors(const T* __restrict__ x, T* __restrict__ y, float by, long long count) {
    typedef Vector<T, V> Vec;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count / V; i += step) {
        Vec vector = reinterpret_cast<const Vec*>(x)[i];
#pragma unroll
        for (int j = 0; j < V; ++j) scale(vector.values[j], by);
        reinterpret_cast<Vec*>(y)[i] = vector;
    }
}

// The same in the vector types of CUDA.
extern "C" __global__ void scale_float4(const float4* __restrict__ x, float4* __restrict__ y, float by, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        const float4 a = __ldg(x + i), b = __ldcs(x + i), c = __ldcg(x + i);
        __stcs(y + i, make_float4(by * a.x, by * b.y, by * c.z, by * a.w));
    }
}
extern "C" __global__ void scale_half2(const __half2* __restrict__ x, __half2* __restrict__ y, float by, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        const float2 v = __half22float2(x[i]);
        y[i] = __floats2half2_rn(by * v.x, by * v.y);
    }
}

// ---- Conversions and mathematics ----------------------------------------------------------------
extern "C" __global__ void round_to_16_bits(const float* x, __half* as_half, __nv_bfloat16* as_bfloat16) {
    as_half[threadIdx.x] = __float2half_rn(x[threadIdx.x]);
    as_bfloat16[threadIdx.x] = __float2bfloat16_rn(x[threadIdx.x]);
}
extern "C" __global__ void mathematics(const float* x, float* y) {
    const float a = x[0], b = x[1];
    y[0] = fmaf(a, b, 1.0f);
    y[1] = rsqrtf(a);
    y[2] = (float)rsqrt((double)a);
    y[3] = sqrtf(b);
    y[4] = fmaxf(a, b);
    y[5] = min(a, b);
    y[6] = max(3, 2u);
    y[7] = isfinite(a / (b - 9.0f)) ? 1.0f : isnan(a) ? 2.0f : 3.0f;
    y[8] = (float)fma((double)a, (double)b, 1.0);
}

// ---- Barriers, collectives, atomics -------------------------------------------------------------
// Dynamic shared memory: reverses each block's part of x.
extern "C" __global__ void reverse_blocks(const float* x, float* y) {
    extern __shared__ float part[];
    const int t = threadIdx.x, first = blockIdx.x * blockDim.x;
    part[t] = x[first + t];
    __syncthreads();
    y[first + t] = part[blockDim.x - 1 - t];
}

// y = [count, or, and] of three predicates over a block of 64.
extern "C" __global__ void block_votes(int* y) {
    const int t = threadIdx.x;
    const int count = __syncthreads_count(t < 40), any = __syncthreads_or(t == 63), all = __syncthreads_and(t < 63);
    if (t == 17) {
        y[0] = count;
        y[1] = any;
        y[2] = all;
    }
}

extern "C" __global__ void warp_votes(unsigned* y) {
    const int t = threadIdx.x;
    const unsigned ballot = __ballot_sync(ALL_LANES, t % 3 == 0);
    const int any = __any_sync(ALL_LANES, t == 31), all = __all_sync(ALL_LANES, t < 31);
    if (t == 5) {
        y[0] = ballot;
        y[1] = any;
        y[2] = all;
    }
}

template <typename T>
__global__ void shuffles(const T* x, T* by_index, T* up, T* down, T* by_xor, int argument, int width) {
    const int t = threadIdx.x;
    const T value = x[t];
    by_index[t] = __shfl_sync(ALL_LANES, value, argument, width);
    up[t] = __shfl_up_sync(ALL_LANES, value, argument, width);
    down[t] = __shfl_down_sync(ALL_LANES, value, argument, width);
    by_xor[t] = __shfl_xor_sync(ALL_LANES, value, argument, width);
}

// Two halves of a warp that go different ways, each with its own mask.
extern "C" __global__ void half_warps(int* y) {
    const int t = threadIdx.x;
    if (t < 16) {
        y[t] = __shfl_sync(0x0000ffffu, t, 3);
    } else {
        __syncwarp(0xffff0000u);
        y[t] = (int)__popc(__ballot_sync(0xffff0000u, t & 1));
    }
}

// A block of 40: the second warp has 8 lanes, and the shuffle of its upper 4 is undefined.
extern "C" __global__ void shuffle_in_part_of_a_warp(const float* x, float* y) {
    y[threadIdx.x] = __shfl_down_sync(ALL_LANES, x[threadIdx.x], 4);
}

extern "C" __global__ void exchange_in_warp(int* y) {
    __shared__ int values[WARP];
    values[threadIdx.x] = threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = values[WARP - 1 - threadIdx.x];
}

extern "C" __global__ void count_threads(int* as_int, unsigned* as_unsigned, float* as_float, double* as_double) {
    atomicAdd(as_int, 1);
    atomicAdd(as_unsigned, 1u);
    atomicAdd(as_float, 1.0f);
    atomicAdd(as_double, 1.0);
}

// All blocks wait for each other, so all must be resident.
extern "C" __global__ void grid_barrier(float* x, unsigned* arrived, float* y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, count = gridDim.x * blockDim.x;
    x[i] = (float)i;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < gridDim.x) {
        }
        __threadfence();
    }
    __syncthreads();
    y[i] = x[count - 1 - i];
}

// One warp hands a value to another by an atomic, without a barrier.
extern "C" __global__ void flag_in_block(int* y) {
    __shared__ int value;
    __shared__ int ready;
    if (threadIdx.x == 0) ready = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        value = 42;
        __threadfence();
        atomicExch(&ready, 1);
    } else if (threadIdx.x == 32) {
        while (atomicAdd(&ready, 0) == 0) {
        }
        __threadfence();
        y[0] = value;
    }
}

// The same between blocks by a volatile variable; needs both blocks resident.
extern "C" __global__ void flag_between_blocks(int* value, volatile int* ready, int* y) {
    if (blockIdx.x == 0) {
        value[0] = 42;
        __threadfence();
        ready[0] = 1;
    } else {
        while (ready[0] == 0) {
        }
        __threadfence();
        y[0] = value[0];
    }
}

extern "C" __global__ void store_index(int* y) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    y[block * threads + thread] = block * 1000 + thread;
}

// Every kind of parameter.
extern "C" __global__ void parameters(const int* null_or_not, void* anything, bool flag, int i, unsigned u, long long l,
                                      float f, double d, double* y) {
    y[0] = null_or_not ? null_or_not[0] : -1;
    y[1] = anything != nullptr;
    y[2] = flag;
    y[3] = i;
    y[4] = u;
    y[5] = (double)l;
    y[6] = f;
    y[7] = d;
}

// Reads at an address that the host may have freed.
extern "C" __global__ void read_at(const unsigned long long* addresses, float* y) {
    y[threadIdx.x] = *reinterpret_cast<const float*>(addresses[threadIdx.x]);
}
