/* Draws whole chains of drafts in one call. set.c includes this file after laws.h. */

/* Draws token `at` of all chains from its logits. Without uniform numbers it is the most likely token, which no limit removes. */
static int64_t drawn(const Chains *c, const float *logits, int64_t size, int64_t at) {
    const int is_cut = c->uniforms && c->kept < size;
    float values[is_cut ? c->kept : 1];
    int64_t token, *ids = is_cut ? c->token_ids + at * c->kept : NULL;
    if (c->uniforms == NULL) {
        NAMED(largest, SET)(logits, 1, size, 1, values, &token);
        return token;
    }
    if (is_cut) {
        NAMED(largest, SET)(logits, 1, size, c->kept, values, ids);
        logits = values;
    }
    float *law = c->laws + at * c->kept;
    NAMED(laws, SET)(logits, 1, c->kept, c->temperature, c->least, c->top_k, c->top_p, law);
    if (law[0] != law[0]) /* the logits define no law */
        for (int64_t i = 0; i < c->kept; i++) law[i] = 1 / (float)c->kept;
    token = NAMED(categorical, SET)(law, c->kept, c->uniforms[at]);
    return is_cut ? ids[token] : token;
}

/* Runs a step, draws one token after the last node of each tree, appends it to the tree, and repeats this `depth` times. The trees
   of the step are chains that have not run before, and each has one row of logits, for its last node. Returns 0, or 1 if there is
   not enough memory. */
int EXPORT(chains)(const Model *m, const Step *s, const Chains *c) {
    const int64_t trees = s->num_trees, longest = s->offsets[trees] + trees * c->depth;
    int64_t *numbers = malloc((size_t)(2 * longest + 3 * trees + 1) * sizeof *numbers), failed = numbers == NULL;
    int64_t *tokens = numbers, *parents = tokens + longest, *offsets = parents + longest, *first = offsets + trees + 1;
    int64_t *rows = first + trees;
    Step step = *s;
    step.tokens = tokens, step.parents = parents, step.offsets = offsets, step.first = first, step.rows = rows;
    for (int64_t pass = 0; pass < c->depth && !failed; pass++) {
        offsets[0] = 0;
        for (int64_t b = 0; b < trees; b++) {
            const int64_t given = s->offsets[b + 1] - s->offsets[b], at = offsets[b];
            memcpy(tokens + at, s->tokens + s->offsets[b], (size_t)given * sizeof *tokens);
            memcpy(tokens + at + given, c->tokens + b * c->depth, (size_t)pass * sizeof *tokens);
            for (int64_t node = 0; node < given + pass; node++) parents[at + node] = node - 1;
            offsets[b + 1] = at + given + pass, first[b] = pass ? given + pass - 1 : 0;
            rows[b] = pass ? b : offsets[b + 1] - 1;
        }
        failed = NAMED(forward, SET)(m, &step);
        for (int64_t b = 0; b < trees && !failed; b++) {
            const int64_t at = b * c->depth + pass;
            c->tokens[at] = drawn(c, s->logits + b * m->vocabulary, m->vocabulary, at);
        }
    }
    free(numbers);
    return (int)failed;
}
