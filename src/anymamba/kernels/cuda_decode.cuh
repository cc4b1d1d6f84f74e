// What the decoding kernels share. Every parameter of a kernel is 8 bytes wide; macros come from cuda_decode.py.
//
// Axes: b rows of the batch, m d_model, d d_inner, n d_state, r dt_rank, w d_conv.
//
// A kernel may start while the one before it still runs (programmatic dependent launch): it lets the next one start,
// brings what no kernel of this token writes before it (weights, states), and only then waits for the one before.

typedef long long i64;
typedef unsigned short b16;  // a bfloat16

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float wide(b16 v) { return __uint_as_float((unsigned)v << 16); }
__device__ __forceinline__ b16 narrow(float v) { b16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rounded(float v) { return wide(narrow(v)); }

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rcp(float v) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float silu(float v) { return v * rcp(1.f + ex2(-1.44269504f * v)); }

// log(1 + e^v) = max(v, 0) + log1p(e^-|v|): the polynomial of cuda_common.cuh
__device__ __forceinline__ float softplus(float v) {
    const float e = ex2(-1.44269504f * fabsf(v));
    float p = 5.253457930e-03f;
    p = fmaf(p, e, -2.958850749e-02f); p = fmaf(p, e, 7.836166769e-02f); p = fmaf(p, e, -1.367477030e-01f);
    p = fmaf(p, e, 1.911143064e-01f); p = fmaf(p, e, -2.484436929e-01f); p = fmaf(p, e, 3.331927061e-01f);
    p = fmaf(p, e, -4.999950230e-01f); p = fmaf(p, e, 1.f);
    return fmaxf(v, 0.f) + p * e;
}

// c (16 × 8) += a (16 × 16) b (16 × 8)
__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The causal convolution of one channel of one row: its last TAPS - 1 inputs, and the weights.
struct Convolution {
    b16 last[TAPS], weight[TAPS];
    float bias;

    __device__ __forceinline__ void load(const b16* state, const b16* weights, const b16* biases, i64 channel) {
        bias = biases ? wide(biases[channel]) : 0.f;
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) last[k] = state[k];
#pragma unroll
        for (int k = 0; k < TAPS; k++) weight[k] = weights[channel * TAPS + k];
    }

    // takes q in; the activated output
    __device__ __forceinline__ float step(b16* state, b16 q) {
        float y = bias;
        last[TAPS - 1] = q;
#pragma unroll
        for (int k = 0; k < TAPS; k++) y = fmaf(wide(weight[k]), wide(last[k]), y);
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) state[k] = last[k + 1];
        return silu(y);
    }
};

// The same of 8 neighbouring channels; what is loaded early is in registers.
struct Convolution8 {
    uint4 weights[TAPS], biases;

    __device__ __forceinline__ void load(const b16* weight, const b16* bias, i64 channel) {
#pragma unroll
        for (int k = 0; k < TAPS; k++) weights[k] = ((const uint4*)(weight + channel * TAPS))[k];
        biases = bias ? *(const uint4*)(bias + channel) : make_uint4(0, 0, 0, 0);
    }

    // takes x in; `last` are the inputs before, (8,w-1), and become those after
    __device__ __forceinline__ uint4 step(uint4 (&last)[TAPS], const b16* x) {
        __align__(16) b16 y[8];
#pragma unroll
        for (int c = 0; c < 8; c++) {
            Convolution one;
            one.load((b16*)last + c * (TAPS - 1), (const b16*)weights, (const b16*)&biases, c);
            y[c] = narrow(one.step((b16*)last + c * (TAPS - 1), x[c]));
        }
        return *(uint4*)y;
    }
};
