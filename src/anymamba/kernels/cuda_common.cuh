// What the scan kernels share: number types, fast functions, tiles in shared memory, sums over lanes.
//
// A channel's state of NP = K * L numbers (N of them real) lies in L lanes, K in each one's registers. A block has CB
// channels. Every parameter of a kernel is 8 bytes wide. The macros in capitals are given by cuda_scan.py, one
// compilation for each set of them.

typedef long long i64;

#define NP (K * L)
#define NT (CB * L)
#define WARPS (NT / 32)
#define V (K < 4 ? K : 4)          // states that one load brings
#define U (T < (L > 8 ? L : 8) ? T : (L > 8 ? L : 8))  // steps whose sums over lanes are made together
#define OWN ((T + L - 1) / L)      // steps of a tile that a lane finishes: i * L + j

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rcp(float v) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float two_to(int k) { return __int_as_float((127 + k) << 23); }

// Decays come doubled. Just below 0, where the decays lie that last, ex2.approx is 2e-8 too small on average, and that
// adds up over a state's memory; with the argument raised by one it is as good as CUDA's expf, which does the same. So
// what walks over the steps of a tile doubles at each: after step s it is 2^(s + 1) times the state, the inputs are
// scaled alike when they are made ready, and one product a tile takes it back.
__device__ __forceinline__ float twice_decay(float step, float a) { return ex2(fmaf(step, a, 1.f)); }

// What a step does, by RULE: 0 Mamba's own, 1 zero-order hold, 2 bilinear, 3 Euler: h' = decay h + q B x. With another rule
// than Mamba's the step size is in q = step p, and decay = 1 + z p, where z = step a.
struct Step {
    float twice;  // the decay, doubled
    float q;
    float in_z;   // derivative of the decay in z, and of q in the step
    float in_a;   // derivative of q in a
};

#define UNIT (RULE ? 1.f : 1.44269504f)  // of what `a` holds times A: exp(v) = 2^(v log2 e)

__device__ __forceinline__ Step step_of(float step, float a, float inverse) {  // inverse: 1 / a, for RULE 1
    if (RULE == 0) return {twice_decay(step, a), 1.f, 0.f, 0.f};
    const float z = step * a;
    if (RULE == 1) {
        // f = (p - 1) / z by its series near 0: nothing cancels there, and no decay near 1 has the bias of ex2.approx
        float f = 2.48015873e-5f;
        f = fmaf(f, z, 1.98412698e-4f); f = fmaf(f, z, 1.38888889e-3f); f = fmaf(f, z, 8.33333333e-3f);
        f = fmaf(f, z, 4.16666667e-2f); f = fmaf(f, z, 1.66666667e-1f); f = fmaf(f, z, 0.5f);
        const bool near = fabsf(z) < 0.5f;
        const float e = ex2(1.44269504f * z), p = fmaf(z, f, 1.f);
        const float decay = near ? fmaf(z, p, 1.f) : e, q = near ? step * p : (e - 1.f) * inverse;
        return {2.f * decay, q, decay, near ? step * step * (p - f) : fmaf(step, e, -q) * inverse};
    }
    if (RULE == 2) {
        const float y = fmaf(-0.5f, z, 1.f), rough = rcp(y), p = fmaf(rough, fmaf(-y, rough, 1.f), rough), q = step * p;
        return {fmaf(2.f * z, p, 2.f), q, p * p, 0.5f * q * q};
    }
    return {fmaf(2.f, z, 2.f), step, 1.f, 0.f};
}

// float32 inputs deserve the slower functions of CUDA's library; 16-bit inputs are coarser than these are wrong
__device__ __forceinline__ float sigmoid(float v) {
    return XTYPE == 0 ? 1.f / (1.f + expf(-v)) : rcp(1.f + ex2(-1.44269504f * v));
}

// log(1 + e^v) = max(v, 0) + log1p(e^-|v|): exact in relative terms where it is small, as step sizes are
__device__ __forceinline__ float softplus(float v) {
    if (XTYPE == 0) return v > 20.f ? v : log1pf(expf(v));
    float e = ex2(-1.44269504f * fabsf(v)), p = 5.253457930e-03f;  // polynomial fitted on [0, 1], error 2e-7
    p = fmaf(p, e, -2.958850749e-02f); p = fmaf(p, e, 7.836166769e-02f); p = fmaf(p, e, -1.367477030e-01f);
    p = fmaf(p, e, 1.911143064e-01f); p = fmaf(p, e, -2.484436929e-01f); p = fmaf(p, e, 3.331927061e-01f);
    p = fmaf(p, e, -4.999950230e-01f); p = fmaf(p, e, 1.f);
    return fmaxf(v, 0.f) + p * e;
}

// ---- numbers in memory: 0 float32, 1 bfloat16, 2 float16 ----

template <int TYPE> struct Number;
template <> struct Number<0> {
    typedef float type;
    static __device__ __forceinline__ float get(float v) { return v; }
    static __device__ __forceinline__ float put(float v) { return v; }
};
template <> struct Number<1> {
    typedef unsigned short type;
    static __device__ __forceinline__ float get(unsigned short v) { return __uint_as_float((unsigned)v << 16); }
    static __device__ __forceinline__ unsigned short put(float v) {
        unsigned short r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r;
    }
};
template <> struct Number<2> {
    typedef unsigned short type;
    static __device__ __forceinline__ float get(unsigned short v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v)); return r; }
    static __device__ __forceinline__ unsigned short put(float v) {
        unsigned short r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r;
    }
};
typedef Number<XTYPE> XN;
typedef XN::type X;
typedef Number<BTYPE> BN;
typedef Number<CTYPE> CN;

// ---- tiles: rows of time steps, columns of channels or states ----

#define TURNS(items) (((items) + NT - 1) / NT)             // in which the block's threads take that many items
#define PITCH(columns, type) ((((columns) * (int)sizeof(type) + 15) / 16) * 16 + 16)  // bytes a row; 16 more spread the banks

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Bring a tile from global memory; what lies outside `rows` and `columns` becomes 0. In the background if ASYNC.
template <class E, int ROWS, int COLUMNS, bool ASYNC>
__device__ __forceinline__ void load_tile(char* tile, const E* from, int stride, int rows, int columns) {
    constexpr int pitch = PITCH(COLUMNS, E);
    if (ASYNC) {
        constexpr int wide = 16 / sizeof(E), per_row = (COLUMNS + wide - 1) / wide;
#pragma unroll
        for (int turn = 0; turn < TURNS(ROWS * per_row); turn++) {
            int i = turn * NT + threadIdx.x, r = i / per_row, c = i % per_row * wide;
            if (ROWS * per_row % NT && i >= ROWS * per_row) break;
            bool inside = r < rows && c < columns;
            const E* source = from + (i64)r * stride + c;  // not read from if outside
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(shared_address(tile + r * pitch + c * sizeof(E))), "l"(source), "r"(inside ? 16 : 0) : "memory");
        }
    } else {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * COLUMNS; i += NT) {
            int r = i / COLUMNS, c = i % COLUMNS;
            ((E*)(tile + r * pitch))[c] = r < rows && c < columns ? from[(i64)r * stride + c] : (E)0;
        }
    }
}

template <class E, int ROWS, int COLUMNS, bool VECTOR>
__device__ __forceinline__ void store_tile(E* to, int stride, const char* tile, int rows, int columns) {
    constexpr int pitch = PITCH(COLUMNS, E), wide = VECTOR ? 16 / sizeof(E) : 1, per_row = COLUMNS / wide;
#pragma unroll
    for (int turn = 0; turn < TURNS(ROWS * per_row); turn++) {
        int i = turn * NT + threadIdx.x, r = i / per_row, c = i % per_row * wide;
        if (ROWS * per_row % NT && i >= ROWS * per_row) break;
        if (r < rows && c < columns) {
            if (VECTOR) *(uint4*)(to + (i64)r * stride + c) = *(const uint4*)(tile + r * pitch + c * sizeof(E));
            else to[(i64)r * stride + c] = ((const E*)(tile + r * pitch))[c];
        }
    }
}

template <class E> __device__ __forceinline__ E& at(char* tile, int row, int column) {
    return ((E*)(tile + row * PITCH(CB, E)))[column];
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// A tile of B or C to float32, columns padded with 0 from N to NP; V states of one step lie together, then the steps:
// so 16 bytes are V states of STEPS steps.
#define STEPS (4 / V)
#define MATRIX(rows) ((rows) * V + 4)  // pitch of the V states of `rows` steps

template <class NUMBER, int ROWS> __device__ __forceinline__ void widen(float* out, const char* tile) {
    typedef typename NUMBER::type E;
#pragma unroll
    for (int turn = 0; turn < TURNS(ROWS * NP); turn++) {
        int i = turn * NT + threadIdx.x, r = i / NP, n = i % NP;
        if (ROWS * NP % NT && i >= ROWS * NP) break;
        out[n / V * MATRIX(ROWS) + r * V + n % V] = n < N ? NUMBER::get(((const E*)(tile + r * PITCH(N, E)))[n]) : 0.f;
    }
}

// STEPS steps of a lane's states of B or C: v[i][k] of step row + i
template <int ROWS> __device__ __forceinline__ void read_matrix(float (&v)[STEPS][K], const float* matrix, int row, int j) {
#pragma unroll
    for (int k = 0; k < K; k += V) {
        const float4 q = *(const float4*)(matrix + (k / V * L + j) * MATRIX(ROWS) + row * V);
        const float p[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int e = 0; e < 4; e++) v[e / V][k + e % V] = p[e];
    }
}

// ---- a lane's K states of NP ----

// Which of the L lanes of a channel a lane is, and of which channel of the block; LOW neighbours are of different ones.
// Where lanes i and i ^ 1, or i and i ^ 2, all read the same 16 bytes of shared memory, a warp takes 2 clocks, else 4. With
// LOW = 2 the former share B and C, and the latter what belongs to a channel; with two lanes a channel so they do anyhow.
#define NEIGHBOURS (L == 2 ? 1 : 2)  // LOW of the forward walks
template <int LOW> __device__ __forceinline__ int lane_of_channel() { return threadIdx.x % 32 / LOW % L; }
template <int LOW> __device__ __forceinline__ int channel_of_lane() {
    return threadIdx.x / 32 * (32 / L) + threadIdx.x % 32 / (LOW * L) * LOW + threadIdx.x % LOW;
}

__device__ __forceinline__ int state_index(int k, int j) { return k / V * V * L + j * V + k % V; }

__device__ __forceinline__ void read_states(float (&v)[K], const float* row, int j) {
#pragma unroll
    for (int k = 0; k < K; k += V) {
        const float* p = row + state_index(k, j);
        if (V == 4) { float4 q = *(const float4*)p; v[k] = q.x; v[k + (V > 1)] = q.y; v[k + (V > 2) * 2] = q.z; v[k + (V > 3) * 3] = q.w; }
        else if (V == 2) { float2 q = *(const float2*)p; v[k] = q.x; v[k + (V > 1)] = q.y; }
        else v[k] = *p;
    }
}

__device__ __forceinline__ void write_states(float* row, const float (&v)[K], int j) {
#pragma unroll
    for (int k = 0; k < K; k += V) {
        float* p = row + state_index(k, j);
        if (V == 4) *(float4*)p = make_float4(v[k], v[k + (V > 1)], v[k + (V > 2) * 2], v[k + (V > 3) * 3]);
        else if (V == 2) *(float2*)p = make_float2(v[k], v[k + (V > 1)]);
        else *p = v[k];
    }
}

// rows of N numbers without padding, as the caller has them
__device__ __forceinline__ void read_real(float (&v)[K], const float* row, int j) {
#pragma unroll
    for (int k = 0; k < K; k++) v[k] = state_index(k, j) < N ? row[state_index(k, j)] : 0.f;
}

__device__ __forceinline__ void write_real(float* row, const float (&v)[K], int j) {
#pragma unroll
    for (int k = 0; k < K; k++) if (state_index(k, j) < N) row[state_index(k, j)] = v[k];
}

// the same of a constant B or C in its own type
template <class NUMBER> __device__ __forceinline__ void read_fixed(float (&v)[K], const typename NUMBER::type* row, int j) {
#pragma unroll
    for (int k = 0; k < K; k++) v[k] = state_index(k, j) < N ? NUMBER::get(row[state_index(k, j)]) : 0.f;
}

// ---- sums over lanes ----

// Sum each of COUNT values over the lanes whose numbers differ in the LEVELS bits from FIRST on. At each level a lane
// keeps half of its values and gives the other half away, so that all sums together take about COUNT shuffles, not
// COUNT * LEVELS. In the end v[i] of the lane with bits j is the sum of value i * 2^LEVELS + j (mod COUNT).
template <int COUNT, int LEVELS, int FIRST, int SIZE> __device__ __forceinline__ void sum_lanes(float (&v)[SIZE], int lane) {
    if constexpr (LEVELS > 0) {
        if constexpr (COUNT > 1) {
            const bool odd = lane & FIRST;
#pragma unroll
            for (int i = 0; i < COUNT / 2; i++) {
                float give = odd ? v[2 * i] : v[2 * i + 1], keep = odd ? v[2 * i + 1] : v[2 * i];
                v[i] = keep + __shfl_xor_sync(0xffffffffu, give, FIRST);
            }
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], FIRST);
        }
        sum_lanes<(COUNT + 1) / 2, LEVELS - 1, FIRST * 2>(v, lane);
    }
}

__device__ constexpr int log2_of(int v) { return v <= 1 ? 0 : 1 + log2_of(v / 2); }

// ---- which piece of the work a block has ----

struct Piece {
    i64 row, first, token;  // row of the batch, first step in it, the same counted over all rows
    int length, channel, channels, group;
    i64 slot;               // of the first state saved
};

// sequences: rows of t steps, each cut into `pieces` of `step` steps; or those that `ends` packs into one row
__device__ __forceinline__ Piece piece_of(const void* ends, i64 t, i64 d, i64 groups, i64 pieces, i64 step) {
    Piece p;
    const int per_group = (int)(d / groups), blocks = (per_group + CB - 1) / CB;
    const int block = blockIdx.x % (blocks * (int)groups);
    const i64 s = blockIdx.x / (blocks * (int)groups);
    p.group = block / blocks;
    p.channel = p.group * per_group + block % blocks * CB;
    p.channels = min(CB, per_group - block % blocks * CB);
    if (PACKED) {
        i64 first = PACKED == 4 ? ((const int*)ends)[s] : ((const i64*)ends)[s];
        i64 last = PACKED == 4 ? ((const int*)ends)[s + 1] : ((const i64*)ends)[s + 1];
        p.row = 0; p.first = p.token = first; p.length = (int)(last - first);
        p.slot = first / CHUNK + s;
    } else {
        p.row = s / pieces; p.first = s % pieces * step; p.token = p.row * t + p.first;
        p.length = (int)min(step, t - p.first);
        p.slot = p.row * t / CHUNK + p.row + p.first / CHUNK;
    }
    return p;
}
