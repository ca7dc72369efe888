/* Linear layers on rows of inputs. set.c includes this file after passed.h and team.h. */

static void store_inputs(int type, const float *x, void *out, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store_input(type, out, i, v_load(x + i));
}

/* out = x / sqrt(mean(x^2) + eps) * weight */
static void normalize(int type, const float *x, const float *weight, void *out, int64_t size, float eps) {
    V sum[PER_GROUP];
    for (int v = 0; v < PER_GROUP; v++) sum[v] = v_set(0);
    for (int64_t i = 0; i < size; i += GROUP)
        for (int v = 0; v < PER_GROUP; v++) {
            const V some = v_load(x + i + v * LANES);
            sum[v] = v_fma(some, some, sum[v]);
        }
    const V scale = v_set(1.0f / sqrtf(sum_of(sum) / (float)size + eps));
    for (int64_t i = 0; i < size; i += LANES) store_input(type, out, i, v_mul(v_mul(v_load(x + i), scale), v_load(weight + i)));
}

enum { TILE = 32, VECTORS = TILE / LANES, LINE = 64, PARTS = 2, CHUNK = 64 };

/* Calls CALL with n, from 1 to MOST_ROWS, as a constant. With inputs rounded to eight bits, fewer rows are computed together on sets
   with few registers. */
#if MOST_ROWS == 12
#define ROW_CASES(CALL) CALL(1) CALL(2) CALL(3) CALL(4) CALL(5) CALL(6) CALL(7) CALL(8) CALL(9) CALL(10) CALL(11) CALL(12)
#define HALF_ROW_CASES(CALL) CALL(1) CALL(2) CALL(3) CALL(4) CALL(5) CALL(6)
#define ROUNDED_ROW_CASES HALF_ROW_CASES
enum { ROUNDED_ROWS = 6 };
#elif MOST_ROWS == 6
#define ROW_CASES(CALL) CALL(1) CALL(2) CALL(3) CALL(4) CALL(5) CALL(6)
#define ROUNDED_ROW_CASES(CALL) CALL(1) CALL(2) CALL(3)
enum { ROUNDED_ROWS = 3 };
#else
#define ROW_CASES(CALL) CALL(1) CALL(2) CALL(3) CALL(4)
#define ROUNDED_ROW_CASES(CALL) CALL(1) CALL(2)
enum { ROUNDED_ROWS = 2 };
#endif

/* How the inputs of a layer are multiplied: as they are, packed for many rows (see `packed_products`), rounded to eight bits, or in
   pairs with numbers of few bits. `type` is that of the model. */
enum { AS_GIVEN, PACKED, ROUNDED, IN_PAIRS };

enum { EXACT_ROWS = 2 }; /* beside numbers of few bits, whose conversion takes as many registers as the sums of a further row */

INLINE int way_of(const Linear *layer, int type, int64_t rows) {
    if (layer->type != NUMBERS) return !is_paired((int)layer->type) && rows >= PACKED_ROWS ? PACKED : AS_GIVEN;
    if (layer->is_rounded) return ROUNDED;
    return is_paired(type) ? IN_PAIRS : rows > EXACT_ROWS ? PACKED : AS_GIVEN;
}

/* Rows run in groups of about equal size. A group is small enough that its sums stay in registers: at most UNPACKED_ROWS beside
   weights as they are stored, whose conversion takes registers too, and MOST_ROWS beside packed ones. From MANY_ROWS on, groups are
   half as large, so that inputs stay in the L1 cache: products limit the speed of a prompt, not the reading of weights. */
INLINE int64_t most_rows(const Linear *layer, int way, int64_t rows) {
    if (way == IN_PAIRS) return layer->bits == 4 && rows <= MOST_ROWS ? MOST_ROWS : MOST_ROWS / 2;
    if (layer->type == NUMBERS && way != PACKED) return way == ROUNDED ? ROUNDED_ROWS : EXACT_ROWS;
    return most(1, rows >= MANY_ROWS ? MOST_ROWS / 2 : way == PACKED ? MOST_ROWS : UNPACKED_ROWS);
}

INLINE int64_t groups_of(const Linear *layer, int way, int64_t rows) {
    return rows > 0 ? (rows + most_rows(layer, way, rows) - 1) / most_rows(layer, way, rows) : 1;
}

INLINE int64_t group_of(const Linear *layer, int way, int64_t rows) {
    return (rows + groups_of(layer, way, rows) - 1) / groups_of(layer, way, rows);
}

/* Weights to prefetch while others are used. With many rows the hardware prefetches too late. A single group of rows prefetches
   AHEAD bytes ahead; a whole number of pages would be slower by a tenth. Several groups each prefetch a share of the next tile. */
typedef struct {
    const char *at;
    int64_t pace;  /* bytes to prefetch per cache line of weights */
    int64_t chunk; /* inputs of a part of the tile; few rows take small parts, so that weights arrive while others are multiplied */
} Ahead;

INLINE Ahead ahead_of(const void *tile, int64_t bytes, int64_t group, int64_t groups) {
    const char *at = (const char *)tile + (groups == 1 ? AHEAD : bytes + group * bytes / groups);
    return (Ahead){at, LINE / groups, groups <= 2 ? CHUNK : 1 << 30};
}

/* Prefetches one line and advances by `lines` lines. */
INLINE void ask(Ahead *ahead, int lines) {
    __builtin_prefetch(ahead->at, 0, 2);
    ahead->at += lines * ahead->pace;
}

/* Input rows in the form that a layer multiplies, see `way_of`. */
typedef struct {
    const void *rows; /* see `store_input`; integers of eight bits; or, IN_PAIRS, inputs 0, 2, 1, 3 of every four */
    int way, type;    /* type of the model */
    const float *steps; /* of rounded inputs, [rows][in / 32]: the value of 1 */
    const void *sums; /* [rows][in / 16], beside numbers of few bits: the sums of inputs, int32 if they are rounded, else float */
} Rows;

/* Returns the weights of input i + k, of the outputs from `lane` on. i is even; k is 0 or 1. */
INLINE V weight_of(int type, const void *w, int64_t i, int k, int lane) {
    if (type != BF16) return load(type, w, (i + k) * TILE + lane);
    const uint16_t *pairs = (const uint16_t *)w + i * TILE + 2 * lane;
    return k ? v_odd(pairs) : v_even(pairs);
}

/* Adds the products of inputs `begin` to `end` - 1 to outputs first * LANES to (first + count) * LANES - 1 of a tile, for n rows.
   n count sums stay in registers, and each weight is loaded once. n, count, first and `type` are constants. Every output adds its
   products in the order of the inputs. */
INLINE void products_of(
    const int n, const int count, const int first, const int type, const void *x, const void *w, int64_t size, int64_t begin,
    int64_t end, Ahead *ahead, float (*out)[TILE]
) {
    const int lines = (type == F32 ? 4 : 2) * count / VECTORS; /* of the weights of two inputs */
    Ahead next = *ahead;
    V sum[MOST_ROWS][VECTORS];
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < count; v++) sum[m][v] = begin ? v_load(out[m] + (first + v) * LANES) : v_set(0);
    for (int64_t i = begin; i < end; i += 2) {
        for (int line = 0; line < lines; line += n > PAIR_ROWS ? 1 : 2) ask(&next, n > PAIR_ROWS ? 1 : 2);
#if PAIRED
        if (type == BF16) {
            P pairs[VECTORS];
            UNROLL
            for (int v = 0; v < count; v++) pairs[v] = p_load((const uint16_t *)w + i * TILE + (first + v) * LANES * 2);
            UNROLL
            for (int m = 0; m < n; m++)
                UNROLL
                for (int v = 0; v < count; v++) sum[m][v] = p_dot(sum[m][v], pairs[v], (const uint16_t *)x + m * size + i);
            continue;
        }
#endif
        UNROLL
        for (int k = 0; k < 2; k++) {
            V weights[VECTORS];
            UNROLL
            for (int v = 0; v < count; v++) weights[v] = weight_of(type, w, i, k, (first + v) * LANES);
            UNROLL
            for (int m = 0; m < n; m++) {
                const V number = v_set(((const float *)x)[m * size + i + k]);
                UNROLL
                for (int v = 0; v < count; v++) sum[m][v] = v_fma(weights[v], number, sum[m][v]);
            }
        }
    }
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < count; v++) v_store(out[m] + (first + v) * LANES, sum[m][v]);
    *ahead = next;
}

/* Computes all outputs of a tile: at once, or half of them after the other half where registers are few. The halves take turns
   after `ahead.chunk` inputs. */
INLINE void tile_of(const int n, const int type, const void *x, const void *w, int64_t size, Ahead ahead, float (*out)[TILE]) {
    enum { HALF = VECTORS / 2 };
    if (n <= WIDE_ROWS) products_of(n, VECTORS, 0, type, x, w, size, 0, size, &ahead, out);
    else
        for (int64_t i = 0; i < size; i += ahead.chunk) {
            products_of(n, HALF, 0, type, x, w, size, i, least(i + ahead.chunk, size), &ahead, out);
            products_of(n, HALF, HALF, type, x, w, size, i, least(i + ahead.chunk, size), &ahead, out);
        }
}

#include "quantized.h"

/* Returns the bytes of the weights of 32 outputs. */
INLINE int64_t tile_bytes(const Linear *layer) {
    return layer->in * (layer->type == NUMBERS ? TILE * layer->bits / 8 : TILE * size_of((int)layer->type));
}

#define TYPED_TILES(NAME, TYPE) \
    static void NAME(int n, const void *x, const void *w, int64_t size, Ahead ahead, float (*out)[TILE]) { \
        switch (n) { ROW_CASES(TYPE) } \
    }
#define CASE(N, TYPE) case N: tile_of(N, TYPE, x, w, size, ahead, out); break;
#define BF16_CASE(N) CASE(N, BF16)
#define F16_CASE(N) CASE(N, F16)
#define F32_CASE(N) CASE(N, F32)
TYPED_TILES(bf16_tile, BF16_CASE)
TYPED_TILES(f16_tile, F16_CASE)
TYPED_TILES(f32_tile, F32_CASE)

#define BITS_CASES(CALL) CALL(4) CALL(5) CALL(6) CALL(8)

static void rounded_tile(int n, const Rows *x, int64_t row, const Linear *layer, int64_t tile, Ahead ahead, float (*out)[TILE]) {
    switch (n * 16 + (int)layer->bits) {
#define ROUNDED_CASE(N, BITS) case N * 16 + BITS: rounded_tile_of(N, BITS, x, row, layer, tile, ahead, out); break;
#define ROUNDED_BITS(N) ROUNDED_CASE(N, 4) ROUNDED_CASE(N, 5) ROUNDED_CASE(N, 6) ROUNDED_CASE(N, 8)
        ROUNDED_ROW_CASES(ROUNDED_BITS)
    }
}

static void exact_tile(int n, const float *x, const Linear *layer, int64_t tile, Ahead ahead, float (*out)[TILE]) {
    switch (n * 16 + (int)layer->bits) {
#define EXACT_CASE(N, BITS) case N * 16 + BITS: exact_tile_of(N, BITS, x, layer, tile, ahead, out); break;
#define EXACT_BITS(N) EXACT_CASE(N, 4) EXACT_CASE(N, 5) EXACT_CASE(N, 6) EXACT_CASE(N, 8)
        EXACT_BITS(1) EXACT_BITS(2)
    }
}

#if PAIRED
static void paired_part(
    int n, int mode, const uint16_t *x, const float *sums, P *kept, const Linear *layer, int64_t tile, int64_t begin, int64_t end,
    Ahead *ahead, float (*out)[TILE]
) {
    switch ((n * 4 + mode) * 16 + (mode == KEPT ? 4 : (int)layer->bits)) {
#define PART_OF(N, MODE, BITS) \
    case (N * 4 + MODE) * 16 + BITS: \
        paired_part_of(N, BITS, MODE, x, sums, kept, layer, tile, begin, end, ahead, out); \
        break;
#define KEPT_PARTS(N) PART_OF(N, KEPT, 4)
#define DIRECT_PARTS(N) PART_OF(N, DIRECT, 4) PART_OF(N, DIRECT, 5) PART_OF(N, DIRECT, 6) PART_OF(N, DIRECT, 8)
#define KEEPING_PARTS(N) PART_OF(N, KEEPING, 4) PART_OF(N, KEEPING, 5) PART_OF(N, KEEPING, 6) PART_OF(N, KEEPING, 8)
        HALF_ROW_CASES(KEPT_PARTS)
        HALF_ROW_CASES(DIRECT_PARTS)
        KEEPING_PARTS(4) KEEPING_PARTS(5) KEEPING_PARTS(6)
        PART_OF(7, DIRECT, 4) PART_OF(8, DIRECT, 4) PART_OF(9, DIRECT, 4)
        PART_OF(10, DIRECT, 4) PART_OF(11, DIRECT, 4) PART_OF(12, DIRECT, 4)
    }
}

/* Several groups of rows use the numbers that the first of them has converted. */
static void paired_products(
    int64_t n, int64_t group, const Rows *x, int64_t row, const Linear *layer, int64_t tile, float (*out)[TILE]
) {
    const int64_t size = layer->in, units = size / SMALL_GROUP, span = n > group ? SPAN : size;
    const uint16_t *inputs = (const uint16_t *)x->rows + row * size;
    const float *sums = (const float *)x->sums + row * units;
    P kept[SPAN / STEP * VECTORS * 2];
    Ahead ahead = ahead_of((const char *)layer->weight + tile * tile_bytes(layer), tile_bytes(layer), 0, 1);
    for (int64_t begin = 0; begin < size; begin += span)
        for (int64_t m = 0; m < n; m += group) {
            const int some = (int)least(group, n - m), mode = n <= group ? DIRECT : m ? KEPT : KEEPING;
            const int64_t end = least(begin + span, size);
            paired_part(some, mode, inputs + m * size, sums + m * units, kept, layer, tile, begin, end, &ahead, out + m);
        }
}
#endif

/* From PACKED_ROWS on, on sets that multiply single numbers: DEPTH weights of some vectors of outputs are converted to float32, and serve a
   block of rows. They fill 16 KB, half of an L1 cache. The inputs of a group of rows are packed, input after input. So both are
   read in the order in which they are stored. */
enum { MOST_BLOCK = 192, ABREAST = MOST_ROWS <= WIDE_ROWS ? VECTORS : VECTORS / 2, DEPTH = 4096 / (ABREAST * LANES) };

typedef struct {
    const float *x;
    float *packed;
    int64_t rows, group, size;
} Packing;

/* Packs the inputs of one group of rows, [rows][size] to [size][rows]. */
static void pack_group(const void *given, int64_t piece, int id) {
    const Packing *job = given;
    const int64_t row = piece * job->group, n = least(job->group, job->rows - row);
    float *to = job->packed + row * job->size;
    (void)id;
    for (int64_t i = 0; i < job->size; i++)
        for (int64_t m = 0; m < n; m++) *to++ = job->x[(row + m) * job->size + i];
}

/* Converts the weights of inputs `begin` to `end` - 1 and ABREAST vectors of outputs, from vector `first` on. */
INLINE void unpack(const int type, const void *w, int64_t begin, int64_t end, int first, float *out) {
    for (int64_t i = begin; i < end; i += 2) {
        const char *next = (const char *)w + (i + DEPTH) * TILE * size_of(type);
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + LINE, 0, 2);
        for (int k = 0; k < 2; k++)
            for (int v = 0; v < ABREAST; v++, out += LANES) v_store(out, weight_of(type, w, i, k, (first + v) * LANES));
    }
}

/* Adds the products of `count` packed inputs of n rows. If `begin` is 0, they are the first of their sums. n is a constant. */
INLINE void part_of(const int n, const float *x, const float *w, int first, int64_t begin, int64_t count, float (*out)[TILE]) {
    V sum[MOST_ROWS][ABREAST];
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < ABREAST; v++) sum[m][v] = begin ? v_load(out[m] + (first + v) * LANES) : v_set(0);
    for (int64_t i = 0; i < count; i++, x += n, w += ABREAST * LANES) {
        V weights[ABREAST];
        UNROLL
        for (int v = 0; v < ABREAST; v++) weights[v] = v_load(w + v * LANES);
        UNROLL
        for (int m = 0; m < n; m++) {
            const V number = v_set(x[m]);
            UNROLL
            for (int v = 0; v < ABREAST; v++) sum[m][v] = v_fma(weights[v], number, sum[m][v]);
        }
    }
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < ABREAST; v++) v_store(out[m] + (first + v) * LANES, sum[m][v]);
}

static void packed_part(int64_t n, const float *x, const float *w, int first, int64_t begin, int64_t count, float (*out)[TILE]) {
    switch (n) {
#define PART_CASE(N) case N: part_of(N, x, w, first, begin, count, out); break;
        ROW_CASES(PART_CASE)
    }
}

static void unpack_numbers(const Linear *layer, int64_t tile, int64_t begin, int64_t end, int first, float *out) {
    switch (layer->bits) {
#define UNPACK_CASE(BITS) case BITS: unpack_numbers_of(BITS, layer, tile, begin, end, first, ABREAST, out); break;
        BITS_CASES(UNPACK_CASE)
    }
}

static void packed_products(int64_t n, int64_t group, const float *x, const Linear *layer, int64_t tile, float (*out)[TILE]) {
    const void *w = (const char *)layer->weight + tile * tile_bytes(layer);
    float space[DEPTH * ABREAST * LANES];
    for (int64_t begin = 0; begin < layer->in; begin += DEPTH)
        for (int first = 0; first < VECTORS; first += ABREAST) {
            const int64_t end = least(begin + DEPTH, layer->in);
            switch (layer->type) {
            case BF16: unpack(BF16, w, begin, end, first, space); break;
            case F16: unpack(F16, w, begin, end, first, space); break;
            case F32: unpack(F32, w, begin, end, first, space); break;
            default: unpack_numbers(layer, tile, begin, end, first, space);
            }
            for (int64_t row = 0; row < n; row += group) {
                const int64_t some = least(group, n - row);
                packed_part(some, x + row * layer->in + begin * some, space, first, begin, end - begin, out + row);
            }
        }
}

#ifdef USE_AMX
#include "tiles.h"
#endif

/* Returns the number of rows whose outputs of a tile are computed together: some groups. */
INLINE int64_t block_of(const Linear *layer, int way, int64_t rows) {
#ifdef USE_AMX
    if (layer->type == BF16) return MOST_BLOCK;
#endif
    return MOST_BLOCK / group_of(layer, way, rows) * group_of(layer, way, rows);
}

/* Computes the outputs of a tile for n rows from `row` on, a block of all `count` rows. */
static void products(int64_t n, const Rows *x, int64_t row, int64_t count, const Linear *layer, int64_t tile, float (*out)[TILE]) {
    const int64_t size = layer->in, bytes = tile_bytes(layer);
    const int64_t group = group_of(layer, x->way, count), groups = groups_of(layer, x->way, count);
    const void *w = (const char *)layer->weight + tile * bytes;
#ifdef USE_AMX
    if (layer->type == BF16) tile_products(n, (const uint16_t *)x->rows + row * size, w, size, row, count, out);
    else
#endif
#if PAIRED
    if (x->way == IN_PAIRS) paired_products(n, group, x, row, layer, tile, out);
    else
#endif
    if (x->way == PACKED) packed_products(n, group, (const float *)x->rows + row * size, layer, tile, out);
    else
        for (int64_t m = 0; m < n; m += group) {
            const Ahead ahead = ahead_of(w, bytes, (row + m) / group, groups);
            const void *from = input_at(x->type, x->rows, (row + m) * size);
            const int some = (int)least(group, n - m);
            if (x->way == ROUNDED) rounded_tile(some, x, row + m, layer, tile, ahead, out + m);
            else
                switch (layer->type) {
                case BF16: bf16_tile(some, from, w, size, ahead, out + m); break;
                case F16: f16_tile(some, from, w, size, ahead, out + m); break;
                case F32: f32_tile(some, from, w, size, ahead, out + m); break;
                default: exact_tile(some, from, layer, tile, ahead, out + m);
                }
        }
    if (layer->bias == NULL) return;
    for (int64_t m = 0; m < n; m++)
        for (int64_t o = 0; o < TILE && tile * TILE + o < layer->out; o++) out[m][o] += layer->bias[tile * TILE + o];
}

/* Runs a phase over rows of some `numbers` each. The caller runs a short phase alone: to share it takes some 2 us. */
enum { SHORT = 1 << 15 };

static void over_rows(int64_t threads, Piece *piece, const void *given, int64_t rows, int64_t numbers) {
    parallel(rows * numbers > SHORT ? threads : 1, piece, given, rows);
}

/* Returns a layer with `count` outputs of another, from `first` on. `first` is a multiple of 32. */
INLINE Linear outputs(const Linear *layer, int64_t first, int64_t count) {
    Linear some = *layer;
    some.weight = (const char *)layer->weight + first / TILE * tile_bytes(layer), some.out = count;
    if (layer->bias) some.bias += first;
    if (layer->type == NUMBERS) {
        some.scales = (const char *)layer->scales + first / TILE * scale_bytes(layer);
        if (layer->more) some.more = (const char *)layer->more + first / TILE * more_bytes(layer);
    }
    return some;
}

INLINE int64_t tiles_of(const Linear *layer) { return (layer->out + TILE - 1) / TILE; }

/* The threads of a linear layer, the type of its inputs, and two buffers for inputs that are converted, see `room_of`. */
typedef struct {
    int64_t threads, type;
    void *room[2];
} Workspace;

/* Returns the bytes that `inputs` needs for rows. */
INLINE int64_t room_of(int64_t rows, int64_t size) { return rows * size * 4; }

typedef struct {
    int64_t type, size, shifted;
    const void *x;
    void *numbers, *sums;
    float *steps;
} Conversion;

/* Rounds a row to integers from -127 to 127; NaN becomes -128. 32 inputs share a step. */
static void round_piece(const void *given, int64_t row, int id) {
    const Conversion *job = given;
    int8_t *numbers = job->numbers;
    int32_t *sums = job->sums;
    (void)id;
    for (int64_t at = row * job->size; at < (row + 1) * job->size; at += TILE) {
        V x[VECTORS], extent = v_set(0);
        for (int v = 0; v < VECTORS; v++) {
            x[v] = load_input((int)job->type, job->x, at + v * LANES);
            extent = v_max(v_max(x[v], v_sub(v_set(0), x[v])), extent); /* NaN counts as 0 */
        }
        const float largest = largest_of(extent), steps = largest > 0 ? 127 / largest : 0;
        float whole[TILE];
        for (int v = 0; v < VECTORS; v++) {
            const V value = v_max(v_round(v_mul(x[v], v_set(steps))), v_set(-128));
            v_store(whole + v * LANES, v_sub(v_set(0), v_max(v_sub(v_set(0), value), v_set(-127))));
        }
        for (int half = 0; half < 2; half++) {
            int32_t sum = 0;
            for (int i = half * SMALL_GROUP; i < (half + 1) * SMALL_GROUP; i++)
                numbers[at + i] = (int8_t)whole[i], sum += (int32_t)whole[i];
            sums[at / SMALL_GROUP + half] = sum;
        }
        job->steps[at / TILE] = largest / 127;
    }
}

/* Reorders the bf16 inputs of a row to 0, 2, 1, 3 of every four. Adds up 16 inputs at a time if the layer needs the sums. */
static void reorder_piece(const void *given, int64_t row, int id) {
    const Conversion *job = given;
    const uint16_t *x = (const uint16_t *)job->x + row * job->size;
    uint16_t *to = (uint16_t *)job->numbers + row * job->size;
    float *sums = (float *)job->sums + row * (job->size / SMALL_GROUP);
    (void)id;
    for (int64_t i = 0; i < job->size; i += STEP) to[i] = x[i], to[i + 1] = x[i + 2], to[i + 2] = x[i + 1], to[i + 3] = x[i + 3];
    for (int64_t i = 0; job->shifted && i < job->size / SMALL_GROUP; i++) {
        float sum = 0;
        for (int k = 0; k < SMALL_GROUP; k++) sum += float_of_bf16(x[i * SMALL_GROUP + k]);
        sums[i] = sum;
    }
}

/* Converts inputs to the form that `layer` multiplies. */
static Rows inputs(const Workspace *workspace, const Linear *layer, const void *x, int64_t rows, int room) {
    const int type = (int)workspace->type, way = way_of(layer, type, rows);
    if (way == AS_GIVEN) return (Rows){.rows = x, .way = way, .type = type};
    if (way == PACKED) {
        const int64_t group = group_of(layer, way, rows);
        Packing job = {.x = x, .packed = workspace->room[room], .rows = rows, .group = group, .size = layer->in};
        parallel(workspace->threads, pack_group, &job, (rows + group - 1) / group);
        return (Rows){.rows = job.packed, .way = way, .type = type};
    }
    Conversion job = {.type = type, .size = layer->in, .x = x, .steps = workspace->room[room], .shifted = is_shifted(layer)};
    job.sums = job.steps + rows * layer->in / TILE, job.numbers = (float *)job.sums + rows * layer->in / SMALL_GROUP;
    over_rows(workspace->threads, way == ROUNDED ? round_piece : reorder_piece, &job, rows, 2 * layer->in);
    return (Rows){.rows = job.numbers, .way = way, .type = type, .steps = job.steps, .sums = job.sums};
}

typedef struct {
    const Linear *layer, *other;
    Rows x, gate_x;
    int64_t rows, stride, pieces, type;
    float *y;
    void *act;
    int add;
} Product;

static void linear_tile(const Product *job, int64_t tile) {
    const Linear *layer = job->layer;
    float out[MOST_BLOCK][TILE];
    for (int64_t row = 0, block = block_of(layer, job->x.way, job->rows); row < job->rows; row += block) {
        const int64_t n = least(block, job->rows - row), width = least(TILE, layer->out - tile * TILE);
        products(n, &job->x, row, job->rows, layer, tile, out);
        for (int64_t m = 0; m < n; m++) {
            float *to = job->y + (row + m) * job->stride + tile * TILE;
            for (int64_t o = 0; o < width; o += LANES) {
                const V value = v_load(out[m] + o);
                v_store_some(to + o, job->add ? v_add(v_load_some(to + o, width - o), value) : value, width - o);
            }
        }
    }
}

/* Returns the number of rows for which both layers of a gate compute a tile, a multiple of the groups of both. */
INLINE int64_t common_block(const Product *job) {
    const int64_t block = block_of(job->other, job->x.way, job->rows), gate_block = block_of(job->layer, job->gate_x.way, job->rows);
    const int64_t group = group_of(job->other, job->x.way, job->rows) * group_of(job->layer, job->gate_x.way, job->rows);
    return block == gate_block ? block : most(1, MOST_BLOCK / group) * group;
}

static void gated_tile(const Product *job, int64_t tile) {
    const Linear *gate = job->layer, *up = job->other;
    float g[MOST_BLOCK][TILE], u[MOST_BLOCK][TILE];
    for (int64_t row = 0, block = common_block(job); row < job->rows; row += block) {
        const int64_t n = least(block, job->rows - row);
        products(n, &job->gate_x, row, job->rows, gate, tile, g);
        products(n, &job->x, row, job->rows, up, tile, u);
        for (int64_t m = 0; m < n; m++)
            for (int64_t o = 0; o < TILE; o += LANES) {
                const V value = v_mul(silu(v_load(g[m] + o)), v_load(u[m] + o));
                store_input((int)job->type, job->act, (row + m) * gate->out + tile * TILE + o, value);
            }
    }
}

/* Returns the first tile of a piece. Pieces differ by one tile at most, and a longer one is the first. */
INLINE int64_t first_tile(const Product *job, int64_t piece) { return (piece * tiles_of(job->layer) + job->pieces - 1) / job->pieces; }

/* Runs consecutive tiles, so that the prefetched weights are those of the next tile. */
static void tiles_piece(const void *given, int64_t piece, int id) {
    const Product *job = given;
    (void)id;
    for (int64_t tile = first_tile(job, piece); tile < first_tile(job, piece + 1); tile++)
        if (job->other) gated_tile(job, tile);
        else linear_tile(job, tile);
}

/* Runs all tiles, in several pieces per thread, so that other threads can help a delayed one. In a prompt, each tile is long enough
   to be a piece. */
static void run_tiles(const Workspace *workspace, Product *job) {
    const int64_t tiles = tiles_of(job->layer);
    if (job->rows == 0) return;
    job->pieces = job->rows >= MOST_BLOCK ? tiles : least(tiles, workspace->threads * PARTS), job->type = workspace->type;
    parallel(workspace->threads, tiles_piece, job, job->pieces);
}

static void run_linear(const Workspace *workspace, Product job, const void *x) {
    job.x = inputs(workspace, job.layer, x, job.rows, 0);
    run_tiles(workspace, &job);
}

/* y = x W^T + b. Rows of y are `stride` numbers apart. */
static void linear_into(const Workspace *workspace, const Linear *layer, const void *x, int64_t rows, float *y, int64_t stride) {
    run_linear(workspace, (Product){.layer = layer, .rows = rows, .y = y, .stride = stride}, x);
}

/* y = x W^T + b, or y += x W^T + b if `add`. */
static void linear(const Workspace *workspace, const Linear *layer, const void *x, int64_t rows, float *y, int add) {
    run_linear(workspace, (Product){.layer = layer, .rows = rows, .y = y, .stride = layer->out, .add = add}, x);
}

/* act = silu(gate(gate_x)) * up(x) */
static void gated(
    const Workspace *workspace, const Linear *gate, const Linear *up, const void *gate_x, const void *x, int64_t rows, void *act
) {
    Product job = {.layer = gate, .other = up, .rows = rows, .act = act};
    const int same = way_of(gate, (int)workspace->type, rows) == way_of(up, (int)workspace->type, rows);
    job.x = inputs(workspace, up, x, rows, 0);
    job.gate_x = gate_x == x && same && is_shifted(up) >= is_shifted(gate) ? job.x : inputs(workspace, gate, gate_x, rows, 1);
    run_tiles(workspace, &job);
}
