/* The arithmetic that a linear layer could reach if all operands were in registers. set.c includes this file after layers.h. */

/* `type` is that of the numbers that are multiplied. */
typedef struct {
    int64_t rounds, type;
    const float *starts; /* [CHAINS] different numbers, or the compiler would compute one chain for all */
    float *out;
} Peak;

enum { CHAINS = LANES == 4 ? 16 : 12 }; /* some ARM cores start four multiply-adds a cycle */

static void peak_piece(const void *given, int64_t piece, int id) {
    const Peak *job = given;
    const uint16_t pairs[2 * LANES] = {0};
    V sum[CHAINS];
    (void)id, (void)pairs;
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = v_set(job->starts[i]);
#if PAIRED
    if (is_paired((int)job->type)) {
        const P w = p_load(pairs);
        for (int64_t round = 0; round < job->rounds; round++)
            UNROLL
            for (int i = 0; i < CHAINS; i++) sum[i] = p_dot(sum[i], w, pairs);
    } else
#endif
    {
        const V w = v_set((float)job->type), x = v_set(0.5f);
        for (int64_t round = 0; round < job->rounds; round++)
            UNROLL
            for (int i = 0; i < CHAINS; i++) sum[i] = v_fma(w, x, sum[i]);
    }
    for (int i = 1; i < CHAINS; i++) sum[0] = v_add(sum[0], sum[i]);
    job->out[piece] = largest_of(sum[0]);
}

#ifdef USE_AMX
enum { TILE_SUMS = 4, TILE_PRODUCTS = TILE_SUMS * TILE_ROWS * TILE_ROWS * TILE };

static void tile_peak(const void *given, int64_t piece, int id) {
    const Peak *job = given;
    float out[TILE_ROWS][TILE_ROWS];
    (void)id;
    configure(TILE_ROWS, TILE_ROWS);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t round = 0; round < job->rounds; round++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, TILE_BYTES);
    _tile_release();
    job->out[piece] = out[0][0];
}
#endif

/* Runs independent multiply-adds, as many on each thread, in numbers of `type`. Returns how many there were. */
double EXPORT(peak)(int64_t type, int64_t rounds, int64_t threads) {
    const int64_t enlisted = enlist(threads);
    float starts[CHAINS], out[enlisted];
    for (int i = 0; i < CHAINS; i++) starts[i] = (float)i;
    Peak job = {.rounds = rounds, .type = type, .starts = starts, .out = out};
    double each = (double)CHAINS * LANES * (is_paired((int)type) ? 2 : 1);
    Piece *piece = peak_piece;
#ifdef USE_AMX
    if (type == BF16) piece = tile_peak, each = TILE_PRODUCTS;
#endif
    parallel(enlisted, piece, &job, enlisted);
    dismiss();
    return each * (double)rounds * (double)enlisted;
}
