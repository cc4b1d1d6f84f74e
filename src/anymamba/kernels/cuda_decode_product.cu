// A few rows times a matrix (outputs,k), which is read once, as fast as memory gives it.
//
// A block has ROWS = 16 MT outputs (rows of the matrix) and COLS = 8 NT rows of x, padded. Its warps share k in units of
// 64: each copies its own units of both to its own ring of DEPTH places in shared memory, well ahead, the matrix before x
// is even there, and multiplies in the tensor cores; in the end the warps' sums are added.
//
// EPILOGUE 0: sums as they are, (slice,b,outputs): the grid's second axis cuts k into slices.
//          1: [x; z] of a block: scaled by the norm of the row, x convolved.
//          2: what a block adds to the residual stream: the new stream, and what the next norm needs of it.
//          3: logits, scaled by the norm of the row.
#include "cuda_decode.cuh"

#define ROWS (16 * MT)
#define COLS (8 * NT)
#define THREADS (32 * WARPS)
#define GRAIN (ROWS < 32 ? ROWS : 32)  // outputs whose squares are summed together
#define EACH ((ROWS * COLS + THREADS - 1) / THREADS)
#define EARLY (EACH <= 2)              // whether registers hold what the epilogue needs from the start
#define PLACE ((ROWS + COLS) * 64)     // elements of a place in the ring
#define NORMED (EPILOGUE == 1 || EPILOGUE == 3)

struct Operands { const b16 *matrix, *x; i64 outputs, k, b, units; };

// rows of 128 bytes; every other one has its halves exchanged, so that reads hit all banks
__device__ __forceinline__ int place(int row, int chunk) { return row * 64 + (chunk ^ (row % 2 * 4)) * 8; }

// COUNT rows of a unit, in the background; those from `end` on become 0
template <int COUNT> __device__ __forceinline__ void fetch(b16* to, const b16* from, i64 row, i64 end, i64 k, int unit) {
    const int lane = threadIdx.x % 32, chunk = lane % 8;
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
        const int r = lane / 8 + 4 * i;
        const bool inside = row + r < end;
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                     :: "r"((unsigned)__cvta_generic_to_shared(to + place(r, chunk))),
                        "l"(from + (row + (inside ? r : 0)) * k + unit * 64 + chunk * 8), "r"(inside ? 16 : 0) : "memory");
    }
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// A lane holds 8 neighbours of k, of which an instruction takes 4: the order is the same for matrix and x.
__device__ __forceinline__ void multiply(float (&sum)[MT][NT][4], const b16* tile) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 x[NT];
#pragma unroll
        for (int i = 0; i < NT; i++) x[i] = *(const uint4*)(tile + place(ROWS + 8 * i + g, 4 * half + t));
#pragma unroll
        for (int j = 0; j < MT; j++) {
            const uint4 low = *(const uint4*)(tile + place(16 * j + g, 4 * half + t));
            const uint4 high = *(const uint4*)(tile + place(16 * j + g + 8, 4 * half + t));
#pragma unroll
            for (int i = 0; i < NT; i++) {
                mma(sum[j][i], low.x, high.x, low.y, high.y, x[i].x, x[i].y);
                mma(sum[j][i], low.z, high.z, low.w, high.w, x[i].z, x[i].w);
            }
        }
    }
}

// ---- the walk over k ----

struct Walk {
    const Operands& p;
    b16* ring;
    i64 row;
    int column, first, last;

    __device__ __forceinline__ Walk(const Operands& operands, char* memory) : p(operands) {
        row = blockIdx.x * (i64)ROWS;
        column = blockIdx.z * COLS;
        first = blockIdx.y * (int)p.units + threadIdx.x / 32;
        last = min((int)((blockIdx.y + 1) * p.units), (int)(p.k / 64));
        ring = (b16*)memory + threadIdx.x / 32 * DEPTH * PLACE;
    }

    __device__ __forceinline__ void matrix(int s) {
        if (first + s * WARPS < last) fetch<ROWS>(ring + s % DEPTH * PLACE, p.matrix, row, p.outputs, p.k, first + s * WARPS);
    }
    __device__ __forceinline__ void x(int s) {
        if (first + s * WARPS < last) fetch<COLS>(ring + s % DEPTH * PLACE + ROWS * 64, p.x, column, p.b, p.k, first + s * WARPS);
    }

    // the first copies
    __device__ __forceinline__ void begin_matrix() {
#pragma unroll
        for (int s = 0; s < DEPTH - 1; s++) { matrix(s); commit(); }
    }
    __device__ __forceinline__ void begin_x() {
#pragma unroll
        for (int s = 0; s < DEPTH - 1; s++) { x(s); commit(); }
    }

    __device__ __forceinline__ void run(float (&sum)[MT][NT][4]) {
        for (int s = 0; first + s * WARPS < last; s++) {
            asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 2) : "memory");
            __syncwarp();
            matrix(s + DEPTH - 1);
            x(s + DEPTH - 1);
            commit();
            multiply(sum, ring + s % DEPTH * PLACE);
        }
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
};

// The warps' sums side by side in shared memory, (ROWS, COLS + 1) each.
__device__ __forceinline__ void put(float* sums, const float (&sum)[MT][NT][4]) {
    const int lane = threadIdx.x % 32;
    sums += threadIdx.x / 32 * ROWS * (COLS + 1);
#pragma unroll
    for (int j = 0; j < MT; j++)
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums[(16 * j + lane / 4 + e / 2 * 8) * (COLS + 1) + 8 * i + lane % 4 * 2 + e % 2] = sum[j][i][e];
}

__device__ __forceinline__ float total_of(const float* sums, int row, int column) {
    float v = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) v += sums[(warp * ROWS + row) * (COLS + 1) + column];
    return v;
}

// 1 / rms of the block's rows of x, from `count` sums of squares each; 1 if there are none: x is normed already
__device__ __forceinline__ void norms(float* scale, const float* squares, i64 count, i64 m, float eps, int column, i64 b) {
    for (int c = threadIdx.x / 32; c < COLS && column + c < b; c += WARPS) {
        float v = 0;
#pragma unroll 5
        for (int i = threadIdx.x % 32; i < count; i += 32) v += squares[(column + c) * count + i];
#pragma unroll
        for (int k = 16; k; k /= 2) v += __shfl_xor_sync(0xffffffffu, v, k);
        if (threadIdx.x % 32 == 0) scale[c] = count ? rsqrtf(v / m + eps) : 1.f;
    }
}

// For EPILOGUE 0: out (slice,b,outputs) float32. 1: out xz (b,2d), more xc (b,d), state conv (b,d,w-1), weight, bias of
// the convolution. 2: out the stream (b,m) float32, more x of the next norm, whose weight is `weight`. 3: out logits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
product(const b16* matrix, const b16* x_in, i64 outputs, i64 k, i64 b, i64 units, const b16* own_bias, float* squares,
        i64 count, i64 eps_bits, void* out, b16* more, b16* state, const b16* weight, const b16* bias, i64 limit) {
    extern __shared__ __align__(128) char memory[];
    __shared__ float scale[COLS];
    let_next_start();
    const Operands p = {matrix, x_in, outputs, k, b, units};
    Walk walk(p, memory);
    walk.begin_matrix();
    const i64 d = outputs / 2;
    const bool convolves = EPILOGUE == 1 && walk.row < d;
    Convolution convolution[EARLY ? EACH : 1];
    float before[EARLY ? EACH : 1];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int o = threadIdx.x + e * THREADS;
        const i64 output = walk.row + o % ROWS, at = walk.column + o / ROWS;
        if (EARLY && convolves && at < b && o < ROWS * COLS)
            convolution[e].load(state + (at * d + output) * (TAPS - 1), weight, bias, output);
    }
    wait_for_last();
    walk.begin_x();
    float sum[MT][NT][4] = {};
    if (EPILOGUE == 2 && EARLY) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int o = threadIdx.x + e * THREADS;
            const i64 output = walk.row + o % ROWS, at = walk.column + o / ROWS;
            if (output < outputs && at < b && o < ROWS * COLS) before[e] = ((const float*)out)[at * outputs + output];
        }
    }
    if (NORMED) norms(scale, squares, count, k, __int_as_float((int)eps_bits), walk.column, b);
    walk.run(sum);
    __syncthreads();
    put((float*)memory, sum);
    __syncthreads();
#pragma unroll(EARLY ? EACH : 1)
    for (int e = 0; e < EACH; e++) {
        const int o = threadIdx.x + e * THREADS, r = o % ROWS, c = o / ROWS;
        if (ROWS * COLS % THREADS && o >= ROWS * COLS) break;
        const i64 output = walk.row + r, at = walk.column + c;
        const bool inside = output < outputs && at < b;
        float v = inside ? total_of((float*)memory, r, c) : 0.f;
        if (EPILOGUE == 0) {
            if (inside) ((float*)out)[(blockIdx.y * b + at) * outputs + output] = v;
        } else if (EPILOGUE == 1) {
            if (!inside) continue;
            v *= scale[c];
            if (own_bias) v += wide(own_bias[output]);
            b16* last = state + (at * d + output) * (TAPS - 1);
            if (convolves && !EARLY) convolution[0].load(last, weight, bias, output);
            if (convolves) more[at * d + output] = narrow(convolution[EARLY ? e : 0].step(last, narrow(v)));
            else ((b16*)out)[at * outputs + output] = narrow(v);
        } else if (EPILOGUE == 2) {
            if (inside) {
                if (own_bias) v += wide(own_bias[output]);
                float* stream = (float*)out + at * outputs + output;
                v = rounded(v) + (EARLY ? before[e] : *stream);
                *stream = v;
                more[at * outputs + output] = narrow(v * wide(weight[output]));
            }
            float square = v * v;
#pragma unroll
            for (int i = GRAIN / 2; i; i /= 2) square += __shfl_xor_sync(0xffffffffu, square, i);
            if (inside && r % GRAIN == 0) squares[at * (outputs / GRAIN) + output / GRAIN] = square;
        } else if (inside) {
            ((float*)out)[at * outputs + output] = output < limit ? v * scale[c] : __int_as_float(0xff800000);
        }
    }
}
