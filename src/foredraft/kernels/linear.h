/* bfloat16 numbers, and linear layers on rows of them. decoder.c includes this file after passed.h and team.h. */

#include <math.h>
#include <string.h>

INLINE __m512 widen(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

INLINE void narrow(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

INLINE __m512bh pairs(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }

INLINE float float_of(bf16 x) {
    union { uint32_t bits; float value; } one = {.bits = (uint32_t)x << 16};
    return one.value;
}

static void narrow_all(const float *x, bf16 *out, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) narrow(out + i, _mm512_loadu_ps(x + i));
}

static void normalize(const float *x, const bf16 *weight, bf16 *out, int64_t size, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)size + eps));
    for (int64_t i = 0; i < size; i += 16)
        narrow(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), widen(weight + i)));
}

enum { TILE = 32, MOST_ROWS = 12, MANY_ROWS = 40, FEW_ROWS = 5, LINE = 64, AHEAD = 6144, PARTS = 2 };

/* 1 if inputs are widened to float32 and products are added one by one, 0 if VDPBF16PS adds them in pairs. Intel's processors have
   twice as many units for the former. The choice holds for the whole process. */
static int is_wide = -1;

/* Sets `is_wide`, for tests and measurements. -1 chooses by the processor. */
void foredraft_set_wide(int wide) { is_wide = wide; }

INLINE int wide_inputs(void) {
    if (is_wide < 0) is_wide = __builtin_cpu_is("intel") != 0;
    return is_wide;
}

INLINE __m512 evens(__m512bh x) { return _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)x, 16)); }

INLINE __m512 odds(__m512bh x) { return _mm512_castsi512_ps(_mm512_and_si512((__m512i)x, _mm512_set1_epi32(-65536))); }

/* Rows run in groups of about equal size. A group is small enough that its sums stay in registers. With many rows, groups are half
   as large, so that inputs stay in the L1 cache: products limit the speed of a prompt, not the reading of weights. */
INLINE int64_t most_rows(const Linear *layer, int64_t rows) { return layer->few || rows >= MANY_ROWS ? MOST_ROWS / 2 : MOST_ROWS; }

INLINE int64_t groups_of(const Linear *layer, int64_t rows) {
    return rows > 0 ? (rows + most_rows(layer, rows) - 1) / most_rows(layer, rows) : 1;
}

INLINE int64_t group_of(const Linear *layer, int64_t rows) { return (rows + groups_of(layer, rows) - 1) / groups_of(layer, rows); }

/* Weights to prefetch while others are used. With many rows the hardware prefetches too late. A single group of rows prefetches
   AHEAD bytes ahead; a whole number of pages would be slower by a tenth. Several groups each prefetch a share of the next tile. */
typedef struct {
    const char *at;
    int64_t pace; /* bytes to prefetch per cache line of weights */
} Ahead;

INLINE Ahead ahead_of(const void *tile, int64_t bytes, int64_t group, int64_t groups) {
    const char *at = (const char *)tile + (groups == 1 ? AHEAD : bytes + group * bytes / groups);
    return (Ahead){at, LINE / groups};
}

/* Prefetches one line and advances by `lines` lines. */
INLINE void ask(Ahead *ahead, int lines) {
    _mm_prefetch(ahead->at, _MM_HINT_T1);
    ahead->at += lines * ahead->pace;
}

INLINE __m512i four_bytes(const void *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Input rows in the form that a layer multiplies: bf16, float32, or integers of eight bits. */
typedef struct {
    const void *rows;
    const float *steps;     /* for integers, [rows][in / 32]: the value of 1 */
    const int32_t *offsets; /* for integers, [rows][in / 32]: -8 times their sum, because stored weights are larger by 8 */
} Rows;

/* Computes 32 outputs of n rows. 2 n sums stay in registers, and each weight is loaded once. n and `wide` are constants. */
INLINE void products_of(const int n, const int wide, const void *x, const bf16 *w, int64_t size, Ahead ahead, float (*out)[TILE]) {
    const bf16 *narrow_x = x;
    const float *wide_x = x;
    __m512 low[MOST_ROWS], high[MOST_ROWS];
#pragma GCC unroll 12
    for (int m = 0; m < n; m++) low[m] = high[m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 2, w += 2 * TILE) {
        if (n > FEW_ROWS) ask(&ahead, 1), ask(&ahead, 1);
        else ask(&ahead, 2); /* the processor fetches lines in pairs */
        __m512bh first = pairs(w), second = pairs(w + TILE);
        __m512 low_even = evens(first), high_even = evens(second), low_odd = odds(first), high_odd = odds(second);
#pragma GCC unroll 12
        for (int m = 0; m < n; m++) {
            if (wide) {
                __m512 even = _mm512_set1_ps(wide_x[m * size + i]), odd = _mm512_set1_ps(wide_x[m * size + i + 1]);
                low[m] = _mm512_fmadd_ps(low_even, even, low[m]), high[m] = _mm512_fmadd_ps(high_even, even, high[m]);
                low[m] = _mm512_fmadd_ps(low_odd, odd, low[m]), high[m] = _mm512_fmadd_ps(high_odd, odd, high[m]);
            } else {
                __m512bh both = (__m512bh)four_bytes(narrow_x + m * size + i);
                low[m] = _mm512_dpbf16_ps(low[m], first, both), high[m] = _mm512_dpbf16_ps(high[m], second, both);
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < n; m++) _mm512_storeu_ps(out[m], low[m]), _mm512_storeu_ps(out[m] + 16, high[m]);
}

/* The same for four-bit weights. Sums within a block are integers, which are then scaled. */
INLINE void few_products_of(
    const int n, const Rows *x, int64_t row, const Block *block, int64_t size, Ahead ahead, float (*out)[TILE]
) {
    const int8_t *numbers = (const int8_t *)x->rows + row * size;
    const int64_t blocks = size / TILE, at = row * blocks;
    const __m512i half = _mm512_set1_epi8(15);
    __m512 low[MOST_ROWS / 2], high[MOST_ROWS / 2];
#pragma GCC unroll 6
    for (int m = 0; m < n; m++) low[m] = high[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++, block++) {
        __m512i first[MOST_ROWS / 2], second[MOST_ROWS / 2];
        ask(&ahead, 1);
#pragma GCC unroll 6
        for (int m = 0; m < n; m++) first[m] = second[m] = _mm512_set1_epi32(x->offsets[at + m * blocks + b]);
        for (int i = 0; i < TILE / 4; i++) {
            ask(&ahead, 1);
            __m512i both = _mm512_loadu_si512(block->numbers[i]);
            __m512i lower = _mm512_and_si512(both, half), upper = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
#pragma GCC unroll 6
            for (int m = 0; m < n; m++) {
                __m512i four = four_bytes(numbers + m * size + b * TILE + 4 * i);
                first[m] = _mm512_dpbusd_epi32(first[m], lower, four), second[m] = _mm512_dpbusd_epi32(second[m], upper, four);
            }
        }
        __m512 low_scales = widen(block->scales), high_scales = widen(block->scales + 16);
#pragma GCC unroll 6
        for (int m = 0; m < n; m++) {
            __m512 step = _mm512_set1_ps(x->steps[at + m * blocks + b]);
            low[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first[m]), _mm512_mul_ps(low_scales, step), low[m]);
            high[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second[m]), _mm512_mul_ps(high_scales, step), high[m]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < n; m++) _mm512_storeu_ps(out[m], low[m]), _mm512_storeu_ps(out[m] + 16, high[m]);
}

/* Returns the bytes of the weights of 32 outputs. */
INLINE int64_t tile_bytes(const Linear *layer) {
    return layer->few ? layer->in / TILE * (int64_t)sizeof(Block) : TILE * layer->in * (int64_t)sizeof(bf16);
}

/* Computes the outputs of a tile for n rows from `row` on, one group of all `count` rows. */
static void products(int n, const Rows *x, int64_t row, int64_t count, const Linear *layer, int64_t tile, float (*out)[TILE]) {
    const int64_t size = layer->in, bytes = tile_bytes(layer);
    const void *w = (const char *)layer->weight + tile * bytes;
    const bf16 *narrow_x = (const bf16 *)x->rows + row * size;
    const float *wide_x = (const float *)x->rows + row * size;
    const Ahead ahead = ahead_of(w, bytes, row / group_of(layer, count), groups_of(layer, count));
    switch (n + MOST_ROWS * (layer->few ? 2 : wide_inputs())) {
#define CASE(N) \
        case N: products_of(N, 0, narrow_x, w, size, ahead, out); break; \
        case N + MOST_ROWS: products_of(N, 1, wide_x, w, size, ahead, out); break;
#define FEW_CASE(N) case N + 2 * MOST_ROWS: few_products_of(N, x, row, w, size, ahead, out); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        FEW_CASE(1) FEW_CASE(2) FEW_CASE(3) FEW_CASE(4) FEW_CASE(5) FEW_CASE(6)
#undef FEW_CASE
#undef CASE
    }
    if (layer->bias == NULL) return;
    for (int m = 0; m < n; m++)
        for (int64_t o = 0; o < TILE && tile * TILE + o < layer->out; o++) out[m][o] += float_of(layer->bias[tile * TILE + o]);
}

/* Returns a layer with `count` outputs of another, from `first` on. `first` is a multiple of 32. */
INLINE Linear outputs(const Linear *layer, int64_t first, int64_t count) {
    Linear some = *layer;
    some.weight = (const char *)layer->weight + first / TILE * tile_bytes(layer), some.out = count;
    if (layer->bias) some.bias += first;
    return some;
}

INLINE int64_t tiles_of(const Linear *layer) { return (layer->out + TILE - 1) / TILE; }

/* The threads of a linear layer, and two float32 buffers for converted inputs. */
typedef struct {
    int64_t threads;
    float *room[2];
} Hands;

typedef struct {
    const bf16 *x;
    int64_t size;
    float *wide;
    int8_t *numbers;
    float *steps;
    int32_t *offsets;
} Widening;

static void widen_piece(const void *given, int64_t piece, int id) {
    const Widening *job = given;
    const int64_t at = piece * job->size;
    (void)id;
    for (int64_t i = at; i < at + job->size; i += 16) _mm512_storeu_ps(job->wide + i, widen(job->x + i));
}

/* Rounds a row to integers from -127 to 127. 32 inputs share a step. */
static void round_piece(const void *given, int64_t row, int id) {
    const Widening *job = given;
    (void)id;
    for (int64_t i = row * job->size; i < (row + 1) * job->size; i += TILE) {
        __m512 first = widen(job->x + i), second = widen(job->x + i + 16);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
        const __m512 steps = _mm512_set1_ps(most > 0 ? 127 / most : 0);
        __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(first, steps)), high = _mm512_cvtps_epi32(_mm512_mul_ps(second, steps));
        _mm_storeu_si128((__m128i *)(job->numbers + i), _mm512_cvtsepi32_epi8(low));
        _mm_storeu_si128((__m128i *)(job->numbers + i + 16), _mm512_cvtsepi32_epi8(high));
        job->steps[i / TILE] = most / 127, job->offsets[i / TILE] = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
    }
}

/* Converts inputs to the form that `layer` multiplies. */
static Rows inputs(const Hands *hands, const Linear *layer, const bf16 *x, int64_t rows, int room) {
    Widening job = {.x = x, .size = layer->in, .wide = hands->room[room]};
    if (layer->few) {
        const int64_t blocks = rows * layer->in / TILE;
        job.steps = job.wide, job.offsets = (int32_t *)(job.steps + blocks), job.numbers = (int8_t *)(job.offsets + blocks);
        parallel(hands->threads, round_piece, &job, rows);
        return (Rows){job.numbers, job.steps, job.offsets};
    }
    if (!wide_inputs()) return (Rows){.rows = x};
    parallel(hands->threads, widen_piece, &job, rows);
    return (Rows){.rows = job.wide};
}

typedef struct {
    const Linear *layer, *other;
    Rows x, gate_x;
    int64_t rows, stride, span;
    float *y;
    bf16 *act;
    int add;
} Product;

static void linear_tile(const Product *job, int64_t tile) {
    const Linear *layer = job->layer;
    float out[MOST_ROWS][TILE];
    for (int64_t row = 0, group = group_of(layer, job->rows); row < job->rows; row += group) {
        int64_t n = least(group, job->rows - row), width = least(TILE, layer->out - tile * TILE);
        products((int)n, &job->x, row, job->rows, layer, tile, out);
        for (int64_t m = 0; m < n; m++) {
            float *to = job->y + (row + m) * job->stride + tile * TILE;
            for (int64_t o = 0; o < width; o++) to[o] = job->add ? to[o] + out[m][o] : out[m][o];
        }
    }
}

static void gated_tile(const Product *job, int64_t tile) {
    const Linear *gate = job->layer, *up = job->other;
    float g[MOST_ROWS][TILE], u[MOST_ROWS][TILE];
    for (int64_t row = 0, group = group_of(gate, job->rows); row < job->rows; row += group) {
        int64_t n = least(group, job->rows - row);
        products((int)n, &job->gate_x, row, job->rows, gate, tile, g);
        products((int)n, &job->x, row, job->rows, up, tile, u);
        for (int64_t m = 0; m < n; m++)
            for (int64_t o = 0; o < TILE; o += 16) {
                __m512 v = _mm512_loadu_ps(g[m] + o), e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), v));
                v = _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
                narrow(job->act + (row + m) * gate->out + tile * TILE + o, _mm512_mul_ps(v, _mm512_loadu_ps(u[m] + o)));
            }
    }
}

/* Runs `span` consecutive tiles, so that the prefetched weights are those of the next tile. */
static void tiles_piece(const void *given, int64_t piece, int id) {
    const Product *job = given;
    const int64_t end = least((piece + 1) * job->span, tiles_of(job->layer));
    (void)id;
    for (int64_t tile = piece * job->span; tile < end; tile++)
        if (job->other) gated_tile(job, tile);
        else linear_tile(job, tile);
}

/* Runs all tiles, in several pieces per thread, so that other threads can help a delayed one. */
static void run_tiles(const Hands *hands, Product *job) {
    const int64_t tiles = tiles_of(job->layer), pieces = hands->threads * PARTS;
    job->span = (tiles + pieces - 1) / pieces;
    parallel(hands->threads, tiles_piece, job, (tiles + job->span - 1) / job->span);
}

static void run_linear(const Hands *hands, Product job, const bf16 *x) {
    job.x = inputs(hands, job.layer, x, job.rows, 0);
    run_tiles(hands, &job);
}

/* y = x W^T + b. Rows of y are `stride` numbers apart. */
static void linear_into(const Hands *hands, const Linear *layer, const bf16 *x, int64_t rows, float *y, int64_t stride) {
    run_linear(hands, (Product){.layer = layer, .rows = rows, .y = y, .stride = stride}, x);
}

/* y = x W^T + b, or y += x W^T + b if `add`. */
static void linear(const Hands *hands, const Linear *layer, const bf16 *x, int64_t rows, float *y, int add) {
    run_linear(hands, (Product){.layer = layer, .rows = rows, .y = y, .stride = layer->out, .add = add}, x);
}

/* act = silu(gate(gate_x)) * up(x) */
static void gated(const Hands *hands, const Linear *gate, const Linear *up, const bf16 *gate_x, const bf16 *x, int64_t rows, bf16 *act) {
    Product job = {.layer = gate, .other = up, .rows = rows, .act = act};
    job.x = inputs(hands, up, x, rows, 0);
    job.gate_x = gate_x == x ? job.x : inputs(hands, gate, gate_x, rows, 1);
    run_tiles(hands, &job);
}
