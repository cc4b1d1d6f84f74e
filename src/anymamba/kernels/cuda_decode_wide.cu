// More rows than a few times a matrix (outputs,k), on Hopper: tensor cores that read shared memory, fed by the copy engine.
//
// A block has OUTPUTS = 64 GROUPS rows of the matrix and all rows of x, padded to COLS, up to 96. One warp copies units of 64
// of k to a ring of DEPTH places, the matrix before x is even there; GROUPS groups of four warps multiply. The SPLIT blocks
// of a cluster share k: each has its sums in shared memory, and adds up a part of all of them.
//
// EPILOGUE as in cuda_decode_product.cu.
#include "cuda_decode.cuh"

#define OUTPUTS (64 * GROUPS)
#define WORKERS (128 * GROUPS)  // threads that multiply
#define THREADS (WORKERS + 32)
#if COLS % 64 == 0  // rows of x of an instruction
#define PIECE 64
#elif COLS % 32 == 0
#define PIECE 32
#else
#define PIECE 16
#endif
#define STAGE ((OUTPUTS + COLS) * 128)                          // bytes of a place in the ring
#define PITCH (OUTPUTS + 4)
#define NORMED (EPILOGUE == 1 || EPILOGUE == 3)

__device__ __forceinline__ unsigned at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// ---- barriers in shared memory ----

__device__ __forceinline__ void prepare(i64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void expect(i64* barrier, int bytes) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}" :: "r"(at(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await(i64* barrier, int phase) {
    asm volatile("{.reg .pred p; wait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra wait;}"
                 :: "r"(at(barrier)), "r"(phase) : "memory");
}
__device__ __forceinline__ void release(i64* barrier) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" :: "r"(at(barrier)) : "memory");
}
// all blocks of the cluster; what they have written to shared memory is seen
__device__ __forceinline__ void meet() {
    if (SPLIT > 1) asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- copies of a box of a matrix, whose map says its size ----

__device__ __forceinline__ void copy(char* to, const void* map, int k, int row, i64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(at(to)), "l"(map), "r"(k), "r"(row), "r"(at(barrier)) : "memory");
}

// ---- tensor cores ----

// rows of 128 bytes whose pieces of 16 are swapped as the copies leave them
__device__ __forceinline__ i64 describe(const char* tile) { return (1ll << 62) | (64ll << 32) | (1ll << 16) | (at(tile) >> 4); }

#define R4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define R8(i) R4(i), R4(i + 4)
__device__ __forceinline__ void mma_wide(float (&c)[PIECE / 2], i64 a, i64 b) {
#if PIECE == 16
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;"
                 : R8(0) : "l"(a), "l"(b));
#elif PIECE == 32
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, 1, 1, 1, 0, 0;" : R8(0), R8(8) : "l"(a), "l"(b));
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
                 : R8(0), R8(8), R8(16), R8(24) : "l"(a), "l"(b));
#endif
}

// What the copying thread does. x is read when the kernel before has written it.
__device__ __forceinline__ void bring(char* places, i64* full, i64* empty, const void* matrix, const void* x, int units, int first, int row) {
    for (int i = 0; i < min(units, DEPTH); i++) {
        expect(full + i, STAGE);
        copy(places + i * STAGE, matrix, (first + i) * 64, row, full + i);
    }
    wait_for_last();
    for (int i = 0; i < units; i++) {
        const int s = i % DEPTH;
        if (i >= DEPTH) {
            await(empty + s, (i / DEPTH - 1) % 2);
            expect(full + s, STAGE);
            copy(places + s * STAGE, matrix, (first + i) * 64, row, full + s);
        }
        copy(places + s * STAGE + OUTPUTS * 128, x, (first + i) * 64, 0, full + s);
    }
}

__device__ __forceinline__ void multiply(float (&sum)[COLS / PIECE][PIECE / 2], const char* places, i64* full, i64* empty, int units) {
    const i64 a = describe(places + threadIdx.x / 128 * 64 * 128), c = describe(places + OUTPUTS * 128);
    for (int i = 0; i < units; i++) {
        const int s = i % DEPTH;
        await(full + s, i / DEPTH % 2);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < 4; part++)
#pragma unroll
            for (int p = 0; p < COLS / PIECE; p++)
                mma_wide(sum[p], a + s * (STAGE / 16) + 2 * part, c + s * (STAGE / 16) + p * PIECE * 8 + 2 * part);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (i > 0 && threadIdx.x % 32 == 0) release(empty + (i - 1) % DEPTH);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// ---- what becomes of the sums ----

__device__ __forceinline__ void workers_meet() { asm volatile("bar.sync 1, %0;" :: "n"(WORKERS) : "memory"); }

// a block's sums, (COLS,PITCH) in its shared memory
__device__ __forceinline__ void put(float* tile, const float (&sum)[COLS / PIECE][PIECE / 2]) {
    const int lane = threadIdx.x % 32, output = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int p = 0; p < COLS / PIECE; p++)
#pragma unroll
        for (int e = 0; e < PIECE / 2; e++)
            tile[(p * PIECE + e / 4 * 8 + lane % 4 * 2 + e % 2) * PITCH + output + e / 2 % 2 * 8] = sum[p][e];
}

// 8 neighbours of the sums of all blocks of the cluster
__device__ __forceinline__ void total(float (&v)[8], const float* tile) {
    *(float4*)v = ((const float4*)tile)[0]; *(float4*)(v + 4) = ((const float4*)tile)[1];
#pragma unroll
    for (int other = 1; other < SPLIT; other++) {
        float w[8];
        const unsigned block = (blockIdx.y + other) % SPLIT;
        asm volatile("{.reg .b32 p; mapa.shared::cluster.u32 p, %8, %9; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [p]; ld.shared::cluster.v4.f32 {%4, %5, %6, %7}, [p + 16];}"
                     : "=f"(w[0]), "=f"(w[1]), "=f"(w[2]), "=f"(w[3]), "=f"(w[4]), "=f"(w[5]), "=f"(w[6]), "=f"(w[7]) : "r"(at(tile)), "r"(block));
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] += w[e];
    }
}

// 1 / rms of the block's rows of x, from `count` sums of squares each; 1 if there are none: x is normed already
__device__ __forceinline__ void norms(float* scale, const float* squares, i64 count, i64 m, float eps, i64 b) {
    const int c = threadIdx.x, row = min((i64)c, b - 1);
    if (c >= COLS) return;
    float v = 0;
#pragma unroll 16
    for (int i = 0; i < count; i++) v += squares[row * count + i];
    scale[c] = count ? rsqrtf(v / m + eps) : 1.f;
}

// The part of the sums that a thread works on: 8 neighbours of ITEMS rows.
#define ITEMS ((COLS / 16 + SPLIT - 1) / SPLIT)

struct Part {
    int rank, place;
    i64 output;

    __device__ __forceinline__ Part() : rank(SPLIT > 1 ? blockIdx.y : 0), place(threadIdx.x % (OUTPUTS / 8) * 8),
                                        output(blockIdx.x * (i64)OUTPUTS + place) {}
    __device__ __forceinline__ i64 at(int e) const { return (rank + e * SPLIT) * 16 + threadIdx.x / (OUTPUTS / 8); }
    // warps do not differ in the first
    __device__ __forceinline__ bool any(int e) const { return COLS / 16 % SPLIT == 0 || rank + e * SPLIT < COLS / 16; }
    __device__ __forceinline__ bool inside(int e, i64 b, i64 outputs) const { return any(e) && at(e) < b && output < outputs; }
};

// Arguments as those of `product`; matrix and x are maps of tensors, for copies of 64 of k and OUTPUTS or COLS rows.
extern "C" __global__ void __launch_bounds__(THREADS) __cluster_dims__(1, SPLIT, 1)
wide_product(const void* matrix, const void* x, i64 outputs, i64 k, i64 b, i64 units_of_slice, const b16* own_bias, float* squares,
             i64 count, i64 eps_bits, void* out, b16* more, b16* state, const b16* weight, const b16* bias, i64 limit) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ i64 full[DEPTH], empty[DEPTH];
    __shared__ float scale[COLS];
    let_next_start();
    const int row = blockIdx.x * OUTPUTS, first = blockIdx.y * (int)units_of_slice;
    const int units = max(0, min((int)units_of_slice, (int)(k / 64) - first));
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; i++) { prepare(full + i, 1); prepare(empty + i, WORKERS / 32); }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= WORKERS) {
        if (threadIdx.x == WORKERS) bring(memory, full, empty, matrix, x, units, first, row);
        __syncwarp();
        meet();
        meet();
        return;
    }
    const Part part;
    const i64 d = outputs / 2;
    const bool convolves = EPILOGUE == 1 && part.output < d;
    Convolution8 convolution;
    uint4 early[ITEMS][EPILOGUE == 2 && TAPS < 2 ? 2 : TAPS];  // what the epilogue needs: states, or the residual stream
    float biases[8] = {};
    if (convolves) {
        convolution.load(weight, bias, part.output);
#pragma unroll
        for (int e = 0; e < ITEMS; e++)
#pragma unroll
            for (int i = 0; i < TAPS - 1; i++)
                if (part.inside(e, b, outputs)) early[e][i] = ((const uint4*)(state + (part.at(e) * d + part.output) * (TAPS - 1)))[i];
    }
    if (own_bias && part.output < outputs)
#pragma unroll
        for (int i = 0; i < 8; i++) biases[i] = wide(own_bias[part.output + i]);
    wait_for_last();
    if (EPILOGUE == 2)
#pragma unroll
        for (int e = 0; e < ITEMS; e++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (part.inside(e, b, outputs)) early[e][i] = ((const uint4*)((const float*)out + part.at(e) * outputs + part.output))[i];
    if (NORMED) norms(scale, squares, count, k, __int_as_float((int)eps_bits), b);
    float sum[COLS / PIECE][PIECE / 2] = {};
    multiply(sum, memory, full, empty, units);
    workers_meet();
    put((float*)memory, sum);
    workers_meet();
    meet();
    __align__(16) float sums[ITEMS][8];
#pragma unroll
    for (int e = 0; e < ITEMS; e++)
        if (part.any(e)) total(sums[e], (float*)memory + part.at(e) * PITCH + part.place);
    if (SPLIT > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // no more reads of the others' sums
#pragma unroll
    for (int e = 0; e < ITEMS; e++) {
        if (!part.any(e)) break;
        const bool inside = part.inside(e, b, outputs);
        const i64 to = part.at(e) * outputs + part.output;
        __align__(16) b16 q[8];
        float (&v)[8] = sums[e];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = (NORMED ? v[i] * scale[part.at(e)] : v[i]) + biases[i];
        if (EPILOGUE == 3) {
            if (!inside) continue;
#pragma unroll
            for (int i = 0; i < 8; i++) if (part.output + i >= limit) v[i] = __int_as_float(0xff800000);
            ((float4*)((float*)out + to))[0] = *(float4*)v;
            ((float4*)((float*)out + to))[1] = *(float4*)(v + 4);
        } else if (EPILOGUE == 1) {
            if (!inside) continue;
#pragma unroll
            for (int i = 0; i < 8; i++) q[i] = narrow(v[i]);
            if (!convolves) { *(uint4*)((b16*)out + to) = *(uint4*)q; continue; }
            const i64 at = part.at(e) * d + part.output;
            *(uint4*)(more + at) = convolution.step(*(uint4(*)[TAPS])early[e], q);
#pragma unroll
            for (int i = 0; i < TAPS - 1; i++) ((uint4*)(state + at * (TAPS - 1)))[i] = early[e][i];
        } else {
            float square = 0;
            if (inside) {
                const float* before = (const float*)early[e];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    v[i] = rounded(v[i]) + before[i];
                    square += v[i] * v[i];
                    q[i] = narrow(v[i] * wide(weight[part.output + i]));
                }
                ((float4*)((float*)out + to))[0] = *(float4*)v;
                ((float4*)((float*)out + to))[1] = *(float4*)(v + 4);
                *(uint4*)(more + to) = *(uint4*)q;
            }
#pragma unroll
            for (int i = OUTPUTS / 16; i; i /= 2) square += __shfl_xor_sync(0xffffffffu, square, i);
            if (inside && part.place == 0) squares[part.at(e) * gridDim.x + blockIdx.x] = square;
        }
    }
    if (SPLIT > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // the others may still read this block's
}
