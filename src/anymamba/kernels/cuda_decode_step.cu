// One token through what lies between the large products of a block: see cuda_decode.cuh.
#include "cuda_decode.cuh"

#define PACK (STATE == 0 ? 4 : 8)  // states in 16 bytes

__device__ __forceinline__ void widen(float (&h)[PACK], uint4 v) {
    const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (STATE == 0) h[i] = __uint_as_float(w[i]);
        else if (STATE == 1) { h[2 * i] = __uint_as_float(w[i] << 16); h[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u); }
        else asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(h[2 * i]), "=f"(h[2 * i + 1]) : "r"(w[i]));
    }
}

__device__ __forceinline__ uint4 lower(const float (&h)[PACK]) {
    unsigned w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (STATE == 0) w[i] = __float_as_uint(h[i]);
        else if (STATE == 1) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(h[2 * i + 1]), "f"(h[2 * i]));
        else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(h[2 * i + 1]), "f"(h[2 * i]));
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

#define THREADS 256

// ---- rows of memory to and from shared memory, in the background ----

// `count` rows of `bytes`, a multiple of 16; by the copy engine where there is one. `bring` counts on a barrier that every
// thread then arrives at, and `await` waits for.
__device__ __forceinline__ unsigned at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void bring(void* to, int pitch, const void* from, i64 stride, int count, int bytes, i64* barrier) {
#if __CUDA_ARCH__ >= 900
    if ((int)threadIdx.x < count) {
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(at(barrier)), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     :: "r"(at((char*)to + threadIdx.x * pitch)), "l"((const char*)from + threadIdx.x * stride), "r"(bytes), "r"(at(barrier)) : "memory");
    }
#else
    for (int i = threadIdx.x * 16; i < count * bytes; i += THREADS * 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                     :: "r"(at((char*)to + i / bytes * pitch + i % bytes)), "l"((const char*)from + i / bytes * stride + i % bytes) : "memory");
#endif
}

__device__ __forceinline__ void arrive(i64* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" :: "r"(at(barrier)) : "memory");
#endif
}

__device__ __forceinline__ void await(i64* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; wait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra wait;}" :: "r"(at(barrier)) : "memory");
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// what all threads have written, after a __syncthreads that follows `written`
__device__ __forceinline__ void written() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void send(void* to, i64 stride, const void* from, int pitch, int count, int bytes) {
#if __CUDA_ARCH__ >= 900
    if ((int)threadIdx.x < count) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                     :: "l"((char*)to + threadIdx.x * stride), "r"(at((const char*)from + threadIdx.x * pitch)), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
    }
#else
    for (int i = threadIdx.x * 16; i < count * bytes; i += THREADS * 16)
        *(uint4*)((char*)to + i / bytes * stride + i % bytes) = *(const uint4*)((const char*)from + i / bytes * pitch + i % bytes);
#endif
}

// ---- step sizes, scan and gate ----

#define PER (N < 16 ? N : 16)       // states of a lane
#define LANES (N / PER)             // of a channel
#define CHANNELS (LANES == 8 ? 32 : 64)       // of a block
#define SLOTS (THREADS / (LANES * CHANNELS))  // rows that a block has at a time
#define Q (N / PACK)                // pieces of 16 bytes of a channel
#define TILES ((CHANNELS + 15) / 16)
#define SHARES (8 / TILES)          // warps that share a tile
#define DEEP ((RANK + 15) / 16)     // instructions along the rank
#define WIDTH (RANK + 2 * N)        // of a row of [dt; B; C]
#define PITCH (DEEP * 16 + 8)       // of a row of dt before its projection: reads hit all banks

struct Shared {
    uint4 states[ROWS][CHANNELS * Q];
    b16 weight[CHANNELS][PITCH], raw[ROWS][PITCH], xs[ROWS][CHANNELS], zs[ROWS][CHANNELS];
    float BC[ROWS][2 * N], steps[ROWS][CHANNELS + 1];
    i64 early, late;  // barriers: of what is known before the last kernel ends, and of the rest
};
static_assert(sizeof(Shared) <= SHARED, "cuda_decode.py counts the bytes of this struct");

#define ITEMS ((ROWS * (WIDTH / 4) + THREADS - 1) / THREADS)

// [dt; B; C] of the block's rows: the sums of parts (SLICES,b,WIDTH).
__device__ __forceinline__ void gather(Shared& s, const float* parts, int row, i64 b) {
    float4 v[ITEMS][SLICES];  // four neighbours a thread; all loads first
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int i = min((int)threadIdx.x + item * THREADS, ROWS * (WIDTH / 4) - 1);
        const float* from = parts + min((i64)(row + i / (WIDTH / 4)), b - 1) * WIDTH + i % (WIDTH / 4) * 4;
#pragma unroll
        for (int k = 0; k < SLICES; k++) { v[item][k] = *(const float4*)from; from += b * WIDTH; }
    }
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int i = threadIdx.x + item * THREADS, r = i / (WIDTH / 4), e = i % (WIDTH / 4) * 4;
        if (i >= ROWS * (WIDTH / 4)) break;
        float4 sum = v[item][0];
#pragma unroll
        for (int k = 1; k < SLICES; k++) { sum.x += v[item][k].x; sum.y += v[item][k].y; sum.z += v[item][k].z; sum.w += v[item][k].w; }
        if (e < RANK) *(ushort4*)&s.raw[r][e] = make_ushort4(narrow(sum.x), narrow(sum.y), narrow(sum.z), narrow(sum.w));
        else *(float4*)&s.BC[r][e - RANK] = make_float4(rounded(sum.x), rounded(sum.y), rounded(sum.z), rounded(sum.w));
    }
}

// The step sizes of 16 channels and 8 rows.
__device__ __forceinline__ void project(Shared& s, int tile, int rows, const float* bias) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sum[2][4] = {};  // two chains that do not wait for each other
#pragma unroll
    for (int k = 0; k < DEEP; k++) {
        const b16 *a = &s.weight[tile + g][16 * k + 2 * t], *v = &s.raw[rows + g][16 * k + 2 * t];
        mma(sum[k % 2], *(const unsigned*)a, *(const unsigned*)(a + 8 * PITCH), *(const unsigned*)(a + 8),
            *(const unsigned*)(a + 8 * PITCH + 8), *(const unsigned*)v, *(const unsigned*)(v + 8));
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        s.steps[rows + 2 * t + e % 2][tile + g + e / 2 * 8] = softplus(rounded(sum[0][e] + sum[1][e]) + bias[e / 2]);
}

// y (b,d) of CHANNELS channels and ROWS rows a block. parts (SLICES,b,WIDTH): sums that make dt, B and C. xc (b,d),
// xz (b,2d), A (d,n) in the unit of ex2, state (b,d,n). d is a multiple of CHANNELS.
extern "C" __global__ void __launch_bounds__(THREADS)
scan_step(const float* parts, i64 b, i64 d, const b16* xc, const b16* xz, const b16* dt_weight, const float* dt_bias,
          const float* A, const float* D, uint4* state, b16* y) {
    extern __shared__ __align__(128) char memory[];
    Shared& s = *(Shared*)memory;
    let_next_start();
    const int warp = threadIdx.x / 32, first = blockIdx.x * CHANNELS, row = blockIdx.y * ROWS, rows = min(ROWS, (int)b - row);
    const int wide_row = CHANNELS * Q * 16, narrow_row = CHANNELS * 2;  // bytes
    xc += row * d + first; xz += 2 * row * d + d + first; y += row * d + first; state += (row * d + first) * Q;
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x < 2)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" :: "r"(at(&s.early + threadIdx.x)), "r"(THREADS) : "memory");
    __syncthreads();
#endif
    bring(s.states, wide_row, state, d * Q * 16, rows, wide_row, &s.early);  // nobody writes it before this kernel does
    bring(s.weight, PITCH * 2, dt_weight + first * (i64)RANK, RANK * 2, CHANNELS, RANK * 2, &s.early);
    arrive(&s.early);
    for (int i = threadIdx.x; i < (CHANNELS + ROWS) * (DEEP * 16 - RANK); i += THREADS) {  // weight and raw lie end to end
        const int r = i / (DEEP * 16 - RANK);
        (&s.weight[0][0])[r * PITCH + RANK + i % (DEEP * 16 - RANK)] = 0;
    }
    const int tile = 16 * (warp % TILES), g = threadIdx.x % 32 / 4;
    const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES % CHANNELS;
    // Neighbouring channels begin with other pieces of their states, so that they read other banks.
    const int turn = Q < 8 ? own / (8 / Q) : own;
    float bias[2], a[PER];
#pragma unroll
    for (int e = 0; e < 2; e++) bias[e] = dt_bias[first + (tile + g + 8 * e) % CHANNELS];
#pragma unroll
    for (int p = 0; p < PER / PACK; p++)
#pragma unroll
        for (int k = 0; k < PACK; k += 4) {
            const int n = (lane * (PER / PACK) + (p + turn) % (PER / PACK)) * PACK + k;
            const float4 v = *(const float4*)(A + (first + own) * (i64)N + n);
            a[p * PACK + k] = v.x; a[p * PACK + k + 1] = v.y; a[p * PACK + k + 2] = v.z; a[p * PACK + k + 3] = v.w;
        }
    const float skip = D[first + own];
    wait_for_last();
    bring(s.xs, narrow_row, xc, d * 2, rows, narrow_row, &s.late);
    bring(s.zs, narrow_row, xz, d * 4, rows, narrow_row, &s.late);
    arrive(&s.late);
    gather(s, parts, row, b);
    await(&s.early);
    __syncthreads();
    for (int i = warp / TILES * 8; i < rows && warp < SHARES * TILES; i += SHARES * 8) project(s, tile, i, bias);
    await(&s.late);
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x / (LANES * CHANNELS); i < rows; i += SLOTS) {
        const float dt = s.steps[i][own], x = wide(s.xs[i][own]), u = dt * x;
        float sum = 0;
#pragma unroll
        for (int p = 0; p < PER / PACK; p++) {
            const int piece = lane * (PER / PACK) + (p + turn) % (PER / PACK);
            uint4& kept = s.states[i][own * Q + piece];
            float h[PACK];
            widen(h, kept);
#pragma unroll
            for (int k = 0; k < PACK; k += 4) {
                const float4 B = *(const float4*)&s.BC[i][piece * PACK + k], C = *(const float4*)&s.BC[i][N + piece * PACK + k];
                const float bs[4] = {B.x, B.y, B.z, B.w}, cs[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {  // 0.5 ex2(v + 1): see cuda_common.cuh
                    h[k + e] = fmaf(0.5f * ex2(fmaf(dt, a[p * PACK + k + e], 1.f)), h[k + e], u * bs[e]);
                    sum = fmaf(cs[e], h[k + e], sum);
                }
            }
            kept = lower(h);
        }
#pragma unroll
        for (int k = 1; k < LANES; k *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
        if (lane == 0) s.xs[i][own] = narrow(fmaf(skip, x, sum) * silu(wide(s.zs[i][own])));  // all lanes have read it
    }
    written();
    __syncthreads();
    send(y, d * 2, s.xs, narrow_row, rows, narrow_row);
    send(state, d * Q * 16, s.states, wide_row, rows, wide_row);
}

// ---- the residual stream and its norm, a row a block ----

// stream (b,m) becomes embedding[ids], or has `add` (b,m) added; x = its norm.
extern "C" __global__ void __launch_bounds__(THREADS)
residual_norm(const i64* ids, const b16* add, i64 m, i64 eps_bits, const b16* weight, float* stream, b16* x) {
    __shared__ float shares[THREADS / 32];
    let_next_start();
    wait_for_last();
    const i64 row = blockIdx.x;
    float square = 0;
    ushort4 q;
    for (int i = 4 * threadIdx.x; i < m; i += 4 * THREADS) {
        float4 v = make_float4(0, 0, 0, 0), *to = (float4*)(stream + row * m + i);
        if (!ids) v = *to;
        q = *(const ushort4*)(add + (ids ? ids[row] : row) * m + i);
        v.x += wide(q.x); v.y += wide(q.y); v.z += wide(q.z); v.w += wide(q.w);
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

// xc (b,d) from the first half of xz (b,2d); conv (b,d,w-1) takes it in. 8 channels a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
convolution(const b16* xz, i64 b, i64 d, b16* conv, const b16* weight, const b16* bias, b16* xc) {
    let_next_start();
    const i64 i = (blockIdx.x * (i64)THREADS + threadIdx.x) * 8, row = i / d, channel = i % d;
    if (i >= b * d) { wait_for_last(); return; }
    Convolution8 eight;
    uint4 last[TAPS], *to = (uint4*)(conv + i * (TAPS - 1));
    __align__(16) b16 x[8];
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++) last[k] = to[k];
    eight.load(weight, bias, channel);
    wait_for_last();
    *(uint4*)x = *(const uint4*)(xz + row * 2 * d + channel);
    *(uint4*)(xc + i) = eight.step(last, x);
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++) to[k] = last[k];
}
