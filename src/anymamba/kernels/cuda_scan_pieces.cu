// For small problems time is cut into pieces that run side by side. What each needs to begin with is found first: the
// pieces' own effects (scan_forward with STATE_ONLY; scan_gradients here), then a chain over the pieces.
#include "cuda_common.cuh"

// At the start of each piece: v = decay * v + the piece's own effect. The decay is exp(A * sum of step sizes), which
// `total` has of each channel; with another rule than Mamba's it has the decay itself, of each state.
extern "C" __global__ void scan_chain(const float* own, const float* total, const float* A, const float* first,
                                      float* starts, i64 rows, i64 pieces, i64 d, i64 backward) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < rows * d * N; i += (i64)gridDim.x * blockDim.x) {
        const i64 row = i / (d * N), place = i % (d * N);
        const float a = A[place];
        float v = first ? first[i] : 0.f;
        for (i64 k = 0; k < pieces; k++) {
            const i64 piece = row * pieces + (backward ? pieces - 1 - k : k);
            starts[piece * d * N + place] = v;
            const float decay = RULE ? total[piece * d * N + place] : ex2(UNIT * a * total[piece * d + place / N]);
            v = v == 0.f ? own[piece * d * N + place] : fmaf(decay, v, own[piece * d * N + place]);  // inf * 0 is 0 here
        }
    }
}

struct Tiles {
    static constexpr int x = PITCH(CB, X) * T, C = CCONST ? 0 : PITCH(N, CN::type) * T;
    static constexpr int dy = x, z = 2 * x, c = (HAS_Z ? 3 : 2) * x, bytes = c + C;
};
struct Shared {
    char raw[3][Tiles::bytes];
    float2 ready[2][CB][T + 2];  // step size; gradient before the gate, doubled with each step back
    float C[2][CCONST ? 4 : NP / V * MATRIX(T)];
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than the host gives");

// The gradient of the state before each piece if none comes from after it: g = decay (g + C dy), backwards.
extern "C" __global__ void __launch_bounds__(NT, BLOCKS) scan_gradients(
    const X* dt, i64 dt_row, i64 dt_step, const X* z, i64 z_row, i64 z_step, const X* dy, i64 dy_row, i64 dy_step,
    const float* A, const CN::type* C, i64 C_row, i64 C_step, i64 C_group, const float* bias,
    float* own, float* total, i64 t, i64 d, i64 groups, i64 pieces, i64 piece) {
    extern __shared__ __align__(16) char memory[];
    Shared& sm = *(Shared*)memory;
    const Piece p = piece_of(0, t, d, groups, pieces, piece);
    const int j = lane_of_channel<NEIGHBOURS>(), c = channel_of_lane<NEIGHBOURS>();
    const i64 sequence = blockIdx.x / (((d / groups + CB - 1) / CB) * groups);

    dt += p.row * dt_row + p.first * dt_step + p.channel;
    dy += p.row * dy_row + p.first * dy_step + p.channel;
    if (HAS_Z) z += p.row * z_row + p.first * z_step + p.channel;
    if (!CCONST) C += p.row * C_row + p.first * C_step + p.group * C_group;

    float a[K] = {}, g[K] = {}, fixed_C[K] = {}, shift = 0.f, steps_sum = 0.f, inverse[K], decay[K];
    if (c < p.channels) {
        const i64 channel = p.channel + c;
        read_real(a, A + channel * N, j);
        if (CCONST) read_fixed<CN>(fixed_C, C + channel * N, j);
        if (bias) shift = bias[channel];
    }
#pragma unroll
    for (int k = 0; k < K; k++) { a[k] *= UNIT; inverse[k] = 1.f / a[k]; decay[k] = 1.f; }

    const int tiles = (p.length + T - 1) / T;
    auto fetch = [&](int tile) {
        char* raw = sm.raw[tile % 3];
        const int rows = p.length - tile * T;
        load_tile<X, T, CB, WIDE>(raw, dt + (i64)tile * T * dt_step, dt_step, rows, p.channels);
        load_tile<X, T, CB, WIDE>(raw + Tiles::dy, dy + (i64)tile * T * dy_step, dy_step, rows, p.channels);
        if (HAS_Z) load_tile<X, T, CB, WIDE>(raw + Tiles::z, z + (i64)tile * T * z_step, z_step, rows, p.channels);
        if (!CCONST) load_tile<CN::type, T, N, WIDE_BC>(raw + Tiles::c, C + (i64)tile * T * C_step, C_step, rows, N);
        commit();
    };
    auto prepare = [&](int tile) {
        char* raw = sm.raw[tile % 3];
        const int rows = p.length - tile * T;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int s = i * L + j;
            float v = XN::get(at<X>(raw, s, c)) + shift, given = XN::get(at<X>(raw + Tiles::dy, s, c));
            if (DT_SOFTPLUS) v = softplus(v);
            if (s >= rows) v = 0.f;
            if (HAS_Z) { const float gate = XN::get(at<X>(raw + Tiles::z, s, c)); given *= gate * sigmoid(gate); }
            sm.ready[tile & 1][c][s] = make_float2(v, two_to(T - 1 - s) * given);
            steps_sum += v;
        }
        if (!CCONST) widen<CN, T>(sm.C[tile & 1], raw + Tiles::c);
    };

    if (tiles) {
        fetch(tiles - 1);
        arrived();
        __syncthreads();
        prepare(tiles - 1);
        if (tiles > 1) fetch(tiles - 2);
    }
    for (int tile = tiles - 1; tile >= 0; tile--) {
        arrived();
        __syncthreads();
        if (tile > 1) fetch(tile - 2);
        if (tile > 0) prepare(tile - 1);
        float Cv[STEPS][K];
        float4 two;
#pragma unroll
        for (int s = T - 1; s >= 0; s--) {
            if (s % STEPS == STEPS - 1 && !CCONST) read_matrix<T>(Cv, sm.C[tile & 1], s - STEPS + 1, j);
            if (s % 2) two = *(const float4*)&sm.ready[tile & 1][c][s - 1];
            const float step = s % 2 ? two.z : two.x, given = s % 2 ? two.w : two.y;
#pragma unroll
            for (int k = 0; k < K; k++) {
                const Step r = step_of(step, a[k], inverse[k]);
                g[k] = fmaf(given, CCONST ? fixed_C[k] : Cv[s % STEPS][k], g[k]) * r.twice;
                if (RULE) decay[k] *= 0.5f * r.twice;
            }
        }
#pragma unroll
        for (int k = 0; k < K; k++) g[k] *= two_to(-T);
    }
    const i64 place = sequence * d + p.channel + c;
    if (c < p.channels) write_real(own + place * N, g, j);
    if (RULE) {
        if (c < p.channels) write_real(total + place * N, decay, j);
        return;
    }
#pragma unroll
    for (int mask = NEIGHBOURS; mask < NEIGHBOURS * L; mask *= 2) steps_sum += __shfl_xor_sync(0xffffffffu, steps_sum, mask);
    if (c < p.channels && j == 0) total[place] = steps_sum;
}
