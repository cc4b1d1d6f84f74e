// A few rows times a matrix (outputs,k), which is read once, as fast as memory gives it.
//
// A block has ROWS = 16 MT outputs (rows of the matrix) and COLS = 8 NT rows of x, padded. Its warps share k in units of 64:
// each copies its own units of the matrix to its own ring of DEPTH places in shared memory, well ahead, the first before x is
// even there, and multiplies in the tensor cores; in the end the warps' sums are added.
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
#define AHEAD (NT <= 2)                // whether registers hold x of the next unit, too

struct Operands { const b16 *matrix, *x; i64 outputs, k, b, units; };

// x of a unit as the tensor cores want it: a lane holds 8 neighbours of k, of which an instruction takes 4, of the matrix too
__device__ __forceinline__ void load_x(uint4 (&v)[NT][2], const Operands& p, int column, int unit) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int c = column + 8 * i + g;
            v[i][h] = c < p.b ? *(const uint4*)(p.x + c * p.k + unit * 64 + h * 32 + t * 8) : make_uint4(0, 0, 0, 0);
        }
}

// rows of 128 bytes; every other one has its halves exchanged, so that reads hit all banks
__device__ __forceinline__ int place(int row, int chunk) { return row * 64 + (chunk ^ (row % 2 * 4)) * 8; }

__device__ __forceinline__ void fetch(b16* to, const Operands& p, i64 row, int unit) {
    const int lane = threadIdx.x % 32, chunk = lane % 8;
#pragma unroll
    for (int i = 0; i < ROWS / 4; i++) {
        const int r = lane / 8 + 4 * i;
        const bool inside = row + r < p.outputs;
        const b16* from = p.matrix + (row + (inside ? r : 0)) * p.k + unit * 64 + chunk * 8;
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                     :: "r"((unsigned)__cvta_generic_to_shared(to + place(r, chunk))), "l"(from), "r"(inside ? 16 : 0) : "memory");
    }
}

__device__ __forceinline__ void multiply(float (&sum)[MT][NT][4], const b16* tile, const uint4 (&x)[NT][2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < MT; j++) {
            const uint4 low = *(const uint4*)(tile + place(16 * j + g, 4 * h + t));
            const uint4 high = *(const uint4*)(tile + place(16 * j + g + 8, 4 * h + t));
#pragma unroll
            for (int i = 0; i < NT; i++) {
                mma(sum[j][i], low.x, high.x, low.y, high.y, x[i][h].x, x[i][h].y);
                mma(sum[j][i], low.z, high.z, low.w, high.w, x[i][h].z, x[i][h].w);
            }
        }
}

// The block's sums, (ROWS, COLS + 1) in shared memory for each warp.
__device__ __forceinline__ void walk(char* memory, const Operands& p, i64 row, int column) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.y * (int)p.units, last = min(first + (int)p.units, (int)(p.k / 64));
    b16* ring = (b16*)memory + warp * DEPTH * ROWS * 64;
#pragma unroll
    for (int s = 0; s < DEPTH - 1; s++) {
        const int unit = first + warp + s * WARPS;
        if (unit < last) fetch(ring + s * ROWS * 64, p, row, unit);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    wait_for_last();
    float sum[MT][NT][4] = {};
    uint4 x[NT][2], next[NT][2];
    if (AHEAD && first + warp < last) load_x(x, p, column, first + warp);
    int s = 0;
    for (int unit = first + warp; unit < last; unit += WARPS, s++) {
        if (!AHEAD) load_x(x, p, column, unit);
        if (AHEAD && unit + WARPS < last) load_x(next, p, column, unit + WARPS);
        asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 2) : "memory");
        __syncwarp();
        const int coming = unit + (DEPTH - 1) * WARPS;
        if (coming < last) fetch(ring + (s + DEPTH - 1) % DEPTH * ROWS * 64, p, row, coming);
        asm volatile("cp.async.commit_group;" ::: "memory");
        multiply(sum, ring + s % DEPTH * ROWS * 64, x);
        if (AHEAD) {
#pragma unroll
            for (int i = 0; i < NT; i++) { x[i][0] = next[i][0]; x[i][1] = next[i][1]; }
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    float* sums = (float*)memory + warp * ROWS * (COLS + 1);
#pragma unroll
    for (int j = 0; j < MT; j++)
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums[(16 * j + lane / 4 + e / 2 * 8) * (COLS + 1) + 8 * i + lane % 4 * 2 + e % 2] = sum[j][i][e];
    __syncthreads();
}

__device__ __forceinline__ float total_of(const char* memory, int row, int column) {
    float v = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) v += ((const float*)memory)[(warp * ROWS + row) * (COLS + 1) + column];
    return v;
}

// 1 / rms of the block's rows of x, from `count` sums of squares each, or 1 without any
__device__ __forceinline__ void norms(float* scale, const float* squares, i64 count, i64 m, float eps, int column, i64 b) {
    for (int c = threadIdx.x / 32; c < COLS && column + c < b; c += WARPS) {
        float v = 0;
        for (int i = threadIdx.x % 32; i < count; i += 32) v += squares[(column + c) * count + i];
#pragma unroll
        for (int k = 16; k; k /= 2) v += __shfl_xor_sync(0xffffffffu, v, k);
        if (threadIdx.x % 32 == 0) scale[c] = count ? rsqrtf(v / m + eps) : 1.f;
    }
    __syncthreads();
}

// For EPILOGUE 0: out (slice,b,outputs) float32. 1: out xz (b,2d), more xc (b,d), state conv (b,d,w-1), weight, bias of
// the convolution. 2: out the stream (b,m) float32, more x of the next norm, whose weight is `weight`. 3: out logits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
product(const b16* matrix, const b16* x, i64 outputs, i64 k, i64 b, i64 units, const b16* own_bias, float* squares, i64 count,
        i64 eps_bits, void* out, b16* more, b16* state, const b16* weight, const b16* bias, i64 limit) {
    extern __shared__ __align__(128) char memory[];
    __shared__ float scale[COLS];
    let_next_start();
    const Operands p = {matrix, x, outputs, k, b, units};
    const i64 row = blockIdx.x * (i64)ROWS;
    const int column = blockIdx.z * COLS;
    walk(memory, p, row, column);
    if (EPILOGUE == 1 || EPILOGUE == 3) norms(scale, squares, count, k, __int_as_float((int)eps_bits), column, b);
#pragma unroll 1
    for (int o = threadIdx.x; o < ROWS * COLS; o += THREADS) {
        const int r = o % ROWS, c = o / ROWS;
        const i64 output = row + r, at = column + c;
        const bool inside = output < outputs && at < b;
        float v = inside ? total_of(memory, r, c) : 0.f;
        if (EPILOGUE == 0) {
            if (inside) ((float*)out)[(blockIdx.y * b + at) * outputs + output] = v;
        } else if (EPILOGUE == 1) {
            if (!inside) continue;
            v *= scale[c];
            if (own_bias) v += wide(own_bias[output]);
            const i64 d = outputs / 2;
            if (output >= d) ((b16*)out)[at * outputs + output] = narrow(v);
            else more[at * d + output] = narrow(convolve(state + (at * d + output) * (TAPS - 1), weight, bias, output, narrow(v)));
        } else if (EPILOGUE == 2) {
            if (inside) {
                if (own_bias) v += wide(own_bias[output]);
                float* stream = (float*)out + at * outputs + output;
                v = rounded(v) + *stream;
                *stream = v;
                more[at * outputs + output] = narrow(v * wide(weight[output]));
            }
            float square = v * v;
#pragma unroll
            for (int e = GRAIN / 2; e; e /= 2) square += __shfl_xor_sync(0xffffffffu, square, e);
            if (inside && r % GRAIN == 0) squares[at * (outputs / GRAIN) + output / GRAIN] = square;
        } else if (inside) {
            ((float*)out)[at * outputs + output] = output < limit ? v * scale[c] : __int_as_float(0xff800000);
        }
    }
}
