// One token through what lies between the large products of a block: see cuda_decode.cuh.
#include "cuda_decode.cuh"

#if STATE == 0
typedef float H;
__device__ __forceinline__ void read_states(float (&h)[4], const H* p) { float4 v = *(const float4*)p; h[0] = v.x; h[1] = v.y; h[2] = v.z; h[3] = v.w; }
__device__ __forceinline__ void write_states(H* p, const float (&h)[4]) { *(float4*)p = make_float4(h[0], h[1], h[2], h[3]); }
#else
typedef b16 H;
__device__ __forceinline__ float widen(b16 v) {
    if (STATE == 1) return wide(v);
    float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v)); return r;
}
__device__ __forceinline__ b16 lower(float v) {
    if (STATE == 1) return narrow(v);
    b16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r;
}
__device__ __forceinline__ void read_states(float (&h)[4], const H* p) {
    ushort4 v = *(const ushort4*)p;
    h[0] = widen(v.x); h[1] = widen(v.y); h[2] = widen(v.z); h[3] = widen(v.w);
}
__device__ __forceinline__ void write_states(H* p, const float (&h)[4]) {
    *(ushort4*)p = make_ushort4(lower(h[0]), lower(h[1]), lower(h[2]), lower(h[3]));
}
#endif

// ---- step sizes, scan and gate ----

#define THREADS 256
#define LANES (N / 4)               // of a channel, 4 states each
#define CHANNELS (THREADS / LANES)  // of a block
#define TILES ((CHANNELS + 15) / 16)
#define DEEP ((RANK + 15) / 16)     // instructions along the rank
#define PITCH (DEEP * 16 + 8)       // of a row of dt before its projection: reads hit all banks

// y (b,d) of `rows` rows a block. parts (slices,b,r+2n): sums that make dt, B and C. xc (b,d), xz (b,2d), h (b,d,n).
extern "C" __global__ void __launch_bounds__(THREADS)
scan_step(const float* parts, i64 slices, i64 b, i64 d, const b16* xc, const b16* xz, const b16* dt_weight,
          const float* dt_bias, const float* A_log, const float* D, H* state, b16* y) {
    __shared__ b16 raw[ROWS][PITCH];
    __shared__ float B[ROWS][N], C[ROWS][N], steps[ROWS][CHANNELS + 1];
    let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * CHANNELS, row = blockIdx.y * ROWS;
    // this warp's 16 channels of the projection
    unsigned weight[DEEP][4];
    const int tile = warp % TILES;
#pragma unroll
    for (int k = 0; k < DEEP; k++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int channel = first + 16 * tile + g + e % 2 * 8, r = 16 * k + 2 * t + e / 2 * 8;
            weight[k][e] = channel < d && r < RANK ? *(const unsigned*)(dt_weight + channel * (i64)RANK + r) : 0;
        }
    const int channel = first + threadIdx.x / LANES, j = threadIdx.x % LANES * 4;
    const bool real = channel < d;
    float a[4] = {}, skip = 0, bias = 0, ahead[4] = {};
    if (real) {
        const float4 v = *(const float4*)(A_log + channel * (i64)N + j);
        a[0] = -1.44269504f * expf(v.x); a[1] = -1.44269504f * expf(v.y); a[2] = -1.44269504f * expf(v.z); a[3] = -1.44269504f * expf(v.w);
        skip = D[channel];
        bias = dt_bias[channel];
        if (row < b) read_states(ahead, state + (row * d + channel) * N + j);  // of the last token: nobody writes it now
    }
    wait_for_last();
    for (int i = threadIdx.x; i < ROWS * (DEEP * 16 + 2 * N); i += THREADS) {
        const int r = i / (DEEP * 16 + 2 * N), e = i % (DEEP * 16 + 2 * N), at = e < DEEP * 16 ? e : e - DEEP * 16 + RANK;
        float v = 0;
        if (row + r < b && (e < RANK || e >= DEEP * 16))
#pragma unroll 4
            for (int s = 0; s < slices; s++) v += parts[(s * b + row + r) * (RANK + 2 * N) + at];
        if (e < DEEP * 16) raw[r][e] = narrow(v);
        else if (at < RANK + N) B[r][at - RANK] = rounded(v);
        else C[r][at - RANK - N] = rounded(v);
    }
    __syncthreads();
    for (int i = warp / TILES; i < ROWS / 8 && warp < 8 / TILES * TILES; i += 8 / TILES) {
        float sum[4] = {};
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            const b16* v = &raw[8 * i + g][16 * k + 2 * t];
            mma(sum, weight[k][0], weight[k][1], weight[k][2], weight[k][3], *(const unsigned*)v, *(const unsigned*)(v + 8));
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (16 * tile + g + e / 2 * 8 < CHANNELS) steps[8 * i + 2 * t + e % 2][16 * tile + g + e / 2 * 8] = rounded(sum[e]);
    }
    __syncthreads();
#pragma unroll 2
    for (int i = 0; i < ROWS && row + i < b; i++) {
        const i64 at = (row + i) * d + channel;
        float h[4], sum = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) h[k] = ahead[k];
        if (real && i + 1 < ROWS && row + i + 1 < b) read_states(ahead, state + (at + d) * N + j);
        const float x = real ? wide(xc[at]) : 0.f, dt = softplus(steps[i][threadIdx.x / LANES] + bias);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            h[k] = fmaf(0.5f * ex2(fmaf(dt, a[k], 1.f)), h[k], dt * x * B[i][j + k]);  // 0.5 ex2(v + 1): see cuda_common.cuh
            sum = fmaf(C[i][j + k], h[k], sum);
        }
        if (real) write_states(state + at * N + j, h);
#pragma unroll
        for (int k = 1; k < LANES; k *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
        if (real && j == 0) y[at] = narrow(fmaf(skip, x, sum) * silu(wide(xz[2 * at - channel + d])));
    }
}

// ---- the residual stream and its norm, a row a block ----

// stream (b,m) becomes embedding[ids] or has `add` (b,m) added; x = its norm.
extern "C" __global__ void __launch_bounds__(256)
residual_norm(const i64* ids, const b16* add, i64 m, i64 eps_bits, const b16* weight, float* stream, b16* x) {
    __shared__ float shares[8];
    let_next_start();
    wait_for_last();
    stream += blockIdx.x * m;
    x += blockIdx.x * m;
    add += (ids ? ids[blockIdx.x] : blockIdx.x) * m;
    float square = 0;
    for (int i = threadIdx.x; i < m; i += 256) {
        float v = wide(add[i]) + (ids ? 0.f : stream[i]);
        stream[i] = v;
        square = fmaf(v, v, square);
    }
#pragma unroll
    for (int k = 16; k; k /= 2) square += __shfl_xor_sync(0xffffffffu, square, k);
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0;
    for (int i = 0; i < 8; i++) square += shares[i];
    const float scale = rsqrtf(square / m + __int_as_float((int)eps_bits));
    for (int i = threadIdx.x; i < m; i += 256) x[i] = narrow(stream[i] * scale * wide(weight[i]));
}

// ---- the convolution alone ----

// xc (b,d) from the first half of xz (b,2d); conv (b,d,w-1) takes it in.
extern "C" __global__ void __launch_bounds__(256)
convolution(const b16* xz, i64 b, i64 d, b16* conv, const b16* weight, const b16* bias, b16* xc) {
    let_next_start();
    wait_for_last();
    const i64 i = blockIdx.x * 256ll + threadIdx.x;
    if (i < b * d) xc[i] = narrow(convolve(conv + i * (TAPS - 1), weight, bias, i % d, xz[i / d * 2 * d + i % d]));
}
