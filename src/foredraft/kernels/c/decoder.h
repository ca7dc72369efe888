/* A decoder of the Llama family over packed trees. set.c includes this file after attention.h.

   Reading the weights limits the speed of a step of a few tokens. So the weights are stored in the order in which they are read,
   and each cache line serves all rows of the step.

   Every result depends on its own row and the tokens that the row sees. It does not depend on the other rows, the index of a node
   in its tree, or the number of threads. For this, sums over the inner dimension and over visible tokens have one fixed order. A
   token in a tree therefore has the same logits, bit for bit, as a token that is decoded alone.

   The inputs of linear layers, queries, keys and values are rounded to the type of the model. Everything else is float32. If the
   weights of a layer have four bits, its inputs are rounded to eight bits. Only drafters may use this, because drafts are verified. */

static void embed(const Model *m, int64_t token, float *out) {
    const int type = (int)m->type;
    if (m->embedding) {
        for (int64_t i = 0; i < m->hidden; i += LANES) v_store(out + i, load(type, m->embedding, token * m->hidden + i));
        return;
    }
    if (m->tied.type == NUMBERS) {
        weights_of(&m->tied, token, out);
        return;
    }
    const int64_t tile = token / TILE * TILE * m->hidden, lane = token % TILE;
    for (int64_t i = 0; i < m->hidden; i += 2) {
        const int64_t at = tile + i * TILE + (type == BF16 ? 2 * lane : lane);
        out[i] = load_one(type, m->tied.weight, at), out[i + 1] = load_one(type, m->tied.weight, at + (type == BF16 ? 1 : TILE));
    }
}

/* Returns the input feature of a draft head for a row. */
static const void *feature_of(const Job *job, int64_t row) {
    const Step *s = job->step;
    const int64_t tree = job->tree[row], node = job->node[row], size = job->model->hidden;
    const int64_t width = size * size_of(job->type);
    if (node < s->num_given[tree]) return (const char *)s->given[tree] + node * width;
    return (const char *)s->carried[tree] + s->parents[s->offsets[tree] + node] * width;
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
        for (int64_t i = 0; i < m->hidden; i += LANES) v_store(state + i, load(job->type, feature_of(job, row), i));
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
    const float *state = job->states + row * size;
    void *to = input_at(job->type, job->normed, row * size);
    if (phase->weight) normalize(job->type, state, phase->weight, to, size, job->model->eps);
    else store_inputs(job->type, state, to, size);
}

static void normalize_rows(const Job *job, const float *weight) {
    Phase phase = {.job = job, .weight = weight};
    over_rows(job->workspace.threads, normalize_row, &phase, job->count, job->model->hidden);
}

/* Applies the norm, if there is one, and the rotary embedding to one head of one row, in place. */
static void rotate(const Model *m, float *x, const float *norm, const float *cosines) {
    const int64_t half = m->head_dim / 2;
    const int type = (int)m->type;
    if (norm) {
        float normed[m->head_dim];
        normalize(type, x, norm, normed, m->head_dim, m->eps);
        for (int64_t i = 0; i < m->head_dim; i += LANES) v_store(x + i, load_input(type, normed, i));
    }
    for (int64_t i = 0; i < half; i += LANES) {
        const V a = v_load(x + i), b = v_load(x + half + i), c = v_load(cosines + i), s = v_load(cosines + half + i);
        v_store(x + i, v_fms(a, c, v_mul(b, s)));
        v_store(x + half + i, v_fma(b, c, v_mul(a, s)));
    }
}

/* Writes the keys and values of a row to the pool. They follow its queries in `qkv`. */
static void store_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t index = ((const Phase *)given)->index;
    const Model *m = job->model;
    const Step *s = job->step;
    const int64_t heads = m->heads, kv = m->kv_heads, size = m->head_dim, tree = job->tree[row];
    float *x = job->qkv + row * (heads + 2 * kv) * size, *cosines = job->rotary + row * size;
    const int64_t place = index * s->layer_stride + place_of(s, tree, s->lengths[tree] + job->node[row], size);
    (void)id;
    for (int64_t h = 0; h < kv; h++) {
        float *key = x + (heads + h) * size, *value = key + kv * size;
        rotate(m, key, m->layers[index].k_norm, cosines);
        for (int64_t i = 0; i < size; i += LANES) {
            store(job->type, s->keys, place + h * s->head_stride + i, v_load(key + i));
            store(job->type, s->values, place + h * s->head_stride + i, v_load(value + i));
        }
    }
}

static void query_row(const void *given, int64_t row, int id) {
    const Phase *phase = given;
    const Job *job = phase->job;
    const Model *m = job->model;
    const int64_t size = m->head_dim, width = (m->heads + 2 * m->kv_heads) * size;
    (void)id;
    for (int64_t h = 0; h < m->heads; h++) {
        float *query = job->qkv + row * width + h * size;
        rotate(m, query, m->layers[phase->index].q_norm, job->rotary + row * size);
        store_inputs(job->type, query, input_at(job->type, job->query, (row * m->heads + h) * size), size);
    }
}

static void row_of_layer(const void *given, int64_t row, int id) {
    query_row(given, row, id);
    store_row(given, row, id);
}

/* Writes a row of numbers in the type of the model. */
static void store_all(int type, const float *x, void *out, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store(type, out, i, v_load(x + i));
}

static void feature_row(const void *given, int64_t row, int id) {
    const Phase *phase = given;
    const Job *job = phase->job;
    const int64_t size = job->model->hidden, at = (row * job->step->num_features + phase->index) * size;
    void *to = (char *)job->step->features + at * size_of(job->type);
    (void)id;
    if (job->step->feature_layers[phase->index] >= 0) store_all(job->type, job->states + row * size, to, size);
    else
        for (int64_t i = 0; i < size; i += LANES) store(job->type, to, i, load_input(job->type, job->normed, row * size + i));
}

/* Saves the requested features of a layer that has just ended. */
static void save_features(const Job *job, int64_t layer) {
    for (int64_t f = 0; f < job->step->num_features; f++) {
        Phase phase = {.job = job, .index = f};
        if (job->step->feature_layers[f] == layer)
            over_rows(job->workspace.threads, feature_row, &phase, job->count, job->model->hidden);
    }
}

static void *carried_by(const Job *job, int64_t row) {
    return (char *)job->step->carried[job->tree[row]] + job->node[row] * job->model->hidden * size_of(job->type);
}

static void pair_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t size = job->model->hidden;
    const Step *s = job->step;
    const int64_t tree = job->tree[row], at = row - tree * s->num_slots; /* index among the pairs */
    if (job->node[row] >= s->offsets[tree + 1] - s->offsets[tree] - s->num_slots) return;
    const void *feature = feature_of(job, row);
    (void)id;
    for (int64_t i = 0; i < size; i += LANES) {
        const V embedded = v_load(job->states + row * size + i);
        store_input(job->type, job->embedded, at * size + i, embedded);
        store_input(job->type, job->pair, 2 * at * size + i, embedded);
        store_input(job->type, job->pair, (2 * at + 1) * size + i, load(job->type, feature, i));
    }
}

/* Moves the states of the pairs, which are contiguous, to their nodes. Computes the states of the slots behind them. */
static void place_slots(const Job *job) {
    const Step *s = job->step;
    const int64_t size = job->model->hidden, slots = s->num_slots;
    for (int64_t tree = s->num_trees - 1; tree >= 0; tree--) {
        const int64_t first = s->offsets[tree], pairs = s->offsets[tree + 1] - first - slots;
        float *to = job->states + first * size;
        memmove(to, to - tree * slots * size, pairs * size * sizeof(float));
        const void *last = input_at(job->type, job->pair, 2 * (first - tree * slots + pairs - 1) * size);
        linear(&job->workspace, &job->model->entry.ahead, last, 1, to + pairs * size, 0);
    }
}

/* Concatenates the normed embedding and the normed feature as input of qkv. The feature becomes the residual. */
static void wide_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const Model *m = job->model;
    const int64_t size = m->hidden;
    float *state = job->states + row * size;
    const void *feature = feature_of(job, row);
    (void)id;
    normalize(job->type, state, m->layers->input_norm, input_at(job->type, job->pair, 2 * row * size), size, m->eps);
    for (int64_t i = 0; i < size; i += LANES) v_store(state + i, load(job->type, feature, i));
    normalize(job->type, state, m->entry.feature_norm, input_at(job->type, job->pair, (2 * row + 1) * size), size, m->eps);
}

/* Combines embeddings and features into the input states of a draft head's layer. */
static void enter(const Job *job) {
    const Entry *entry = &job->model->entry;
    const int64_t num_slots = job->step->num_slots * job->step->num_trees;
    Phase phase = {.job = job};
    over_rows(job->workspace.threads, pair_row, &phase, job->count, 2 * job->model->hidden);
    linear(&job->workspace, &entry->fc, job->pair, job->count - num_slots, job->states, 0);
    if (num_slots) place_slots(job);
    if (entry->norm == NULL) return;
    normalize_rows(job, entry->norm);
    gated(&job->workspace, &entry->gate, &entry->up, job->embedded, job->normed, job->count, job->act);
    linear(&job->workspace, &entry->down, job->act, job->count, job->states, 1);
}

static void carry_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t size = job->model->hidden;
    (void)id;
    store_all(job->type, job->states + row * size, carried_by(job, row), size);
}

static void split_row(const void *given, int64_t row, int id) {
    const Job *job = ((const Phase *)given)->job;
    const int64_t size = job->model->hidden;
    const float *both = job->doubled + 2 * row * size;
    (void)id;
    memcpy(job->states + row * size, both, size * sizeof(float));
    if (job->step->carried) store_all(job->type, both + size, carried_by(job, row), size);
}

/* Adds both outputs of `down` to the residual. The first sum is scored and stays in the states; the second is carried. */
static void finish_doubled(const Job *job, const Linear *down) {
    const int64_t size = job->model->hidden;
    Phase phase = {.job = job};
    for (int64_t row = 0; row < job->count; row++)
        for (int64_t half = 0; half < 2; half++)
            memcpy(job->doubled + (2 * row + half) * size, job->states + row * size, size * sizeof(float));
    linear(&job->workspace, down, job->act, job->count, job->doubled, 1);
    over_rows(job->workspace.threads, split_row, &phase, job->count, 2 * size);
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

/* Copies a row of inputs. */
static void move_input(const Job *job, void *to, int64_t row, const void *from, int64_t source, int64_t size) {
    memmove(input_at(job->type, to, row * size), input_at(job->type, from, source * size), (size_t)(size * input_size(job->type)));
}

/* Computes the logits of the requested rows. Tokens outside the head's vocabulary get minus infinity. */
static void score(const Job *job) {
    const Model *m = job->model;
    const Step *s = job->step;
    Phase phase = {.job = job};
    if (s->num_rows == 0 || is_bare(m)) return;
    for (int64_t i = 0; i < s->num_rows; i++) move_input(job, job->last, i, job->normed, job->only_wanted ? i : s->rows[i], m->hidden);
    if (m->token_ids) {
        linear(&job->workspace, &m->head, job->last, s->num_rows, job->drafted, 0);
        parallel(job->workspace.threads, spread_row, &phase, s->num_rows);
    } else linear_into(&job->workspace, &m->head, job->last, s->num_rows, s->logits, m->vocabulary);
    if (m->blank.weight) linear_into(&job->workspace, &m->blank, job->last, s->num_rows, s->logits + m->head.out, m->vocabulary);
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

INLINE int64_t qkv_width(const Model *m) { return (m->heads + 2 * m->kv_heads) * m->head_dim; }

/* Computes outputs `begin` to `end` - 1 of a layer's qkv. */
static void run_qkv(const Job *job, const Layer *layer, const void *x, int64_t begin, int64_t end) {
    int64_t first = 0; /* of the part */
    for (const Linear *part = layer->qkv; part < layer->qkv + 3 && part->out; first += part->out, part++) {
        const int64_t from = most(begin - first, 0), to = least(end - first, part->out);
        if (from >= to) continue;
        const Linear some = outputs(part, from, to - from);
        linear_into(&job->workspace, &some, x, job->count, job->qkv + first + from, qkv_width(job->model));
    }
}

/* Computes keys and values of all rows in x, drops rows without logits, and computes the queries of the others. */
static void keep_wanted(Job *job, const Phase *phase, void *x) {
    const Model *m = job->model;
    const Layer *layer = m->layers + phase->index;
    const int64_t *rows = job->step->rows, size = m->head_dim, q = m->heads * size;
    run_qkv(job, layer, x, q, qkv_width(m));
    over_rows(job->workspace.threads, store_row, phase, job->count, 4 * m->hidden);
    for (int64_t i = 0; i < job->step->num_rows; i++) {
        job->tree[i] = job->tree[rows[i]], job->node[i] = job->node[rows[i]];
        memmove(job->states + i * m->hidden, job->states + rows[i] * m->hidden, m->hidden * sizeof(float));
        memmove(job->rotary + i * size, job->rotary + rows[i] * size, size * sizeof(float));
        move_input(job, x, i, x, rows[i], layer->qkv->in);
    }
    job->count = job->step->num_rows, job->only_wanted = 1;
    if (job->count == 0) return;
    run_qkv(job, layer, x, 0, q);
    over_rows(job->workspace.threads, query_row, phase, job->count, 4 * m->hidden);
}

static void run(Job *job) {
    const Model *m = job->model;
    const Step *s = job->step;
    Phase phase = {.job = job};
    over_rows(job->workspace.threads, begin_row, &phase, job->count, 4 * m->hidden);
    if (m->entry.fc.weight) enter(job);
    if (m->entry.feature_norm) over_rows(job->workspace.threads, wide_row, &phase, job->count, 2 * m->hidden);
    save_features(job, 0);
    for (int64_t i = 0; i < m->num_layers; i++) {
        const Layer *layer = m->layers + i;
        phase.index = i;
        void *x = layer->qkv->in > m->hidden ? job->pair : job->normed;
        if (x == job->normed) normalize_rows(job, layer->input_norm);
        if (i == m->num_layers - 1 && is_rest_done(job)) keep_wanted(job, &phase, x);
        else {
            run_qkv(job, layer, x, 0, qkv_width(m));
            over_rows(job->workspace.threads, row_of_layer, &phase, job->count, 4 * m->hidden);
        }
        if (job->count == 0) return;
        const int64_t together = rows_together(job);
        parallel(job->workspace.threads, attend_part, &phase, (job->count + together - 1) / together * m->kv_heads);
        linear(&job->workspace, &layer->output, job->mixed, job->count, job->states, 1);
        normalize_rows(job, layer->post_norm);
        gated(&job->workspace, &layer->gate, &layer->up, job->normed, job->normed, job->count, job->act);
        if (layer->down.out > m->hidden) finish_doubled(job, &layer->down);
        else linear(&job->workspace, &layer->down, job->act, job->count, job->states, 1);
        save_features(job, i + 1);
    }
    if (s->carried && m->layers[m->num_layers - 1].down.out == m->hidden)
        over_rows(job->workspace.threads, carry_row, &phase, job->count, m->hidden);
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
    for (const Layer *layer = m->layers; layer < m->layers + m->num_layers; layer++)
        size = most(size, most(most(layer->qkv->in, layer->output.in), most(layer->gate.in, layer->down.in)));
    return size;
}

/* Returns whether a layer needs its inputs in another form, see `inputs`. */
static int converts(const Model *m, int64_t n, int64_t rows) {
    const int type = (int)m->type;
    if (way_of(&m->head, type, rows) != AS_GIVEN || m->entry.fc.type == NUMBERS || m->entry.gate.type == NUMBERS) return 1;
    for (const Layer *layer = m->layers; layer < m->layers + m->num_layers; layer++)
        for (const Linear *linear = layer->qkv; linear <= &layer->down; linear++)
            if (way_of(linear, type, n) != AS_GIVEN) return 1;
    return 0;
}

static size_t lay_out(Job *job, char *block, int64_t num_nodes) {
    const Model *m = job->model;
    const int64_t n = job->count, q = m->heads * m->head_dim, rows = job->step->num_rows;
    const size_t input = (size_t)input_size(job->type);
    size_t used = 0;
    job->tree = cut(block, &used, n, sizeof(int64_t));
    job->node = cut(block, &used, n, sizeof(int64_t));
    job->depth = cut(block, &used, num_nodes, sizeof(int64_t));
    job->states = cut(block, &used, n * m->hidden, sizeof(float));
    job->qkv = cut(block, &used, n * (q + 2 * m->kv_heads * m->head_dim), sizeof(float));
    job->rotary = cut(block, &used, n * m->head_dim, sizeof(float));
    job->normed = cut(block, &used, n * m->hidden, input);
    job->query = cut(block, &used, n * q, input);
    job->mixed = cut(block, &used, n * q, input);
    job->act = cut(block, &used, n * m->mlp, input);
    job->last = cut(block, &used, rows * m->hidden, input);
    job->weights = cut(block, &used, team_size() * MOST_QUERIES * job->room, sizeof(float));
    if (m->token_ids) job->drafted = cut(block, &used, rows * m->head.out, sizeof(float));
    if (converts(m, n, rows))
        for (int i = 0; i < 2; i++) /* a gate and the layer beside it may take two kinds of inputs */
            job->workspace.room[i] = cut(block, &used, room_of(most(n, rows), widest(m)), 1);
    if (job->step->given == NULL) return used;
    job->embedded = cut(block, &used, n * m->hidden, input);
    job->pair = cut(block, &used, 2 * n * m->hidden, input);
    job->doubled = cut(block, &used, 2 * n * m->hidden, sizeof(float));
    return used;
}

/* Runs one forward. Returns 0, or 1 if there is not enough memory. */
int EXPORT(forward)(const Model *model, const Step *step) {
    const int64_t num_nodes = step->offsets[step->num_trees];
    Job job = {.model = model, .step = step, .type = (int)model->type};
    for (int64_t b = 0; b < step->num_trees; b++) {
        int64_t size = step->offsets[b + 1] - step->offsets[b], seen = step->lengths[b] + size;
        job.count += size - step->first[b];
        if (seen > job.room) job.room = (seen + 15) / 16 * 16;
    }
    job.workspace.threads = enlist(step->threads), job.workspace.type = model->type;
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
