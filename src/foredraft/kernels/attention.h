/* Attention of the rows of a step over their visible tokens. decoder.c includes this file after job.h. */

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
    int64_t above = depth + 1;
    for (int64_t node = job->node[row]; node >= 0; node = parents[node]) path[--above] = length + node;
    View view = {.from = least(hidden, length), .count = seen - hidden};
    view.committed = length - view.from, view.path = path + (hidden - view.from);
    while (view.committed < view.count && *view.path == view.from + view.committed) view.committed++, view.path++;
    return view;
}

INLINE const bf16 *entry(const View *view, const bf16 *pool, int64_t i, int64_t size) {
    return pool + (i < view->committed ? view->from + i : view->path[i - view->committed]) * size;
}

INLINE __mmask16 first_of(int64_t count) { return (__mmask16)(count >= 16 ? 0xFFFF : (1 << count) - 1); }

/* Transposes 16 vectors of 16 numbers. */
INLINE void transpose(const __m512i *x, __m512i *out) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2)
        a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i c = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), d = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        __m512i e = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD), f = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
        out[i] = _mm512_shuffle_i32x4(c, d, 0x88), out[i + 8] = _mm512_shuffle_i32x4(c, d, 0xDD);
        out[i + 4] = _mm512_shuffle_i32x4(e, f, 0x88), out[i + 12] = _mm512_shuffle_i32x4(e, f, 0xDD);
    }
}

/* Lays out the keys of up to 16 tokens from `i` on: [size / 2][16][2]. */
static void lay_keys(const View *view, const bf16 *keys, int64_t i, int64_t count, int64_t size, __m512i *laid) {
    for (int64_t d = 0; d < size; d += 32) {
        __m512i rows[16];
        for (int64_t j = 0; j < 16; j++)
            rows[j] = j < count ? _mm512_loadu_si512(entry(view, keys, i + j, size) + d) : _mm512_setzero_si512();
        transpose(rows, laid + d / 2);
    }
}

/* Computes the scores of n queries with the laid-out keys, [n][room]. n is a constant. */
INLINE void scores_of(
    const int n, const bf16 *const *queries, const __m512i *laid, int64_t size, __mmask16 there, float *scores, int64_t room
) {
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)size));
    __m512 sums[AT_ONCE];
#pragma GCC unroll 8
    for (int q = 0; q < n; q++) sums[q] = _mm512_setzero_ps();
    for (int64_t d = 0; d < size; d += 2)
#pragma GCC unroll 8
        for (int q = 0; q < n; q++)
            sums[q] = _mm512_dpbf16_ps(sums[q], (__m512bh)laid[d / 2], (__m512bh)four_bytes(queries[q] + d));
#pragma GCC unroll 8
    for (int q = 0; q < n; q++) _mm512_mask_storeu_ps(scores + q * room, there, _mm512_mul_ps(sums[q], scale));
}

static void softmax(int64_t count, float *scores) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 highest = none, total = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16)
        highest = _mm512_max_ps(highest, _mm512_mask_loadu_ps(none, first_of(count - i), scores + i));
    highest = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 there = first_of(count - i);
        __m512 e = _mm512_maskz_mov_ps(there, exponential(_mm512_sub_ps(_mm512_mask_loadu_ps(none, there, scores + i), highest)));
        total = _mm512_add_ps(total, e);
        _mm512_storeu_ps(scores + i, e);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t i = 0; i < count; i += 16) _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), share));
}

/* A query, its view and its output. */
typedef struct {
    const bf16 *query;
    const View *view;
    bf16 *out;
} Seer;

/* Computes 32 entries, from d on, of the weighted sums of values for n queries. n is a constant; weights are [n][room]. The views
   share their first `shared` tokens. */
INLINE void mixtures_of(
    const int n, const Seer *seers, int64_t shared, const float *weights, int64_t room, const bf16 *values, int64_t size, int64_t d
) {
    __m512 low[AT_ONCE], high[AT_ONCE];
    const bf16 *value = values + seers->view->from * size + d;
#pragma GCC unroll 8
    for (int q = 0; q < n; q++) low[q] = high[q] = _mm512_setzero_ps();
    for (int64_t i = 0; i < shared; i++, value += size) {
        __m512 first = widen(value), second = widen(value + 16);
#pragma GCC unroll 8
        for (int q = 0; q < n; q++) {
            __m512 weight = _mm512_set1_ps(weights[q * room + i]);
            low[q] = _mm512_fmadd_ps(weight, first, low[q]), high[q] = _mm512_fmadd_ps(weight, second, high[q]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < n; q++) {
        for (int64_t i = shared; i < seers[q].view->count; i++) {
            const bf16 *own = entry(seers[q].view, values, i, size) + d;
            __m512 weight = _mm512_set1_ps(weights[q * room + i]);
            low[q] = _mm512_fmadd_ps(weight, widen(own), low[q]), high[q] = _mm512_fmadd_ps(weight, widen(own + 16), high[q]);
        }
        narrow(seers[q].out + d, low[q]), narrow(seers[q].out + d + 16, high[q]);
    }
}

/* Calls CALL with n, at most AT_ONCE, as a constant. */
#define CASES(CALL) \
    switch (n) { \
        case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; case 4: CALL(4); break; \
        case 5: CALL(5); break; case 6: CALL(6); break; case 7: CALL(7); break; case 8: CALL(8); break; \
    }

/* Computes the scores of queries with up to 16 laid-out keys. */
static void score_keys(
    const Seer *seers, int64_t count, const __m512i *laid, int64_t size, __mmask16 there, float *scores, int64_t room
) {
    for (int64_t q = 0; q < count; q += AT_ONCE) {
        const int64_t n = least(AT_ONCE, count - q);
        const bf16 *queries[AT_ONCE];
        for (int64_t i = 0; i < n; i++) queries[i] = seers[q + i].query;
#define CALL(N) scores_of(N, queries, laid, size, there, scores + q * room, room)
        CASES(CALL)
#undef CALL
    }
}

/* Computes attention of `count` queries that share a key head. They are `heads` heads of each row, row after row, and their views
   start at the same token. Shared tokens are read once. Every result is the same as for a query alone. */
static void attend(
    const Seer *seers, int64_t count, int64_t heads, const bf16 *keys, const bf16 *values, int64_t size, float *weights,
    int64_t room
) {
    __m512i laid[size / 2];
    int64_t shared = seers->view->committed;
    for (int64_t q = 0; q < count; q += heads) shared = least(shared, seers[q].view->committed);
    for (int64_t i = 0; i < shared; i += 16) {
        lay_keys(seers->view, keys, i, least(16, shared - i), size, laid);
        score_keys(seers, count, laid, size, first_of(shared - i), weights + i, room);
    }
    for (int64_t q = 0; q < count; q += heads)
        for (int64_t i = shared, end = seers[q].view->count; i < end; i += 16) {
            lay_keys(seers[q].view, keys, i, least(16, end - i), size, laid);
            score_keys(seers + q, heads, laid, size, first_of(end - i), weights + q * room + i, room);
        }
    for (int64_t q = 0; q < count; q++) softmax(seers[q].view->count, weights + q * room);
    for (int64_t d = 0; d < size; d += 32)
        for (int64_t q = 0; q < count; q += AT_ONCE) {
            const int64_t n = least(AT_ONCE, count - q);
#define CALL(N) mixtures_of(N, seers + q, shared, weights + q * room, room, values, size, d)
            CASES(CALL)
#undef CALL
        }
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
        const bf16 *keys = stored(s, s->keys, index, tree, kv), *values = stored(s, s->values, index, tree, kv);
        for (int64_t h = 0, heads = least(group, MOST_QUERIES); h < group; h += heads) {
            Seer seers[MOST_QUERIES];
            const int64_t some = least(heads, group - h);
            for (int64_t q = 0; q < (next - row) * some; q++) {
                const int64_t at = ((row + q / some) * m->heads + kv * group + h + q % some) * size;
                seers[q] = (Seer){job->query + at, views + q / some, job->mixed + at};
            }
            attend(seers, (next - row) * some, some, keys, values, size, weights, job->room);
        }
    }
}
