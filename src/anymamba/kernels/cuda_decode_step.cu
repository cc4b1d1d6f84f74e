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

#define THREADS 256

// ---- step sizes, scan and gate ----

#define LANES (N / 4)               // of a channel, 4 states each
#define CHANNELS (THREADS / LANES)  // of a block
#define TILES ((CHANNELS + 15) / 16)
#define SHARES (8 / TILES)          // warps that share a tile
#define DEEP ((RANK + 15) / 16)     // instructions along the rank
#define WIDTH (RANK + 2 * N)        // of a row of [dt; B; C]
#define PITCH (DEEP * 16 + 8)       // of a row of dt before its projection: reads hit all banks
#define GROUP 4                     // rows whose states are on their way together

// [dt; B; C] of the block's rows: the sums of parts (SLICES,b,WIDTH)
__device__ __forceinline__ void gather(b16 (&raw)[ROWS][PITCH], float (&BC)[ROWS][2 * N], const float* parts, int row, i64 b) {
#pragma unroll 3
    for (int i = threadIdx.x; i < ROWS * (WIDTH / 4); i += THREADS) {
        const int r = i / (WIDTH / 4), e = i % (WIDTH / 4) * 4;
        if (row + r >= b) break;
        float4 part[SLICES], v = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int s = 0; s < SLICES; s++) part[s] = *(const float4*)(parts + (s * b + row + r) * WIDTH + e);
#pragma unroll
        for (int s = 0; s < SLICES; s++) { v.x += part[s].x; v.y += part[s].y; v.z += part[s].z; v.w += part[s].w; }
        if (e < RANK) *(ushort4*)&raw[r][e] = make_ushort4(narrow(v.x), narrow(v.y), narrow(v.z), narrow(v.w));
        else *(float4*)&BC[r][e - RANK] = make_float4(rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w));
    }
}

// A tile of 16-bit rows of CHANNELS from or to memory, 16 bytes a thread.
#define CHUNKS (CHANNELS / 8)
template <bool OUT> __device__ __forceinline__ void move(b16 (&tile)[ROWS][CHANNELS], b16* at, i64 stride, int row, i64 b, int columns) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS * 8;
        if (row + r >= b || c >= columns) continue;
        uint4 *inner = (uint4*)&tile[r][c], *outer = (uint4*)(at + (row + r) * stride + c);
        if (OUT) *outer = *inner; else *inner = *outer;
    }
}

// y (b,d) of ROWS rows a block. parts (SLICES,b,r+2n): sums that make dt, B and C. xc (b,d), xz (b,2d), state (b,d,n).
extern "C" __global__ void __launch_bounds__(THREADS)
scan_step(const float* parts, i64 b, i64 d, b16* xc, b16* xz, const b16* dt_weight, const float* dt_bias,
          const float* A_log, const float* D, H* state, b16* y) {
    __shared__ __align__(16) b16 raw[ROWS][PITCH], xs[ROWS][CHANNELS], zs[ROWS][CHANNELS];
    __shared__ __align__(16) float BC[ROWS][2 * N], steps[ROWS][CHANNELS + 1];
    let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * CHANNELS, row = blockIdx.y * ROWS, tile = 16 * (warp % TILES);
    unsigned weight[DEEP][4];  // of this warp's 16 channels of the projection
    float bias[2];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int channel = first + tile + g + e % 2 * 8;
        if (e < 2) bias[e] = channel < d ? dt_bias[channel] : 0.f;
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            const int r = 16 * k + 2 * t + e / 2 * 8;
            weight[k][e] = channel < d && r < RANK ? *(const unsigned*)(dt_weight + channel * (i64)RANK + r) : 0;
        }
    }
    const int own = threadIdx.x / LANES, j = threadIdx.x % LANES * 4, channel = first + own;
    const bool real = channel < d;
    float a[4] = {}, skip = 0, h[GROUP][4] = {};
    H* states = state + (row * d + channel) * N + j;
    if (real) {
        const float4 v = *(const float4*)(A_log + channel * (i64)N + j);
        a[0] = -1.44269504f * expf(v.x); a[1] = -1.44269504f * expf(v.y); a[2] = -1.44269504f * expf(v.z); a[3] = -1.44269504f * expf(v.w);
        skip = D[channel];
#pragma unroll
        for (int i = 0; i < GROUP; i++) if (row + i < b) read_states(h[i], states + i * d * N);  // nobody writes them now
    }
    for (int i = threadIdx.x; i < ROWS * (PITCH - RANK); i += THREADS) raw[i / (PITCH - RANK)][RANK + i % (PITCH - RANK)] = 0;
    wait_for_last();
    move<false>(xs, xc + first, d, row, b, (int)d - first);
    move<false>(zs, xz + d + first, 2 * d, row, b, (int)d - first);
    gather(raw, BC, parts, row, b);
    __syncthreads();
    for (int i = warp / TILES; i < ROWS / 8 && warp < SHARES * TILES; i += SHARES) {
        float sum[4] = {};
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            const b16* v = &raw[8 * i + g][16 * k + 2 * t];
            mma(sum, weight[k][0], weight[k][1], weight[k][2], weight[k][3], *(const unsigned*)v, *(const unsigned*)(v + 8));
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (tile + g + e / 2 * 8 < CHANNELS)
                steps[8 * i + 2 * t + e % 2][tile + g + e / 2 * 8] = softplus(rounded(sum[e]) + bias[e / 2]);
    }
    __syncthreads();
#pragma unroll 1
    for (int start = 0; start < ROWS && row + start < b; start += GROUP) {
        float sum[GROUP], ahead[GROUP][4];
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            if (real && start + GROUP + i < ROWS && row + start + GROUP + i < b) read_states(ahead[i], states + (start + GROUP + i) * d * N);
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const float dt = steps[start + i][own], u = dt * wide(xs[start + i][own]);
            const float4 B = *(const float4*)&BC[start + i][j], C = *(const float4*)&BC[start + i][N + j];
            const float bs[4] = {B.x, B.y, B.z, B.w}, cs[4] = {C.x, C.y, C.z, C.w};
            sum[i] = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                h[i][k] = fmaf(0.5f * ex2(fmaf(dt, a[k], 1.f)), h[i][k], u * bs[k]);  // 0.5 ex2(v + 1): see cuda_common.cuh
                sum[i] = fmaf(cs[k], h[i][k], sum[i]);
            }
            if (real && row + start + i < b) write_states(states + (start + i) * d * N, h[i]);
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
#pragma unroll
            for (int k = 1; k < LANES; k *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], k);
            if (j == i % LANES * 4)  // all lanes of the channel have read xs by now
                xs[start + i][own] = narrow(fmaf(skip, wide(xs[start + i][own]), sum[i]) * silu(wide(zs[start + i][own])));
#pragma unroll
            for (int k = 0; k < 4; k++) h[i][k] = ahead[i][k];
        }
    }
    __syncthreads();
    move<true>(xs, y + first, d, row, b, (int)d - first);
}

// ---- the residual stream and its norm, a row a block ----

// stream (b,m) becomes embedding[ids], or has added: `add` (b,m), or the sum of parts (slices,b,m) and a bias. x = norm.
extern "C" __global__ void __launch_bounds__(THREADS)
residual_norm(const i64* ids, const b16* add, const float* parts, i64 slices, i64 b, i64 m, i64 eps_bits,
              const b16* own_bias, const b16* weight, float* stream, b16* x) {
    __shared__ float shares[THREADS / 32];
    let_next_start();
    wait_for_last();
    const i64 row = blockIdx.x;
    float square = 0;
    ushort4 q;
    for (int i = 4 * threadIdx.x; i < m; i += 4 * THREADS) {
        float4 v = make_float4(0, 0, 0, 0), *to = (float4*)(stream + row * m + i);
        if (!ids) v = *to;
        float4 more = make_float4(0, 0, 0, 0);
        if (add) {
            q = *(const ushort4*)(add + (ids ? ids[row] : row) * m + i);
            more = make_float4(wide(q.x), wide(q.y), wide(q.z), wide(q.w));
        } else {
#pragma unroll 4
            for (int s = 0; s < slices; s++) {
                const float4 p = *(const float4*)(parts + (s * b + row) * m + i);
                more.x += p.x; more.y += p.y; more.z += p.z; more.w += p.w;
            }
            if (own_bias) {
                q = *(const ushort4*)(own_bias + i);
                more.x += wide(q.x); more.y += wide(q.y); more.z += wide(q.z); more.w += wide(q.w);
            }
        }
        v.x += rounded(more.x); v.y += rounded(more.y); v.z += rounded(more.z); v.w += rounded(more.w);
        *to = v;
        square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
#pragma unroll
    for (int k = 16; k; k /= 2) square += __shfl_xor_sync(0xffffffffu, square, k);
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) square += shares[i];
    const float scale = rsqrtf(square / m + __int_as_float((int)eps_bits));
    for (int i = 4 * threadIdx.x; i < m; i += 4 * THREADS) {
        const float4 v = *(const float4*)(stream + row * m + i);
        q = *(const ushort4*)(weight + i);
        *(ushort4*)(x + row * m + i) = make_ushort4(narrow(v.x * scale * wide(q.x)), narrow(v.y * scale * wide(q.y)),
                                                    narrow(v.z * scale * wide(q.z)), narrow(v.w * scale * wide(q.w)));
    }
}

// ---- the convolution alone ----

// xc (b,d) from the first half of xz (b,2d); conv (b,d,w-1) takes it in.
extern "C" __global__ void __launch_bounds__(THREADS)
convolution(const b16* xz, i64 b, i64 d, b16* conv, const b16* weight, const b16* bias, b16* xc) {
    let_next_start();
    const i64 i = blockIdx.x * (i64)THREADS + threadIdx.x, row = i / d, channel = i % d;
    Convolution one;
    if (i < b * d) one.load(conv + i * (TAPS - 1), weight, bias, channel);
    wait_for_last();
    if (i < b * d) xc[i] = narrow(one.step(conv + i * (TAPS - 1), xz[row * 2 * d + channel]));
}
