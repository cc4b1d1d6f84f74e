// Selective scan, backward: chunks of CHUNK steps from last to first. See cuda_scan.cu for tiles and lanes.
//
// Of a chunk, forward saved the state before its first step. Within a chunk, parts of T steps from last to first:
// walk forward and keep the T states in registers, then walk back with the gradient of the state. Where a chunk has
// several parts, a first walk finds the states between them.
//
// Both walks double with each step (`twice_decay`): after step s of a part the state is 2^(s + 1) times itself, before it
// its gradient 2^(T - s) times, so that the products of the two are all 2^T times what they should be.
#include "cuda_common.cuh"

#define PARTS (CHUNK / T)
#define SUMS ((BCONST ? 0 : K) + (CCONST ? 0 : K))  // sums over channels that a lane begins at each step
#define WIDTH ((BCONST ? 0 : NP) + (CCONST ? 0 : NP))
#define CHANNELS (32 / L)                           // of a warp
#define SHARE (CHANNELS < SUMS ? CHANNELS : SUMS)   // lanes among which those sums end up
#define AT_C (BCONST ? 0 : NP)
#define TENSOR (XTYPE != 0 && SUMS && K > 1 && L > 1 && L <= 8)  // 16-bit gradients: the sums over channels by tensor cores
#define LOW (TENSOR ? 4 : 1)                        // neighbouring lanes of different channels
#define ROWS (TENSOR ? WARPS * CHANNELS / 4 : WARPS)
#define SPACE (T + 2)                                // pitch of the sums of one state over time

// d += a (16 x 8: rows g and g + 8, columns q and q + 4, where g = lane / 4 and q = lane % 4) times b (8 x 8: rows q and
// q + 4, column g), in tf32
__device__ __forceinline__ void tensor_sum(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// to tf32's 10 bits; bfloat16 results need no more than what the tensor cores cut off by themselves
__device__ __forceinline__ float rounded(float v) {
    if (XTYPE == 1) return v;
    unsigned r; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v)); return __uint_as_float(r);
}

struct Tiles {
    static constexpr int x = PITCH(CB, X) * CHUNK;
    static constexpr int B = BCONST ? 0 : PITCH(N, BN::type) * CHUNK, C = CCONST ? 0 : PITCH(N, CN::type) * CHUNK;
    static constexpr int dt = x, dy = 2 * x, z = 3 * x, b = (HAS_Z ? 4 : 3) * x, c = b + B, bytes = c + C;
};
struct Shared {
    char raw[2][Tiles::bytes];      // inputs; dx, ddt and dz take the places of x, dt and z
    float4 ready[CB][CHUNK + 1];    // step size, input as in forward, gradient before the gate (doubled), softplus'
    float B[BCONST ? 4 : NP / V * MATRIX(CHUNK)], C[CCONST ? 4 : NP / V * MATRIX(CHUNK)];
    float sums[WIDTH ? ROWS * WIDTH * SPACE : 4];
    float between[PARTS > 1 ? (PARTS - 1) * NT * K : 4];
};

static_assert(sizeof(Shared) <= SHARED, "more shared memory than the host gives");

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) scan_backward(
    const X* x, i64 x_row, i64 x_step, const X* dt, i64 dt_row, i64 dt_step, const X* z, i64 z_row, i64 z_step,
    const X* dy, i64 dy_row, i64 dy_step,
    const float* A, const BN::type* B, i64 B_row, i64 B_step, i64 B_group,
    const CN::type* C, i64 C_row, i64 C_step, i64 C_group, const float* D, const float* bias,
    const float* dfinal, const void* ends, const float* saved,
    X* dx, X* ddt, X* dz, i64 dx_step, i64 dz_step, float* dA, float* dB_fixed, float* dC_fixed, float* partial, float* dD, float* dbias, float* dinitial,
    i64 t, i64 d, i64 groups, i64 pieces, i64 piece, i64 tokens) {
    extern __shared__ __align__(16) char memory[];
    Shared& sm = *(Shared*)memory;
    const Piece p = piece_of(ends, t, d, groups, pieces, piece);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, j = lane_of_channel<LOW>(), c = channel_of_lane<LOW>();
    const int channel = p.channel + c, blocks = (int)((d / groups + CB - 1) / CB * groups);
    const bool real = c < p.channels;
    const i64 sequence = blockIdx.x / blocks, place = (sequence * d + channel) * N;

    x += p.row * x_row + p.first * x_step + p.channel;
    dt += p.row * dt_row + p.first * dt_step + p.channel;
    dy += p.row * dy_row + p.first * dy_step + p.channel;
    if (HAS_Z) { z += p.row * z_row + p.first * z_step + p.channel; dz += p.token * dz_step + p.channel; }
    dx += p.token * dx_step + p.channel;
    ddt += p.token * d + p.channel;
    if (!BCONST) B += p.row * B_row + p.first * B_step + p.group * B_group;
    if (!CCONST) C += p.row * C_row + p.first * C_step + p.group * C_group;
    saved += (p.slot * d + channel) * NP;
    constexpr int width = (BCONST ? 0 : N) + (CCONST ? 0 : N);
    partial += (blockIdx.x % blocks * tokens + p.token) * width;

    float a[K] = {}, g[K] = {}, dA_sum[K] = {}, dB_sum[K] = {}, dC_sum[K] = {}, fixed_B[K] = {}, fixed_C[K] = {};
    float inverse[K];
    if (real) {
        read_real(a, A + (i64)channel * N, j);
        if (dfinal) read_real(g, dfinal + place, j);
#pragma unroll
        for (int k = 0; k < K; k++) if (state_index(k, j) < N) {
            if (BCONST) fixed_B[k] = BN::get(B[(i64)channel * N + state_index(k, j)]);
            if (CCONST) fixed_C[k] = CN::get(C[(i64)channel * N + state_index(k, j)]);
        }
    }
#pragma unroll
    for (int k = 0; k < K; k++) { a[k] *= UNIT; inverse[k] = 1.f / a[k]; }
    const float skip = real && D ? D[channel] : 0.f, shift = real && bias ? bias[channel] : 0.f;
    float dD_sum = 0.f, dbias_sum = 0.f;

    const int chunks = (p.length + CHUNK - 1) / CHUNK;
    auto fetch = [&](int chunk) {
        char* raw = sm.raw[chunk & 1];
        const int rows = p.length - chunk * CHUNK;
        load_tile<X, CHUNK, CB, WIDE>(raw, x + (i64)chunk * CHUNK * x_step, x_step, rows, p.channels);
        load_tile<X, CHUNK, CB, WIDE>(raw + Tiles::dt, dt + (i64)chunk * CHUNK * dt_step, dt_step, rows, p.channels);
        load_tile<X, CHUNK, CB, WIDE>(raw + Tiles::dy, dy + (i64)chunk * CHUNK * dy_step, dy_step, rows, p.channels);
        if (HAS_Z) load_tile<X, CHUNK, CB, WIDE>(raw + Tiles::z, z + (i64)chunk * CHUNK * z_step, z_step, rows, p.channels);
        if (!BCONST) load_tile<BN::type, CHUNK, N, WIDE_BC>(raw + Tiles::b, B + (i64)chunk * CHUNK * B_step, B_step, rows, N);
        if (!CCONST) load_tile<CN::type, CHUNK, N, WIDE_BC>(raw + Tiles::c, C + (i64)chunk * CHUNK * C_step, C_step, rows, N);
        commit();
    };

    // Sums over channels of K values times the channel's factor, of two steps. A row is a state of four channels; the
    // factors of these, at a step, are one column, and zero at other steps: L columns for each four channels, so L steps
    // fill a matrix. Of a row, the columns that belong to other channels are meaningless.
    auto tensor_add = [&](auto& matrix, const auto& even, const auto& odd, float factor_even, float factor_odd, int s,
                          bool first, bool last, int place) {
        const float b0 = j == s % L ? rounded(factor_even) : 0.f, b1 = j == s % L + 1 ? rounded(factor_odd) : 0.f;
#pragma unroll
        for (int m = 0; m < K / 2; m++) {
            const float a[4] = {rounded(even[2 * m]), rounded(even[2 * m + 1]), rounded(odd[2 * m]), rounded(odd[2 * m + 1])};
            if (first) matrix[m][0] = matrix[m][1] = matrix[m][2] = matrix[m][3] = 0.f;
            tensor_sum(matrix[m], a, b0, b1);
            if (last) {
                if (lane % 4 * 2 / L != lane / (4 * L)) continue;
                float* to = sm.sums + ((warp * (CHANNELS / 4) + lane / (4 * L)) * WIDTH + place) * SPACE + s / L * L + lane % 4 * 2 % L;
                *(float2*)(to + state_index(2 * m, j) * SPACE) = make_float2(matrix[m][0], matrix[m][1]);
                *(float2*)(to + state_index(2 * m + 1, j) * SPACE) = make_float2(matrix[m][2], matrix[m][3]);
            }
        }
    };
    auto prepare = [&](int chunk) {
        char* raw = sm.raw[chunk & 1];
        const int rows = p.length - chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < (CHUNK + L - 1) / L; i++) {
            const int s = i * L + j;
            if (CHUNK % L && s >= CHUNK) break;
            const float raw_step = XN::get(at<X>(raw + Tiles::dt, s, c)) + shift;
            float v = DT_SOFTPLUS ? softplus(raw_step) : raw_step, gate = 1.f;
            if (s >= rows) v = 0.f;
            if (HAS_Z) { gate = XN::get(at<X>(raw + Tiles::z, s, c)); gate *= sigmoid(gate); }
            sm.ready[c][s] = make_float4(v, two_to(s % T + 1) * (RULE ? 1.f : v) * XN::get(at<X>(raw, s, c)),
                                         two_to(T - 1 - s % T) * gate * XN::get(at<X>(raw + Tiles::dy, s, c)), DT_SOFTPLUS ? sigmoid(raw_step) : 1.f);
        }
        if (!BCONST) widen<BN, CHUNK>(sm.B, raw + Tiles::b);
        if (!CCONST) widen<CN, CHUNK>(sm.C, raw + Tiles::c);
    };
    auto collect = [&](int chunk, int part) {  // over the warps, to memory; the blocks' sums are added up afterwards
        const int rows = p.length - chunk * CHUNK;
#pragma unroll
        for (int turn = 0; turn < TURNS(T / 2 * WIDTH); turn++) {
            const int i = turn * NT + threadIdx.x, s = i / (WIDTH + !WIDTH) * 2, v = i % (WIDTH + !WIDTH), n = v % NP;
            if (T / 2 * WIDTH % NT && i >= T / 2 * WIDTH) break;
            float2 sum = make_float2(0.f, 0.f);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float2 q = *(const float2*)&sm.sums[(r * WIDTH + v) * SPACE + s];
                sum.x += q.x;
                sum.y += q.y;
            }
            float* to = partial + ((i64)chunk * CHUNK + part * T + s) * width + (v < NP ? 0 : N) + n;
            if (part * T + s < rows && n < N) to[0] = two_to(-T) * sum.x;
            if (part * T + s + 1 < rows && n < N) to[width] = two_to(-T) * sum.y;
        }
    };

    float h0[K] = {};
    if (chunks) {
        fetch(chunks - 1);
        if (real) read_states(h0, saved + (i64)(chunks - 1) * d * NP, j);
        arrived();
        __syncthreads();
        prepare(chunks - 1);
    }
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        char* raw = sm.raw[chunk & 1];
        const int rows = p.length - chunk * CHUNK;
        float start[K];
#pragma unroll
        for (int k = 0; k < K; k++) start[k] = h0[k];
        __syncthreads();
        if (chunk) { fetch(chunk - 1); if (real) read_states(h0, saved + (i64)(chunk - 1) * d * NP, j); }

        if (PARTS > 1) {  // the states between the parts
            float v[K];
#pragma unroll
            for (int k = 0; k < K; k++) v[k] = start[k];
#pragma unroll 1
            for (int part = 0; part < PARTS - 1; part++) {
                float Bv[STEPS][K];
#pragma unroll
                for (int i = 0; i < T; i++) {
                    const float2 q = *(const float2*)&sm.ready[c][part * T + i];
                    if (i % STEPS == 0 && !BCONST) read_matrix<CHUNK>(Bv, sm.B, part * T + i, j);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        const Step r = step_of(q.x, a[k], inverse[k]);
                        v[k] = fmaf(r.twice, v[k], r.q * (q.y * (BCONST ? fixed_B[k] : Bv[i % STEPS][k])));
                    }
                }
#pragma unroll
                for (int k = 0; k < K; k++) sm.between[(part * K + k) * NT + threadIdx.x] = v[k] = two_to(-T) * v[k];
            }
        }

#pragma unroll 1
        for (int part = PARTS - 1; part >= 0; part--) {
            if (PARTS > 1 && part > 0) {
#pragma unroll
                for (int k = 0; k < K; k++) start[k] = sm.between[((part - 1) * K + k) * NT + threadIdx.x];
            } else if (PARTS > 1 && real) {
                read_states(start, saved + (i64)chunk * d * NP, j);  // again: h0 now belongs to the chunk before
            }
            float h[T][K], decays[KEEP ? T : 1][K], out[OWN], Bv[STEPS][K], Cv[STEPS][K];
            float tensor[TENSOR ? K / 2 : 1][4], over[2][TENSOR ? K : SUMS ? SUMS : 1], factor[2];  // for sums over channels
#pragma unroll
            for (int first = 0; first < T; first += U) {
                float sum[U];
#pragma unroll
                for (int i = 0; i < U; i++) {
                    const int s = first + i;
                    const float4 q = sm.ready[c][part * T + s];
                    if (s % STEPS == 0 && !BCONST) read_matrix<CHUNK>(Bv, sm.B, part * T + s, j);
                    if (s % STEPS == 0 && !CCONST && HAS_Z) read_matrix<CHUNK>(Cv, sm.C, part * T + s, j);
                    sum[i] = 0.f;
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        const Step r = step_of(q.x, a[k], inverse[k]);
                        if (KEEP) decays[s][k] = r.twice;
                        h[s][k] = fmaf(r.twice, s ? h[s ? s - 1 : 0][k] : start[k], r.q * (q.y * (BCONST ? fixed_B[k] : Bv[s % STEPS][k])));
                        if (HAS_Z) sum[i] = fmaf(h[s][k], CCONST ? fixed_C[k] : Cv[s % STEPS][k], sum[i]);
                    }
                    factor[s % 2] = q.z;
                    if constexpr (TENSOR && !CCONST)
                        if (s % 2) tensor_add(tensor, h[s - 1], h[s], factor[0], factor[1], s - 1, s % L == 1, s % L == L - 1, AT_C);
                }
                if (HAS_Z) {
                    sum_lanes<U, log2_of(L), LOW>(sum, lane);
#pragma unroll
                    for (int i = 0; i < (U + L - 1) / L; i++) out[first / L + i] = sum[i];
                }
            }
#pragma unroll
            for (int first = T - U; first >= 0; first -= U) {
                float through_a[U], through_b[U];
#pragma unroll
                for (int i = U - 1; i >= 0; i--) {
                    const int s = first + i;
                    const float4 q = sm.ready[c][part * T + s];
                    if (s % STEPS == STEPS - 1 && !BCONST) read_matrix<CHUNK>(Bv, sm.B, part * T + s - STEPS + 1, j);
                    if (s % STEPS == STEPS - 1 && !CCONST) read_matrix<CHUNK>(Cv, sm.C, part * T + s - STEPS + 1, j);
                    through_a[i] = through_b[i] = 0.f;
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        const float gh = fmaf(q.z, CCONST ? fixed_C[k] : Cv[s % STEPS][k], g[k]);  // of the state after this step
                        const float before = s ? h[s ? s - 1 : 0][k] : start[k], b = BCONST ? fixed_B[k] : Bv[s % STEPS][k];
                        float by_q = gh;  // the gradient of q B x, times q
                        if constexpr (RULE) {
                            const Step r = step_of(q.x, a[k], inverse[k]);
                            g[k] = gh * r.twice;
                            by_q = gh * r.q;
                            dA_sum[k] = fmaf(gh, fmaf(2.f * r.in_z * q.x, before, r.in_a * (q.y * b)), dA_sum[k]);
                            through_a[i] = fmaf(gh * r.in_z, fmaf(2.f * a[k], before, q.y * b), through_a[i]);
                        } else {
                            g[k] = gh * (KEEP ? decays[KEEP ? s : 0][k] : twice_decay(q.x, a[k]));
                            const float decay = g[k] * before;
                            dA_sum[k] = fmaf(decay, q.x, dA_sum[k]);
                            through_a[i] = fmaf(decay, a[k], through_a[i]);
                        }
                        through_b[i] = fmaf(by_q, b, through_b[i]);
                        if (BCONST) dB_sum[k] = fmaf(by_q, q.y, dB_sum[k]); else over[s % 2][k] = TENSOR ? by_q : by_q * q.y;
                        if (CCONST) dC_sum[k] = fmaf(q.z, h[s][k], dC_sum[k]); else if (!TENSOR) over[s % 2][SUMS - K + k] = q.z * h[s][k];
                    }
                    // dB, and dC if that is not done above: over the channels of the warp
                    factor[s % 2] = q.y;
                    if constexpr (TENSOR && !BCONST)
                        if (s % 2 == 0) tensor_add(tensor, over[0], over[1], factor[0], factor[1], s, s % L == L - 2, s % L == 0, 0);
                    if constexpr (!TENSOR && SUMS) {
                        sum_lanes<SUMS, log2_of(CHANNELS), L>(over[s % 2], lane);
                        const int share = lane / L % SHARE;
                        float* to = sm.sums + warp * WIDTH * SPACE + s;
#pragma unroll
                        for (int m = 0; m < SUMS / SHARE; m++) {
                            const int v = m * SHARE + share;
                            if (lane / L < SHARE) to[(!BCONST && v < K ? state_index(v, j) : AT_C + state_index(v - (SUMS - K), j)) * SPACE] = over[s % 2][m];
                        }
                    }
                }
                sum_lanes<U, log2_of(L), LOW>(through_a, lane);
                sum_lanes<U, log2_of(L), LOW>(through_b, lane);
#pragma unroll
                for (int i = 0; i < (U + L - 1) / L; i++) {
                    const int s = part * T + first + i * L + j;
                    if ((L > U && j >= U) || s >= rows) continue;
                    const float4 q = sm.ready[c][s];
                    X& x_place = at<X>(raw, s, c);
                    const float back = two_to(s % T + 1 - T), by_input = back * through_b[i], given = back * q.z;
                    const float xv = XN::get(x_place), by_decay = two_to(-T) * through_a[i];
                    const float step_grad = q.w * (RULE ? by_decay : fmaf(xv, by_input, 0.693147181f * by_decay));
                    if (HAS_Z) {
                        X& z_place = at<X>(raw + Tiles::z, s, c);
                        const float gate = XN::get(z_place), sig = sigmoid(gate), grad_y = XN::get(at<X>(raw + Tiles::dy, s, c));
                        z_place = XN::put(grad_y * fmaf(skip, xv, two_to(-1 - s % T) * out[first / L + i]) * sig * fmaf(gate, 1.f - sig, 1.f));
                    }
                    dD_sum = fmaf(given, xv, dD_sum);
                    dbias_sum += step_grad;
                    x_place = XN::put(fmaf(RULE ? 1.f : q.x, by_input, skip * given));
                    at<X>(raw + Tiles::dt, s, c) = XN::put(step_grad);
                }
            }
#pragma unroll
            for (int k = 0; k < K; k++) g[k] *= two_to(-T);
            if (SUMS && part) { __syncthreads(); collect(chunk, part); __syncthreads(); }
        }
        arrived();
        __syncthreads();
        if (SUMS) collect(chunk, 0);
        store_tile<X, CHUNK, CB, WIDE>(dx + (i64)chunk * CHUNK * dx_step, dx_step, raw, rows, p.channels);
        store_tile<X, CHUNK, CB, WIDE>(ddt + (i64)chunk * CHUNK * d, d, raw + Tiles::dt, rows, p.channels);
        if (HAS_Z) store_tile<X, CHUNK, CB, WIDE>(dz + (i64)chunk * CHUNK * dz_step, dz_step, raw + Tiles::z, rows, p.channels);
        if (chunk) prepare(chunk - 1);
    }
#pragma unroll
    for (int k = 0; k < K; k++) { dA_sum[k] *= two_to(-T); dB_sum[k] *= two_to(-T); dC_sum[k] *= two_to(-T); }
    if (real) {
        write_real(dA + place, dA_sum, j);
        write_real(dinitial + place, g, j);
        if (BCONST) write_real(dB_fixed + place, dB_sum, j);
        if (CCONST) write_real(dC_fixed + place, dC_sum, j);
    }
#pragma unroll
    for (int mask = LOW; mask < L * LOW; mask *= 2) {
        dD_sum += __shfl_xor_sync(0xffffffffu, dD_sum, mask);
        dbias_sum += __shfl_xor_sync(0xffffffffu, dbias_sum, mask);
    }
    if (real && j == 0) { dD[sequence * d + channel] = dD_sum; dbias[sequence * d + channel] = dbias_sum; }
}

// Sums in a fixed order: of dB and dC over the blocks, partial (groups * blocks, tokens, width) -> (tokens, groups, N)
// each; of dA, dD and dbias over sequences and pieces, `parts` of them.
extern "C" __global__ void scan_collect(const float* partial, BN::type* dB, CN::type* dC, i64 tokens, i64 groups, i64 blocks,
                                        const float* dA_parts, const float* dD_parts, const float* dbias_parts,
                                        float* dA, float* dD, float* dbias, i64 parts, i64 d) {
    constexpr int width = (BCONST ? 0 : N) + (CCONST ? 0 : N);
    const i64 me = blockIdx.x * (i64)blockDim.x + threadIdx.x, all = gridDim.x * (i64)blockDim.x, count = tokens * width;
    auto sum = [](const float* from, i64 step, i64 many) {
        float v = 0.f;
        for (i64 k = 0; k < many; k++) v += from[k * step];
        return v;
    };
    for (i64 i = me; i < count * groups; i += all) {
        const i64 group = i / count, place = i % count, token = place / width, v = place % width;
        const float total = sum(partial + group * blocks * count + place, count, blocks);
        if (!BCONST && v < N) dB[(token * groups + group) * N + v] = BN::put(total);
        else dC[(token * groups + group) * N + v - (BCONST ? 0 : N)] = CN::put(total);
    }
    for (i64 i = me; i < d * N; i += all) dA[i] = sum(dA_parts + i, d * N, parts);
    for (i64 i = me; i < d; i += all) {
        dD[i] = sum(dD_parts + i, d, parts);
        dbias[i] = sum(dbias_parts + i, d, parts);
    }
}
