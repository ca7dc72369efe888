/* A decoder of the Llama family in bfloat16 over packed trees, for CPUs with AVX-512 BF16. Called by native.py.

   Reading the weights limits the speed of a step of a few tokens. So the weights are stored in the order in which they are read,
   and each cache line serves all rows of the step.

   Every result depends on its own row and the tokens that the row sees. It does not depend on the other rows, the index of a node
   in its tree, or the number of threads. For this, sums over the inner dimension and over visible tokens have one fixed order. A
   token in a tree therefore has the same logits, bit for bit, as a token that is decoded alone.

   The inputs of linear layers, queries, keys and values are rounded to bfloat16. Everything else is float32. If the weights of a
   layer have four bits, its inputs are rounded to eight bits. Only drafters may use this, because drafts are verified. */

#ifndef __AVX512BF16__
#error "needs AVX-512 BF16"
#endif

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The order matters: each file uses the files before it. */
#include "numbers.h"
#include "passed.h"
#include "team.h"
#include "linear.h"
#include "job.h"
#include "attention.h"

static void embed(const Model *m, int64_t token, float *out) {
    if (m->embedding) {
        for (int64_t i = 0; i < m->hidden; i += 16) _mm512_storeu_ps(out + i, widen(m->embedding + token * m->hidden + i));
        return;
    }
    const bf16 *w = m->tied + token / TILE * TILE * m->hidden + token % TILE * 2;
    for (int64_t i = 0; i < m->hidden; i += 2, w += 2 * TILE) out[i] = float_of(w[0]), out[i + 1] = float_of(w[1]);
}

/* Returns the input feature of a draft head for a row. */
static const bf16 *feature_of(const Job *job, int64_t row) {
    const Step *s = job->step;
    const int64_t tree = job->tree[row], node = job->node[row], size = job->model->hidden;
    if (node < s->num_given[tree]) return s->given[tree] + node * size;
    return s->carried[tree] + s->parents[s->offsets[tree] + node] * size;
}

/* Returns whether the model is a layer on the target's features, without a head. */
INLINE int is_bare(const Model *m) { return m->head.weight == NULL; }

static void begin_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const Model *m = job->model;
    const Step *s = job->step;
    const int64_t half = m->head_dim / 2, tree = job->tree[row], at = s->offsets[tree] + job->node[row];
    float *cosines = job->rotary + row * m->head_dim, position = (float)(s->lengths[tree] + job->depth[at]);
    (void)id;
    float *state = job->states + row * m->hidden;
    if (!is_bare(m)) embed(m, s->tokens[at], state);
    else
        for (int64_t i = 0; i < m->hidden; i += 16) _mm512_storeu_ps(state + i, widen(feature_of(job, row) + i));
    for (int64_t i = 0; i < half; i++) {
        float angle = position * m->frequencies[i];
        cosines[i] = cosf(angle) * m->rotary_scale, cosines[half + i] = sinf(angle) * m->rotary_scale;
    }
}

static void normalize_row(const void *given, int64_t row, int id) {
    const Phase *phase = given;
    const Job *job = phase->job;
    const int64_t size = job->model->hidden;
    (void)id;
    if (phase->weight) normalize(job->states + row * size, phase->weight, job->normed + row * size, size, job->model->eps);
    else narrow_all(job->states + row * size, job->normed + row * size, size);
}

static void normalize_rows(const Job *job, const bf16 *weight) {
    Phase phase = {.job = job, .weight = weight};
    parallel(job->hands.threads, normalize_row, &phase, job->count);
}

/* Applies the norm, if there is one, and the rotary embedding to one head of one row. */
static void rotate(const Model *m, float *x, const bf16 *norm, const float *cosines, bf16 *out) {
    const int64_t half = m->head_dim / 2;
    if (norm) {
        normalize(x, norm, out, m->head_dim, m->eps);
        for (int64_t i = 0; i < m->head_dim; i += 16) _mm512_storeu_ps(x + i, widen(out + i));
    }
    for (int64_t i = 0; i < half; i += 16) {
        __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + half + i);
        __m512 c = _mm512_loadu_ps(cosines + i), s = _mm512_loadu_ps(cosines + half + i);
        narrow(out + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        narrow(out + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

/* Writes the keys and values of a row to the pool. They follow its queries in `qkv`. */
static void store_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t index = ((const Phase *)given)->index;
    const Model *m = job->model;
    const Step *s = job->step;
    const int64_t heads = m->heads, kv = m->kv_heads, size = m->head_dim;
    float *x = job->qkv + row * (heads + 2 * kv) * size, *cosines = job->rotary + row * size;
    int64_t tree = job->tree[row], place = (s->lengths[tree] + job->node[row]) * size;
    (void)id;
    for (int64_t h = 0; h < kv; h++) {
        rotate(m, x + (heads + h) * size, m->layers[index].k_norm, cosines, stored(s, s->keys, index, tree, h) + place);
        bf16 *value = stored(s, s->values, index, tree, h) + place;
        for (int64_t i = 0; i < size; i += 16) narrow(value + i, _mm512_loadu_ps(x + (heads + kv + h) * size + i));
    }
}

static void query_row(const void *given, int64_t row, int id) {
    const Phase *phase = given;
    const Job *job = phase->job;
    const Model *m = job->model;
    const int64_t size = m->head_dim, width = (m->heads + 2 * m->kv_heads) * size;
    (void)id;
    for (int64_t h = 0; h < m->heads; h++)
        rotate(m, job->qkv + row * width + h * size, m->layers[phase->index].q_norm, job->rotary + row * size,
               job->query + (row * m->heads + h) * size);
}

static void row_of_layer(const void *given, int64_t row, int id) {
    query_row(given, row, id);
    store_row(given, row, id);
}

static void feature_row(const void *given, int64_t row, int id) {
    const Phase *phase = given;
    const Job *job = phase->job;
    const int64_t size = job->model->hidden;
    bf16 *to = job->step->features + (row * job->step->num_features + phase->index) * size;
    (void)id;
    if (job->step->feature_layers[phase->index] < 0) memcpy(to, job->normed + row * size, size * sizeof(bf16));
    else narrow_all(job->states + row * size, to, size);
}

/* Saves the requested features of a layer that has just ended. */
static void save_features(const Job *job, int64_t layer) {
    for (int64_t f = 0; f < job->step->num_features; f++) {
        Phase phase = {.job = job, .index = f};
        if (job->step->feature_layers[f] == layer) parallel(job->hands.threads, feature_row, &phase, job->count);
    }
}

static bf16 *carried_by(const Job *job, int64_t row) {
    return job->step->carried[job->tree[row]] + job->node[row] * job->model->hidden;
}

static void pair_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t size = job->model->hidden;
    const Step *s = job->step;
    const int64_t tree = job->tree[row], at = row - tree * s->num_slots; /* index among the pairs */
    if (job->node[row] >= s->offsets[tree + 1] - s->offsets[tree] - s->num_slots) return;
    bf16 *embedded = job->embedded + at * size, *pair = job->pair + 2 * at * size;
    (void)id;
    narrow_all(job->states + row * size, embedded, size);
    memcpy(pair, embedded, size * sizeof(bf16));
    memcpy(pair + size, feature_of(job, row), size * sizeof(bf16));
}

/* Moves the states of the pairs, which are contiguous, to their nodes. Computes the states of the slots behind them. */
static void place_slots(const Job *job) {
    const Step *s = job->step;
    const int64_t size = job->model->hidden, slots = s->num_slots;
    for (int64_t tree = s->num_trees - 1; tree >= 0; tree--) {
        const int64_t first = s->offsets[tree], pairs = s->offsets[tree + 1] - first - slots;
        float *to = job->states + first * size;
        memmove(to, to - tree * slots * size, pairs * size * sizeof(float));
        const bf16 *last = job->pair + 2 * (first - tree * slots + pairs - 1) * size;
        linear(&job->hands, &job->model->entry.ahead, last, 1, to + pairs * size, 0);
    }
}

/* Concatenates the normed embedding and the normed feature as input of qkv. The feature becomes the residual. */
static void wide_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const Model *m = job->model;
    const int64_t size = m->hidden;
    float *state = job->states + row * size;
    bf16 *pair = job->pair + 2 * row * size;
    const bf16 *feature = feature_of(job, row);
    (void)id;
    normalize(state, m->layers->input_norm, pair, size, m->eps);
    for (int64_t i = 0; i < size; i += 16) _mm512_storeu_ps(state + i, widen(feature + i));
    normalize(state, m->entry.feature_norm, pair + size, size, m->eps);
}

/* Combines embeddings and features into the input states of a draft head's layer. */
static void enter(const Job *job) {
    const Entry *entry = &job->model->entry;
    const int64_t num_slots = job->step->num_slots * job->step->num_trees;
    Phase phase = {.job = job};
    parallel(job->hands.threads, pair_row, &phase, job->count);
    linear(&job->hands, &entry->fc, job->pair, job->count - num_slots, job->states, 0);
    if (num_slots) place_slots(job);
    if (entry->norm == NULL) return;
    normalize_rows(job, entry->norm);
    gated(&job->hands, &entry->gate, &entry->up, job->embedded, job->normed, job->count, job->act);
    linear(&job->hands, &entry->down, job->act, job->count, job->states, 1);
}

static void carry_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t size = job->model->hidden;
    (void)id;
    narrow_all(job->states + row * size, carried_by(job, row), size);
}

static void split_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t size = job->model->hidden;
    const float *both = job->doubled + 2 * row * size;
    (void)id;
    memcpy(job->states + row * size, both, size * sizeof(float));
    if (job->step->carried) narrow_all(both + size, carried_by(job, row), size);
}

/* Adds both outputs of `down` to the residual. The first sum is scored and stays in the states; the second is carried. */
static void finish_doubled(const Job *job, const Linear *down) {
    const int64_t size = job->model->hidden;
    Phase phase = {.job = job};
    for (int64_t row = 0; row < job->count; row++)
        for (int64_t half = 0; half < 2; half++)
            memcpy(job->doubled + (2 * row + half) * size, job->states + row * size, size * sizeof(float));
    linear(&job->hands, down, job->act, job->count, job->doubled, 1);
    parallel(job->hands.threads, split_row, &phase, job->count);
}

static void spread_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const Model *m = job->model;
    float *to = job->step->logits + row * m->vocabulary;
    const float *from = job->drafted + row * m->head.out;
    (void)id;
    for (int64_t i = 0; i < m->vocabulary; i++) to[i] = -INFINITY;
    for (int64_t i = 0; i < m->head.out; i++) to[m->token_ids[i]] = from[i];
}

/* Computes the logits of the requested rows. Tokens outside the head's vocabulary get minus infinity. */
static void score(const Job *job) {
    const Model *m = job->model;
    const Step *s = job->step;
    Phase phase = {.job = job};
    if (s->num_rows == 0 || is_bare(m)) return;
    for (int64_t i = 0; i < s->num_rows; i++)
        memcpy(job->last + i * m->hidden, job->normed + (job->only_wanted ? i : s->rows[i]) * m->hidden, m->hidden * sizeof(bf16));
    if (m->token_ids) {
        linear(&job->hands, &m->head, job->last, s->num_rows, job->drafted, 0);
        parallel(job->hands.threads, spread_row, &phase, s->num_rows);
    } else linear_into(&job->hands, &m->head, job->last, s->num_rows, s->logits, m->vocabulary);
    if (m->blank.weight) linear_into(&job->hands, &m->blank, job->last, s->num_rows, s->logits + m->head.out, m->vocabulary);
}

/* Returns whether the last layer may drop rows after it has stored their keys and values. This requires that no later features
   are requested, and that the rows with logits are in ascending order. */
static int is_rest_done(const Job *job) {
    const Step *s = job->step;
    for (int64_t f = 0; f < s->num_features; f++)
        if (s->feature_layers[f] < 0 || s->feature_layers[f] >= job->model->num_layers) return 0;
    for (int64_t i = 1; i < s->num_rows; i++)
        if (s->rows[i] <= s->rows[i - 1]) return 0;
    return s->num_rows < job->count;
}

/* Computes keys and values of all rows in x, drops rows without logits, and computes the queries of the others. */
static void keep_wanted(Job *job, const Phase *phase, bf16 *x) {
    const Model *m = job->model;
    const Linear *qkv = &m->layers[phase->index].qkv;
    const int64_t *rows = job->step->rows, size = m->head_dim, q = m->heads * size;
    const Linear queries = outputs(qkv, 0, q), rest = outputs(qkv, q, qkv->out - q);
    linear_into(&job->hands, &rest, x, job->count, job->qkv + q, qkv->out);
    parallel(job->hands.threads, store_row, phase, job->count);
    for (int64_t i = 0; i < job->step->num_rows; i++) {
        job->tree[i] = job->tree[rows[i]], job->node[i] = job->node[rows[i]];
        memmove(job->states + i * m->hidden, job->states + rows[i] * m->hidden, m->hidden * sizeof(float));
        memmove(job->rotary + i * size, job->rotary + rows[i] * size, size * sizeof(float));
        memmove(x + i * qkv->in, x + rows[i] * qkv->in, qkv->in * sizeof(bf16));
    }
    job->count = job->step->num_rows, job->only_wanted = 1;
    if (job->count == 0) return;
    linear_into(&job->hands, &queries, x, job->count, job->qkv, qkv->out);
    parallel(job->hands.threads, query_row, phase, job->count);
}

static void run(Job *job) {
    const Model *m = job->model;
    const Step *s = job->step;
    Phase phase = {.job = job};
    parallel(job->hands.threads, begin_row, &phase, job->count);
    if (m->entry.fc.weight) enter(job);
    if (m->entry.feature_norm) parallel(job->hands.threads, wide_row, &phase, job->count);
    save_features(job, 0);
    for (int64_t i = 0; i < m->num_layers; i++) {
        const Layer *layer = m->layers + i;
        phase.index = i;
        bf16 *x = layer->qkv.in > m->hidden ? job->pair : job->normed;
        if (x == job->normed) normalize_rows(job, layer->input_norm);
        if (i == m->num_layers - 1 && is_rest_done(job)) keep_wanted(job, &phase, x);
        else {
            linear(&job->hands, &layer->qkv, x, job->count, job->qkv, 0);
            parallel(job->hands.threads, row_of_layer, &phase, job->count);
        }
        if (job->count == 0) return;
        const int64_t together = rows_together(job);
        parallel(job->hands.threads, attend_part, &phase, (job->count + together - 1) / together * m->kv_heads);
        linear(&job->hands, &layer->output, job->mixed, job->count, job->states, 1);
        normalize_rows(job, layer->post_norm);
        gated(&job->hands, &layer->gate, &layer->up, job->normed, job->normed, job->count, job->act);
        if (layer->down.out > m->hidden) finish_doubled(job, &layer->down);
        else linear(&job->hands, &layer->down, job->act, job->count, job->states, 1);
        save_features(job, i + 1);
    }
    if (s->carried && m->layers[m->num_layers - 1].down.out == m->hidden) parallel(job->hands.threads, carry_row, &phase, job->count);
    normalize_rows(job, m->norm);
    save_features(job, -1);
    score(job);
}

/* ---- memory ---------------------------------------------------------------------------------------------------------------- */

/* Returns the next array of a block. Without a block it only adds up the required bytes in `used`. */
static void *cut(char *block, size_t *used, int64_t count, size_t size) {
    void *here = block ? block + *used : NULL;
    *used += ((size_t)count * size + 63) / 64 * 64;
    return here;
}

/* Returns the largest number of inputs of any linear layer. */
static int64_t widest(const Model *m) {
    const Entry *entry = &m->entry;
    int64_t size = most(most(m->head.in, entry->fc.in), most(most(entry->gate.in, entry->down.in), entry->ahead.in));
    for (const Layer *one = m->layers; one < m->layers + m->num_layers; one++)
        size = most(size, most(most(one->qkv.in, one->output.in), most(one->gate.in, one->down.in)));
    return size;
}

static size_t lay_out(Job *job, char *block, int64_t num_nodes) {
    const Model *m = job->model;
    const int64_t n = job->count, q = m->heads * m->head_dim;
    size_t used = 0;
    job->tree = cut(block, &used, n, sizeof(int64_t));
    job->node = cut(block, &used, n, sizeof(int64_t));
    job->depth = cut(block, &used, num_nodes, sizeof(int64_t));
    job->states = cut(block, &used, n * m->hidden, sizeof(float));
    job->qkv = cut(block, &used, n * (q + 2 * m->kv_heads * m->head_dim), sizeof(float));
    job->rotary = cut(block, &used, n * m->head_dim, sizeof(float));
    job->normed = cut(block, &used, n * m->hidden, sizeof(bf16));
    job->query = cut(block, &used, n * q, sizeof(bf16));
    job->mixed = cut(block, &used, n * q, sizeof(bf16));
    job->act = cut(block, &used, n * m->mlp, sizeof(bf16));
    job->last = cut(block, &used, job->step->num_rows * m->hidden, sizeof(bf16));
    job->weights = cut(block, &used, team.size * MOST_QUERIES * job->room, sizeof(float));
    if (m->token_ids) job->drafted = cut(block, &used, job->step->num_rows * m->head.out, sizeof(float));
    if (wide_inputs() || m->layers->qkv.few || m->head.few)
        for (int i = 0; i < 2; i++) job->hands.room[i] = cut(block, &used, widest(m) * most(n, job->step->num_rows), sizeof(float));
    if (job->step->given == NULL) return used;
    job->embedded = cut(block, &used, n * m->hidden, sizeof(bf16));
    job->pair = cut(block, &used, 2 * n * m->hidden, sizeof(bf16));
    job->doubled = cut(block, &used, 2 * n * m->hidden, sizeof(float));
    return used;
}

/* Runs one forward. Returns 0, or 1 if there is not enough memory. */
int foredraft_forward(const Model *model, const Step *step) {
    const int64_t num_nodes = step->offsets[step->num_trees];
    Job job = {.model = model, .step = step};
    for (int64_t b = 0; b < step->num_trees; b++) {
        int64_t size = step->offsets[b + 1] - step->offsets[b], seen = step->lengths[b] + size;
        job.count += size - step->first[b];
        if (seen > job.room) job.room = (seen + 15) / 16 * 16;
    }
    job.hands.threads = enlist(step->threads);
    char *block = aligned_alloc(64, lay_out(&job, NULL, num_nodes) + 64);
    if (block == NULL) {
        dismiss();
        return 1;
    }
    lay_out(&job, block, num_nodes);
    for (int64_t b = 0, row = 0; b < step->num_trees; b++)
        for (int64_t at = step->offsets[b], node = 0; at < step->offsets[b + 1]; at++, node++) {
            job.depth[at] = step->parents[at] < 0 ? 0 : job.depth[step->offsets[b] + step->parents[at]] + 1;
            if (node >= step->first[b]) job.tree[row] = b, job.node[row++] = node;
        }
    run(&job);
    dismiss();
    free(block);
    return 0;
}

#include "layers.h"
