/* Verifies trees by the multi-round rule, as `foredraft.rules.multiround` does one tree at a time. set.c includes this file after
   laws.h, whose laws, residuals and draws it calls: the verdicts are those of the rule, bit for bit. */

enum { NONE = -1, UNREADABLE = -2 };

enum { SCRATCH = 5 }; /* laws of a thread: two of the target and three of the draft */

/* The arguments of a call, and the memory that it works in. */
typedef struct {
    const Trees *given;
    float *laws;            /* [threads][SCRATCH][size] */
    int64_t *first, *after; /* [nodes]: first child, and next sibling; -1: none */
} Verification;

/* Returns the first of the largest numbers. A NaN counts as the largest. */
static int64_t likeliest(const float *x, int64_t size) {
    V highest = v_set(-INFINITY);
    int64_t i = 0, found = -1;
    for (; i + LANES <= size; i += LANES) highest = v_max(highest, v_load(x + i));
    float largest = largest_of(highest);
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    const V bound = v_set(largest);
    for (i = 0; i < size; i += LANES) {
        unsigned there = size - i >= LANES ? (1u << LANES) - 1 : (1u << (size - i)) - 1;
        there &= ~v_below(v_load_some(x + i, size - i), bound);
        for (; there; there &= there - 1) {
            const int64_t place = i + __builtin_ctz(there);
            if (x[place] != x[place]) return place;
            if (found < 0) found = place;
        }
    }
    return found;
}

/* Finds the children of every node of a tree. Returns 0 if a parent is not before its child, or a token is unknown. */
static int link_children(const Verification *v, int64_t tree) {
    const Trees *t = v->given;
    const int64_t begin = t->offsets[tree], count = t->offsets[tree + 1] - begin;
    int64_t *first = v->first + begin, *after = v->after + begin;
    for (int64_t node = 0; node < count; node++) first[node] = -1;
    for (int64_t node = count - 1; node > 0; node--) {
        const int64_t parent = t->parents[begin + node], token = t->tokens[begin + node], row = t->draft_row[begin + node];
        if (parent < 0 || parent >= node || token < 0 || token >= t->size || row >= t->num_laws) return 0;
        after[node] = first[parent], first[parent] = node;
    }
    return count > 0 && t->draft_row[begin] < t->num_laws;
}

/* Returns the law from which the children of a node were drawn, over all tokens. NULL: a token of the law is unknown. */
static const float *draft_law(const Trees *t, int64_t row, float *dense) {
    const float *probs = t->draft_probs + row * t->kept;
    if (t->draft_ids == NULL) return probs;
    memset(dense, 0, (size_t)t->size * sizeof *dense);
    for (int64_t i = 0; i < t->kept; i++) {
        const int64_t token = t->draft_ids[row * t->kept + i];
        if (token < 0 || token >= t->size) return NULL;
        dense[token] = probs[i];
    }
    return dense;
}

INLINE void swap(float **a, float **b) {
    float *kept = *a;
    *a = *b, *b = kept;
}

/* Tests the children of a node in turn against the law after it. Returns the accepted child, NONE, or UNREADABLE if a
   token of the draft law is unknown. After a rejection `law` is the residual, and `left` is the memory for the next one. */
static int64_t test_children(const Verification *v, int64_t begin, int64_t node, float **law, float **left, float *drafts) {
    const Trees *t = v->given;
    const int64_t size = t->size, row = t->draft_row[begin + node], removes = t->drawn[begin + node] == WITHOUT_REPLACEMENT;
    float *kept = drafts + size, *spare = drafts + 2 * size;
    const float *draft = row < 0 ? NULL : draft_law(t, row, drafts);
    if (row >= 0 && draft == NULL) return UNREADABLE;
    for (int64_t child = v->first[begin + node]; child >= 0; child = v->after[begin + child]) {
        const int64_t token = t->tokens[begin + child];
        const double draft_prob = draft ? draft[token] : 1;
        if (!(draft_prob > 0)) return NONE; /* up to rounding, the earlier siblings exhausted the draft law */
        if (t->accept_uniforms[begin + child] < (*law)[token] / draft_prob) return child;
        const double mass = draft ? NAMED(subtract, SET)(*law, draft, size, *left) : NAMED(without, SET)(*law, token, size, *left);
        if (mass > 0) swap(law, left);
        if (draft && removes && v->after[begin + child] >= 0) {
            NAMED(without, SET)(draft, token, size, kept);
            draft = kept;
            swap(&kept, &spare);
        }
    }
    return NONE;
}

/* Verifies a tree at temperature 0: follows the most likely tokens. */
static void follow(const Verification *v, int64_t tree) {
    const Trees *t = v->given;
    const int64_t begin = t->offsets[tree];
    for (int64_t node = 0, token;; ) {
        const float *logits = t->logits + (t->rows[tree] + node) * t->size;
        token = likeliest(logits, t->size);
        if (!isfinite(logits[token]) && t->lawless[tree] < 0) t->lawless[tree] = node;
        t->last[tree] = node, t->next[tree] = token;
        for (node = v->first[begin + node]; node >= 0 && t->tokens[begin + node] != token;) node = v->after[begin + node];
        if (node < 0) return;
    }
}

/* Verifies a tree above temperature 0. A tree whose draft laws cannot be read keeps the last node -1. */
static void walk(const Verification *v, int64_t tree, float *law) {
    const Trees *t = v->given;
    const int64_t size = t->size, begin = t->offsets[tree];
    const double *limits = t->limits + 4 * tree; /* temperature, log of min_p, top_k, top_p */
    float *left = law + size, *drafts = left + size;
    int64_t node, child = 0;
    do {
        node = child;
        const float *logits = t->logits + (t->rows[tree] + node) * size;
        law_of(logits, size, (float)limits[0], (float)limits[1], (int64_t)limits[2], limits[3], law);
        if (law[0] != law[0]) { /* the logits define no law: any law will do */
            if (t->lawless[tree] < 0) t->lawless[tree] = node;
            for (int64_t i = 0; i < size; i++) law[i] = (float)(1 / (double)size);
        }
        child = test_children(v, begin, node, &law, &left, drafts);
    } while (child >= 0);
    if (child == UNREADABLE) return;
    t->next[tree] = NAMED(categorical, SET)(law, size, t->next_uniforms[begin + node]);
    t->last[tree] = node;
}

/* Verifies one tree. A tree that cannot be read has the last node -1. */
static void verify(const void *given, int64_t tree, int id) {
    const Verification *v = given;
    const Trees *t = v->given;
    t->last[tree] = t->next[tree] = t->lawless[tree] = -1;
    if (!link_children(v, tree)) return;
    if (t->limits[4 * tree] == 0) follow(v, tree);
    else walk(v, tree, v->laws + id * SCRATCH * t->size);
}

/* Verifies all trees. Sampled ones are shared among the threads of the team, if forwards have made one. Returns 0, or 1 if there is
   not enough memory. */
int EXPORT(accept)(const Trees *t) {
    const int64_t nodes = t->offsets[t->num_trees], is_shared = t->accept_uniforms && t->num_trees > 1;
    if (is_shared) enlist(1);
    const int64_t threads = is_shared ? team_size() : 1;
    Verification job = {.given = t};
    job.first = malloc((size_t)(2 * nodes + 1) * sizeof *job.first), job.after = job.first + nodes;
    job.laws = t->accept_uniforms ? malloc((size_t)(threads * SCRATCH * t->size) * sizeof *job.laws) : NULL;
    const int failed = job.first == NULL || (t->accept_uniforms && job.laws == NULL);
    if (!failed) parallel(threads, verify, &job, t->num_trees);
    free(job.first);
    free(job.laws);
    if (is_shared) dismiss();
    return failed;
}
