/* Attention of the rows of a step over their visible tokens. set.c includes this file after job.h. */

/* Most rows, most queries, and most queries in registers that attend together. The rows of a tree see the same committed tokens,
   whose keys and values are read and laid out once for several rows. */
enum { SEERS = 8, MOST_QUERIES = 24, AT_ONCE = 8 };

/* The visible tokens of a row by position: contiguous tokens starting at `from`, then the rest of its path. The row is last. */
typedef struct {
    int64_t from, committed, count; /* the first `committed` of `count` tokens are contiguous */
    const int64_t *path;            /* places of the other tokens */
} View;

/* Makes the view of a row. `path` holds at least depth + 1 entries. */
static View view_of(const Job *job, int64_t row, int64_t window, int64_t *path) {
    const Step *s = job->step;
    const int64_t tree = job->tree[row], length = s->lengths[tree], *parents = s->parents + s->offsets[tree];
    const int64_t depth = job->depth[s->offsets[tree] + job->node[row]], seen = length + depth + 1;
    const int64_t hidden = seen > window ? seen - window : 0; /* number of tokens before the window */
    /* In a chain, such as a prompt, all tokens are contiguous. */
    if (depth == job->node[row]) return (View){.from = hidden, .committed = seen - hidden, .count = seen - hidden, .path = path};
    int64_t above = depth + 1;
    for (int64_t node = job->node[row]; node >= 0; node = parents[node]) path[--above] = length + node;
    View view = {.from = least(hidden, length), .count = seen - hidden};
    view.committed = length - view.from, view.path = path + (hidden - view.from);
    while (view.committed < view.count && *view.path == view.from + view.committed) view.committed++, view.path++;
    return view;
}

/* The keys or values of one head in one layer of the pool. */
typedef struct {
    const Step *step;
    const void *cells;
    int64_t tree, start, size; /* start: of this layer and head; size: numbers of a token */
} Cells;

/* Returns where the i-th visible token stands. */
INLINE int64_t entry(const View *view, const Cells *pool, int64_t i) {
    const int64_t position = i < view->committed ? view->from + i : view->path[i - view->committed];
    return pool->start + place_of(pool->step, pool->tree, position, pool->size);
}

#if PAIRED
#define WORDS(laid) (laid).pairs
#else
#define WORDS(laid) (laid).numbers
#endif

/* Fetches `count` tokens from the i-th visible token on. Blocks that follow each other in a text are apart in memory, so the
   hardware does not fetch them in advance. A processor waits for few lines at once, so fetches are spread over the work. */
INLINE void fetch(const int type, const View *view, const Cells *pool, int64_t i, int64_t count) {
    if (count == 0 || i + count > view->committed) return; /* with one lane, half of the lanes is 0 */
    const char *at = (const char *)pool->cells + entry(view, pool, i) * size_of(type);
    for (int64_t line = 0; line < count * pool->size * size_of(type); line += 64) __builtin_prefetch(at + line);
}

/* Keys of LANES tokens, laid out for products with queries. */
typedef union {
    V *numbers; /* [size]: number d of every token */
#if PAIRED
    P *pairs; /* [size / 2]: numbers 2 d and 2 d + 1 */
#endif
} Laid;

/* Lays out the keys of up to LANES tokens from `i` on. Lanes beyond `count` repeat the last token. */
INLINE void lay_keys(const int type, const View *view, const Cells *keys, int64_t i, int64_t count, Laid laid) {
    int64_t at[LANES];
    if (i + count <= view->committed && (view->from + i) % BLOCK + count <= BLOCK) { /* in one block, so contiguous */
        const int64_t first = entry(view, keys, i);
        for (int64_t j = 0; j < LANES; j++) at[j] = first + least(j, count - 1) * keys->size;
    } else
        for (int64_t j = 0; j < LANES; j++) at[j] = entry(view, keys, i + least(j, count - 1));
    if (type == BF16) {
        const uint16_t *rows[LANES];
        for (int j = 0; j < LANES; j++) rows[j] = (const uint16_t *)keys->cells + at[j];
        for (int64_t d = 0; d < keys->size; d += 2 * LANES) w_transpose(rows, d, WORDS(laid) + (PAIRED ? d / 2 : d));
    } else
        for (int64_t d = 0; d < keys->size; d += LANES) {
            UNROLL
            for (int j = 0; j < LANES; j++) laid.numbers[d + j] = load(type, keys->cells, at[j] + d);
            v_transpose(laid.numbers + d);
        }
}

/* Computes the scores of n queries with the laid-out keys, [n][room]. n and `paired` are constants. */
INLINE void scores_of(
    const int n, const int paired, const void *const *queries, Laid laid, int64_t size, int64_t count, float *scores, int64_t room
) {
    const V scale = v_set(1.0f / sqrtf((float)size));
    V sums[AT_ONCE];
    (void)paired;
    UNROLL
    for (int q = 0; q < n; q++) sums[q] = v_set(0);
#if PAIRED
    if (paired)
        for (int64_t d = 0; d < size; d += 2)
            UNROLL
            for (int q = 0; q < n; q++) sums[q] = p_dot(sums[q], laid.pairs[d / 2], (const uint16_t *)queries[q] + d);
    else
#endif
        for (int64_t d = 0; d < size; d++)
            UNROLL
            for (int q = 0; q < n; q++) sums[q] = v_fma(laid.numbers[d], v_set(((const float *)queries[q])[d]), sums[q]);
    UNROLL
    for (int q = 0; q < n; q++) v_store_some(scores + q * room, v_mul(sums[q], scale), count);
}

/* `scores` has room for a multiple of 16 numbers. */
static void softmax(int64_t count, float *scores) {
    V highest = v_set(-INFINITY), total[PER_GROUP];
    for (int v = 0; v < PER_GROUP; v++) total[v] = v_set(0);
    for (int64_t i = 0; i < count; i += LANES) {
        if (count - i < LANES)
            for (int64_t j = count; j < i + LANES; j++) scores[j] = -INFINITY;
        highest = v_max(highest, v_load(scores + i));
    }
    highest = v_set(largest_of(highest));
    for (int64_t i = 0; i < count; i += GROUP)
        for (int v = 0; v < PER_GROUP && i + v * LANES < count; v++) {
            const int64_t at = i + v * LANES;
            const V e = v_first(exponential(v_sub(v_load(scores + at), highest)), count - at);
            total[v] = v_add(total[v], e);
            v_store(scores + at, e);
        }
    const V share = v_set(1.0f / sum_of(total));
    for (int64_t i = 0; i < count; i += LANES) v_store(scores + i, v_mul(v_load(scores + i), share));
}

/* A query, its view and its output. */
typedef struct {
    const void *query;
    const View *view;
    void *out;
} Seer;

/* Most columns that are summed at once, and the divisor of every head's size. */
enum { WIDE = 64, WIDTH = 32, COLUMNS = WIDE / LANES };

/* Vectors of values, at most `width` columns, that are summed at once for n queries, so that the sums stay in registers. */
INLINE int vectors_of(int n, int width) {
    int count = width / LANES;
    while (count > 1 && n * count > SUMS) count /= 2;
    return count;
}

/* Computes `count` vectors of numbers, from d on, of the weighted sums of values for n queries. n, count and `type` are constants;
   weights are [n][room]. The views share their first `shared` tokens. */
INLINE void mixtures_of(
    const int n, const int count, const int type, const Seer *seers, int64_t shared, const float *weights, int64_t room,
    const Cells *values, int64_t d
) {
    V sums[AT_ONCE][COLUMNS];
    UNROLL
    for (int q = 0; q < n; q++)
        UNROLL
        for (int v = 0; v < count; v++) sums[q][v] = v_set(0);
    for (int64_t i = 0, end; i < shared; i = end) {
        end = least(shared, i + BLOCK - (seers->view->from + i) % BLOCK); /* tokens of a block are contiguous */
        int64_t at = entry(seers->view, values, i) + d;
        const int64_t ahead = end < shared ? entry(seers->view, values, end) + d - at : 0; /* to the next block */
        for (; i < end; i++, at += values->size) {
            const char *next = (const char *)values->cells + (at + ahead) * size_of(type);
            for (int line = 0; line < count * LANES * size_of(type); line += 64) __builtin_prefetch(next + line);
            V value[COLUMNS];
            UNROLL
            for (int v = 0; v < count; v++) value[v] = load(type, values->cells, at + v * LANES);
            UNROLL
            for (int q = 0; q < n; q++) {
                const V weight = v_set(weights[q * room + i]);
                UNROLL
                for (int v = 0; v < count; v++) sums[q][v] = v_fma(weight, value[v], sums[q][v]);
            }
        }
    }
    UNROLL
    for (int q = 0; q < n; q++) {
        for (int64_t i = shared; i < seers[q].view->count; i++) {
            const int64_t at = entry(seers[q].view, values, i) + d;
            const V weight = v_set(weights[q * room + i]);
            UNROLL
            for (int v = 0; v < count; v++) sums[q][v] = v_fma(weight, load(type, values->cells, at + v * LANES), sums[q][v]);
        }
        UNROLL
        for (int v = 0; v < count; v++) store_input(type, seers[q].out, d + v * LANES, sums[q][v]);
    }
}

/* Computes `mixtures_of` for all numbers of a head. */
INLINE void mixtures_of_all(
    const int n, const int type, const Seer *seers, int64_t shared, const float *weights, int64_t room, const Cells *values
) {
    const int wide = vectors_of(n, WIDE), narrow = vectors_of(n, WIDTH);
    int64_t d = 0;
    if (wide > narrow)
        for (; d + wide * LANES <= values->size; d += wide * LANES)
            mixtures_of(n, wide, type, seers, shared, weights, room, values, d);
    for (; d < values->size; d += narrow * LANES) mixtures_of(n, narrow, type, seers, shared, weights, room, values, d);
}

/* Calls CALL with n, at most AT_ONCE, as a constant. */
#define CASES(CALL) \
    switch (n) { \
        case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; case 4: CALL(4); break; \
        case 5: CALL(5); break; case 6: CALL(6); break; case 7: CALL(7); break; case 8: CALL(8); break; \
    }

/* Computes the scores of queries with up to LANES laid-out keys. */
static void score_keys(
    int type, const Seer *seers, int64_t count, Laid laid, int64_t size, int64_t there, float *scores, int64_t room
) {
    for (int64_t q = 0; q < count; q += AT_ONCE) {
        const int64_t n = least(AT_ONCE, count - q);
        const void *queries[AT_ONCE];
        for (int64_t i = 0; i < n; i++) queries[i] = seers[q + i].query;
#define CALL(N) \
    if (is_paired(type)) scores_of(N, 1, queries, laid, size, there, scores + q * room, room); \
    else scores_of(N, 0, queries, laid, size, there, scores + q * room, room)
        CASES(CALL)
#undef CALL
    }
}

/* Computes attention of `count` queries that share a key head. They are `heads` heads of each row, row after row, and their views
   start at the same token. Shared tokens are read once. Every result is the same as for a query alone. */
INLINE void attend(
    const int type, const Seer *seers, int64_t count, int64_t heads, const Cells *keys, const Cells *values, float *weights,
    int64_t room
) {
    V space[keys->size];
    const Laid laid = {.numbers = space};
    int64_t shared = seers->view->committed;
    for (int64_t q = 0; q < count; q += heads) shared = least(shared, seers[q].view->committed);
    for (int64_t i = 0; i < shared; i += LANES) {
        fetch(type, seers->view, keys, i + BLOCK, LANES / 2);
        lay_keys(type, seers->view, keys, i, least(LANES, shared - i), laid);
        fetch(type, seers->view, keys, i + BLOCK + LANES / 2, LANES / 2);
        score_keys(type, seers, count, laid, keys->size, least(LANES, shared - i), weights + i, room);
    }
    for (int64_t q = 0; q < count; q += heads)
        for (int64_t i = shared, end = seers[q].view->count; i < end; i += LANES) {
            lay_keys(type, seers[q].view, keys, i, least(LANES, end - i), laid);
            score_keys(type, seers + q, heads, laid, keys->size, least(LANES, end - i), weights + q * room + i, room);
        }
    fetch(type, seers->view, values, 0, BLOCK);
    for (int64_t q = 0; q < count; q++) softmax(seers[q].view->count, weights + q * room);
    for (int64_t q = 0; q < count; q += AT_ONCE) {
        const int64_t n = least(AT_ONCE, count - q);
#define CALL(N) mixtures_of_all(N, type, seers + q, shared, weights + q * room, room, values)
        CASES(CALL)
#undef CALL
    }
}

static void attend_bf16(const Seer *s, int64_t count, int64_t heads, const Cells *keys, const Cells *values, float *w, int64_t room) {
    attend(BF16, s, count, heads, keys, values, w, room);
}

static void attend_f16(const Seer *s, int64_t count, int64_t heads, const Cells *keys, const Cells *values, float *w, int64_t room) {
    attend(F16, s, count, heads, keys, values, w, room);
}

static void attend_f32(const Seer *s, int64_t count, int64_t heads, const Cells *keys, const Cells *values, float *w, int64_t room) {
    attend(F32, s, count, heads, keys, values, w, room);
}

/* Returns the number of rows that attend together. All groups have about the same size. */
INLINE int64_t rows_together(const Job *job) {
    const int64_t fitting = most(1, least(SEERS, MOST_QUERIES * job->model->kv_heads / job->model->heads));
    const int64_t parts = (job->count + fitting - 1) / fitting;
    return (job->count + parts - 1) / parts;
}

/* Computes attention of a group of rows for the query heads of one key head. */
static void attend_part(const void *given, int64_t part, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t index = ((const Phase *)given)->index, window = job->model->layers[index].window;
    const Model *m = job->model;
    const Step *s = job->step;
    const int64_t size = m->head_dim, group = m->heads / m->kv_heads, kv = part % m->kv_heads;
    const int64_t begin = part / m->kv_heads * rows_together(job), end = least(begin + rows_together(job), job->count);
    float *weights = job->weights + id * MOST_QUERIES * job->room;
    void (*run)(const Seer *, int64_t, int64_t, const Cells *, const Cells *, float *, int64_t) =
        job->type == BF16 ? attend_bf16 : job->type == F16 ? attend_f16 : attend_f32;
    for (int64_t row = begin, next = begin; row < end; row = next) {
        const int64_t tree = job->tree[row];
        int64_t deepest = 0;
        for (int64_t i = row; i < end && job->tree[i] == tree; i++)
            deepest = most(deepest, job->depth[s->offsets[tree] + job->node[i]]);
        int64_t paths[SEERS][deepest + 1];
        View views[SEERS];
        for (; next < end && job->tree[next] == tree; next++) {
            views[next - row] = view_of(job, next, window, paths[next - row]);
            if (views[next - row].from != views->from) break;
        }
        const Cells keys = {s, s->keys, tree, index * s->layer_stride + kv * s->head_stride, size};
        Cells values = keys;
        values.cells = s->values;
        for (int64_t h = 0, heads = least(group, MOST_QUERIES); h < group; h += heads) {
            Seer seers[MOST_QUERIES];
            const int64_t some = least(heads, group - h);
            for (int64_t q = 0; q < (next - row) * some; q++) {
                const int64_t at = ((row + q / some) * m->heads + kv * group + h + q % some) * size;
                seers[q] = (Seer){input_at(job->type, job->query, at), views + q / some, input_at(job->type, job->mixed, at)};
            }
            run(seers, (next - row) * some, some, &keys, &values, weights, job->room);
        }
    }
}
