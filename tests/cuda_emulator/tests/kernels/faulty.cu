// Kernels with one fault each: test_cuda_emulator.py says what the emulator must report.
constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- Bounds and alignment -----------------------------------------------------------------------
extern "C" __global__ void read_past_the_end(const float* x, int count, float* y) { y[0] = x[count]; }
extern "C" __global__ void write_before_the_beginning(float* y) { y[-1] = 0.0f; }
extern "C" __global__ void static_shared_overrun(int* y) {
    __shared__ int values[64];
    int* p = values;
    p[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = p[threadIdx.x + 1];
}
extern "C" __global__ void static_shared_index(int* y) {
    __shared__ int values[64];
    values[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x + 1];
}
extern "C" __global__ void dynamic_shared_overrun(int* y) {
    extern __shared__ int values[];
    values[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x + 1];
}
extern "C" __global__ void too_much_shared(int* y) {
    __shared__ int all_there_is[48 * 256];
    extern __shared__ int more[];
    all_there_is[threadIdx.x] = 1;
    more[threadIdx.x] = all_there_is[threadIdx.x];
    y[threadIdx.x] = more[threadIdx.x];
}
extern "C" __global__ void null_pointer(const float* x, float* y) { y[0] = x[0]; }
extern "C" __global__ void local_of_another_thread(unsigned long long* addresses, int* y) {
    volatile int mine = threadIdx.x;
    addresses[threadIdx.x] = (unsigned long long)&mine;
    __syncthreads();
    y[threadIdx.x] = *(int*)addresses[threadIdx.x ^ 1];
    __syncthreads();
}
struct alignas(16) Float4 {
    float values[4];
};
extern "C" __global__ void load_16_bytes(const float* x, int offset, float* y) {
    const Float4 vector = *reinterpret_cast<const Float4*>(x + offset);
    y[0] = vector.values[3];
}
extern "C" __global__ void load_float4(const float* x, int offset, float* y) {
    y[0] = reinterpret_cast<const float4*>(x + offset)->w;
}
extern "C" __global__ void load_float(const unsigned char* x, int offset, float* y) {
    y[0] = *reinterpret_cast<const float*>(x + offset);
}
extern "C" __global__ void load_double(const float* x, int offset, double* y) {
    y[0] = *reinterpret_cast<const double*>(x + offset);
}

extern "C" __global__ void hinted_load(const float* x, int offset, float* y) {
    y[0] = __ldcs(reinterpret_cast<const float4*>(x + offset)).w;
}
extern "C" __global__ void hinted_store(float* x, int offset, float* y) {
    __stcs(reinterpret_cast<float4*>(x + offset), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    y[0] = 0.0f;
}

// ---- Memory that nobody has written -------------------------------------------------------------
extern "C" __global__ void uninitialised_shared(float* y) {
    __shared__ float values[32];
    y[threadIdx.x] = values[threadIdx.x];
}
extern "C" __global__ void add_one(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + 1.0f; }
extern "C" __global__ void count_up(unsigned* counter) { atomicAdd(counter, 1u); }

// ---- Data races ---------------------------------------------------------------------------------
extern "C" __global__ void missing_barrier(int* y) {
    __shared__ int values[64];
    values[threadIdx.x] = threadIdx.x;
    y[threadIdx.x] = values[63 - threadIdx.x];
}
extern "C" __global__ void reuse_without_barrier(int* y) {
    __shared__ int values[64];
    values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = values[63 - threadIdx.x];
    values[threadIdx.x] = -1;  // another thread may still read it
}
extern "C" __global__ void shuffle_as_barrier(int* y) {
    __shared__ int values[32];
    values[threadIdx.x] = threadIdx.x;
    const int one = __shfl_xor_sync(ALL_LANES, 1, 1);  // brings the lanes together, but orders no memory
    y[threadIdx.x] = values[31 - threadIdx.x] * one;
}
extern "C" __global__ void lost_update(int* y) { y[0] += 1; }
extern "C" __global__ void same_place_from_two_blocks(int* y) { y[threadIdx.x] = blockIdx.x; }
extern "C" __global__ void write_after_read_in_another_block(int* x, int* y) {
    if (blockIdx.x == 0) y[threadIdx.x] = x[threadIdx.x];
    if (blockIdx.x == 1) x[threadIdx.x] = 0;
}
extern "C" __global__ void one_reader_of_three(int* y) {
    __shared__ int value;
    if (threadIdx.x == 0) value = 1;
    __syncthreads();
    if (threadIdx.x % 32 == 0) y[threadIdx.x / 32] = value;  // by three warps
    __syncwarp();
    if (threadIdx.x == 1) value = 2;  // in order with the first of them only
}
extern "C" __global__ void second_of_two_readers(int* y) {
    __shared__ int value;
    __shared__ int reads;
    if (threadIdx.x == 0) value = 1, reads = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        y[threadIdx.x / 32] = value;  // by two warps
        atomicAdd(&reads, 1);
    }
    __syncwarp();
    if (threadIdx.x == 1) {
        while (atomicAdd(&reads, 0) < 2) {
        }
        value = 2;  // later than both reads, but in order with that of its warp only, for want of fences
    }
}
extern "C" __global__ void fence_by_another_warp(int* x, unsigned* ready, int* y) {
    if (blockIdx.x == 0) {
        if (threadIdx.x == 32) x[0] = 42;
        if (threadIdx.x == 0) {
            __threadfence();  // covers what its own warp did, there being no barrier
            atomicExch(ready, 1u);
        }
    } else if (threadIdx.x == 0) {
        while (atomicAdd(ready, 0u) == 0) {
        }
        __threadfence();
        y[0] = x[0];
    }
}
extern "C" __global__ void atomic_and_plain(int* y) {
    if (threadIdx.x == 0) atomicAdd(y, 1);
    if (threadIdx.x == 32) y[0] = 5;
}
extern "C" __global__ void read_only_load_of_what_is_written(int* x, int* y) {
    x[threadIdx.x] = 1;
    y[threadIdx.x] = __ldg(x + threadIdx.x);
}

// ---- Barriers and collectives -------------------------------------------------------------------
extern "C" __global__ void barrier_after_exit(int* y) {
    if (threadIdx.x % 63 == 0) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void two_barriers(int* y) {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = 1;
}
extern "C" __global__ void more_barriers_in_later_warps(int* y) {
    for (int i = 0; i <= (int)threadIdx.x / 32; i++) __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void shuffle_in_a_branch(int* y) {
    if (threadIdx.x < 8) y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, (int)threadIdx.x, 1);
}
extern "C" __global__ void shuffle_and_barrier(int* y) {
    if (threadIdx.x < 8) {
        y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, (int)threadIdx.x, 1);
    } else {
        __syncthreads();
    }
}
extern "C" __global__ void not_in_its_mask(int* y) { y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }
extern "C" __global__ void shuffle_of_width_12(int* y) { y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1, 1, 12); }
extern "C" __global__ void wait_for_nobody(unsigned* arrived) {
    while (atomicAdd(arrived, 0u) == 0) {
    }
}

// ---- Arithmetic ---------------------------------------------------------------------------------
extern "C" __global__ void divide(int a, int b, int* y) { y[0] = a / b; }
extern "C" __global__ void multiply(int a, int b, int* y) { y[0] = a * b; }
extern "C" __global__ void shift(int a, int b, int* y) { y[0] = a << b; }
extern "C" __global__ void trap() { __trap(); }

// ---- Limits -------------------------------------------------------------------------------------
template <int threads>
__global__ void __launch_bounds__(threads, 2) at_most(int* y) {
    y[threadIdx.x] = 1;
}

// The line that a message names is the one that #line gives.
#line 1000 "named_by_a_directive.cu"
extern "C" __global__ void fault_in_named_file(float* y) { /* one line
   of two */ y[-1] = 0.0f; }
