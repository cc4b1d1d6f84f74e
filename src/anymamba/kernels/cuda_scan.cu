// Selective scan, forward: one pass over time with the state in registers. See reference/selective.py for the equation.
//
// A block walks a tile of T steps at a time: while it walks one, the next is made ready, one (step, channel) a lane, and
// the one after that is on its way to shared memory. The walk itself costs five instructions a state and step with Mamba's own rule. Sums over
// the lanes of a channel are made for U steps together.
#include "cuda_common.cuh"

struct Tiles {
    static constexpr int x = PITCH(CB, X) * T, B = BCONST ? 0 : PITCH(N, BN::type) * T, C = CCONST ? 0 : PITCH(N, CN::type) * T;
    static constexpr int dt = x, z = 2 * x, b = (HAS_Z ? 3 : 2) * x, c = b + B, bytes = c + C;
};
struct Shared {
    char raw[3][Tiles::bytes];
    char y[STATE_ONLY ? 1 : 2][PITCH(CB, X) * T];
    float2 ready[2][CB][T + 2];  // step size; input, with Mamba's rule times step size, doubled with each step
    float B[2][BCONST ? 4 : NP / V * MATRIX(T)], C[2][CCONST || STATE_ONLY ? 4 : NP / V * MATRIX(T)];
};

static_assert(sizeof(Shared) <= SHARED, "more shared memory than the host gives");

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) scan_forward(
    const X* x, i64 x_row, i64 x_step, const X* dt, i64 dt_row, i64 dt_step, const X* z, i64 z_row, i64 z_step,
    const float* A, const BN::type* B, i64 B_row, i64 B_step, i64 B_group,
    const CN::type* C, i64 C_row, i64 C_step, i64 C_group, const float* D, const float* bias,
    const float* initial, const void* ends, X* y, float* final_state, float* saved, float* total,
    i64 t, i64 d, i64 groups, i64 pieces, i64 piece) {
    extern __shared__ __align__(16) char memory[];
    Shared& sm = *(Shared*)memory;
    const Piece p = piece_of(ends, t, d, groups, pieces, piece);
    const int lane = threadIdx.x % 32, j = lane_of_channel<NEIGHBOURS>(), c = channel_of_lane<NEIGHBOURS>();
    const i64 sequence = blockIdx.x / (((d / groups + CB - 1) / CB) * groups);

    x += p.row * x_row + p.first * x_step + p.channel;
    dt += p.row * dt_row + p.first * dt_step + p.channel;
    if (HAS_Z) z += p.row * z_row + p.first * z_step + p.channel;
    if (!BCONST) B += p.row * B_row + p.first * B_step + p.group * B_group;
    if (!CCONST && !STATE_ONLY) C += p.row * C_row + p.first * C_step + p.group * C_group;
    y += p.token * d + p.channel;
    saved += (p.slot * d + p.channel) * NP;

    float a[K] = {}, h[K] = {}, fixed_B[K] = {}, fixed_C[K] = {}, skip = 0.f, shift = 0.f, steps_sum = 0.f;
    float inverse[K], decay[K];  // 1 / A, for RULE 1; of the whole piece
    if (c < p.channels) {
        const i64 channel = p.channel + c;
        read_real(a, A + channel * N, j);
        if (initial) read_real(h, initial + (sequence * d + channel) * N, j);
        if (BCONST) read_fixed<BN>(fixed_B, B + channel * N, j);
        if (CCONST && !STATE_ONLY) read_fixed<CN>(fixed_C, C + channel * N, j);
        if (D) skip = D[channel];
        if (bias) shift = bias[channel];
    }
#pragma unroll
    for (int k = 0; k < K; k++) { a[k] *= UNIT; inverse[k] = 1.f / a[k]; decay[k] = 1.f; }

    const int tiles = (p.length + T - 1) / T;
    auto fetch = [&](int tile) {  // the pointers move on to the next tile
        char* raw = sm.raw[tile % 3];
        const int rows = p.length - tile * T;
        load_tile<X, T, CB, WIDE>(raw, x, x_step, rows, p.channels); x += T * x_step;
        load_tile<X, T, CB, WIDE>(raw + Tiles::dt, dt, dt_step, rows, p.channels); dt += T * dt_step;
        if (HAS_Z) { load_tile<X, T, CB, WIDE>(raw + Tiles::z, z, z_step, rows, p.channels); z += T * z_step; }
        if (!BCONST) { load_tile<BN::type, T, N, WIDE_BC>(raw + Tiles::b, B, B_step, rows, N); B += T * B_step; }
        if (!CCONST && !STATE_ONLY) { load_tile<CN::type, T, N, WIDE_BC>(raw + Tiles::c, C, C_step, rows, N); C += T * C_step; }
        commit();
    };
    auto prepare = [&](int tile) {
        char* raw = sm.raw[tile % 3];
        const int rows = p.length - tile * T;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int s = i * L + j;
            float v = XN::get(at<X>(raw + Tiles::dt, s, c)) + shift;
            if (DT_SOFTPLUS) v = softplus(v);
            if (s >= rows) v = 0.f;  // past the end nothing changes the state
            sm.ready[tile & 1][c][s] = make_float2(v, two_to(s + 1) * (RULE ? 1.f : v) * XN::get(at<X>(raw, s, c)));
            if (STATE_ONLY) steps_sum += v;
        }
        if (!BCONST) widen<BN, T>(sm.B[tile & 1], raw + Tiles::b);
        if (!CCONST && !STATE_ONLY) widen<CN, T>(sm.C[tile & 1], raw + Tiles::c);
    };
    auto flush = [&](int tile) {
        if (!STATE_ONLY) { store_tile<X, T, CB, WIDE>(y, d, sm.y[tile & 1], p.length - tile * T, p.channels); y += T * d; }
    };

    if (tiles) {
        fetch(0);
        arrived();
        __syncthreads();
        prepare(0);
        if (tiles > 1) fetch(1);
    }
    for (int tile = 0; tile < tiles; tile++) {
        char* raw = sm.raw[tile % 3];
        arrived();
        __syncthreads();
        if (tile + 2 < tiles) fetch(tile + 2);
        if (tile) flush(tile - 1);
        if (tile + 1 < tiles) prepare(tile + 1);

        float out[OWN];
#pragma unroll
        for (int first = 0; first < T; first += U) {
            float sum[U], Bv[STEPS][K], Cv[STEPS][K];
            float4 two;
            if (SAVE && first % CHUNK == 0 && (tile * T + first) % CHUNK == 0 && tile * T + first < p.length && c < p.channels) {
                float now[K];
#pragma unroll
                for (int k = 0; k < K; k++) now[k] = two_to(-first) * h[k];
                write_states(saved + ((i64)((tile * T + first) / CHUNK) * d + c) * NP, now, j);
            }
#pragma unroll
            for (int i = 0; i < U; i++) {
                if (i % STEPS == 0 && !BCONST) read_matrix<T>(Bv, sm.B[tile & 1], first + i, j);
                if (i % STEPS == 0 && !CCONST && !STATE_ONLY) read_matrix<T>(Cv, sm.C[tile & 1], first + i, j);
                if (i % 2 == 0) two = *(const float4*)&sm.ready[tile & 1][c][first + i];
                const float step = i % 2 ? two.z : two.x, in = i % 2 ? two.w : two.y;
                sum[i] = 0.f;
#pragma unroll
                for (int k = 0; k < K; k++) {
                    const Step r = step_of(step, a[k], inverse[k]);
                    h[k] = fmaf(r.twice, h[k], r.q * (in * (BCONST ? fixed_B[k] : Bv[i % STEPS][k])));
                    if (STATE_ONLY && RULE) decay[k] *= 0.5f * r.twice;
                    if (!STATE_ONLY) sum[i] = fmaf(h[k], CCONST ? fixed_C[k] : Cv[i % STEPS][k], sum[i]);
                }
            }
            if (STATE_ONLY) continue;
            sum_lanes<U, log2_of(L), NEIGHBOURS>(sum, lane);
#pragma unroll
            for (int i = 0; i < U / L; i++) out[first / L + i] = sum[i];
        }
#pragma unroll
        for (int k = 0; k < K; k++) h[k] *= two_to(-T);
        if (STATE_ONLY) continue;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int s = i * L + j;
            float v = fmaf(skip, XN::get(at<X>(raw, s, c)), two_to(-s - 1) * out[i]);
            if (HAS_Z) { const float gate = XN::get(at<X>(raw + Tiles::z, s, c)); v *= gate * sigmoid(gate); }
            at<X>(sm.y[tile & 1], s, c) = XN::put(v);
        }
    }
    if (tiles) { __syncthreads(); flush(tiles - 1); }
    const i64 place = sequence * d + p.channel + c;
    if (c < p.channels) write_real(final_state + place * N, h, j);
    if (STATE_ONLY && RULE) {
        if (c < p.channels) write_real(total + place * N, decay, j);
    } else if (STATE_ONLY) {
#pragma unroll
        for (int mask = NEIGHBOURS; mask < NEIGHBOURS * L; mask *= 2) steps_sum += __shfl_xor_sync(0xffffffffu, steps_sum, mask);
        if (c < p.channels && j == 0) total[place] = steps_sum;
    }
}
