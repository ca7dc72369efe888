/* The prefix search of prefixes.py, with bit-identical results. It has no vectors: all instruction sets share it. */

#include <stdint.h>
#include <stdlib.h>

#include "numbers.h"

typedef int64_t whole;

/* The frames, and the prefixes taken so far. The first prefix is empty. */
typedef struct {
    const whole *tokens;         /* [frames][width]: candidate tokens of each frame */
    const double *probs, *blanks; /* their probabilities, [frames][width]; probability of the blank, [frames] */
    whole frames, width;
    whole *token, *parent, *depth; /* per prefix: its last token, the prefix that it extends, its length */
    double *in_blank, *in_token;   /* [prefixes][frames]: mass of paths before a frame that give the prefix, by their end */
} Search;

/* A prefix that may be taken next. */
typedef struct {
    whole parent, token;
    double mass;
} Candidate;

static double chance_of(const Search *s, whole frame, whole token) {
    for (whole i = 0; i < s->width; i++)
        if (s->tokens[frame * s->width + i] == token) return s->probs[frame * s->width + i];
    return 0;
}

/* Returns the probability that a frame completes a prefix. */
static double said(const Search *s, whole parent, whole token, whole frame) {
    const double in_blank = s->in_blank[parent * s->frames + frame], in_token = s->in_token[parent * s->frames + frame];
    const int is_new = parent == 0 || s->token[parent] != token;
    return chance_of(s, frame, token) * (is_new ? in_blank + in_token : in_blank);
}

/* Returns whether `a` comes first: the larger mass, then the shorter prefix, then the lexicographically smaller prefix. */
static int before(const Search *s, const Candidate *a, const Candidate *b) {
    if (a->mass != b->mass) return a->mass > b->mass;
    whole p = a->parent, q = b->parent, x = a->token, y = b->token;
    if (s->depth[p] != s->depth[q]) return s->depth[p] < s->depth[q];
    while (p != q) x = s->token[p], y = s->token[q], p = s->parent[p], q = s->parent[q];
    return x < y;
}

/* Inserts a candidate into the sorted list of the best, which holds at most `room`. Returns the length of the list. */
static whole offer(const Search *s, const Candidate *candidate, Candidate *best, whole count, whole room) {
    if (!(candidate->mass > 0) || room == 0) return count;
    if (count == room && !before(s, candidate, best + count - 1)) return count;
    whole at = count < room ? count++ : count - 1;
    for (; at > 0 && before(s, candidate, best + at - 1); at--) best[at] = best[at - 1];
    best[at] = *candidate;
    return count;
}

/* Returns whether a token of a frame was a candidate of an earlier frame. */
static int is_old(const Search *s, whole frame, whole token) {
    for (whole i = 0; i < frame * s->width; i++)
        if (s->tokens[i] == token) return 1;
    return 0;
}

/* Computes the masses of a prefix at all frames, and offers its extensions. Returns the length of the list. */
static whole take(const Search *s, whole place, whole depth, Candidate *best, whole count, whole room) {
    double *in_blank = s->in_blank + place * s->frames, *in_token = s->in_token + place * s->frames;
    double blank_now = place == 0, token_now = 0;
    for (whole t = 0; t < s->frames; t++) {
        in_blank[t] = blank_now, in_token[t] = token_now;
        blank_now = (in_blank[t] + in_token[t]) * s->blanks[t];
        if (place == 0) continue;
        const double repeated = chance_of(s, t, s->token[place]) * in_token[t];
        token_now = repeated + said(s, s->parent[place], s->token[place], t);
    }
    if (s->depth[place] >= depth) return count;
    for (whole frame = 0; frame < s->frames; frame++)
        for (whole i = 0; i < s->width; i++) {
            Candidate candidate = {place, s->tokens[frame * s->width + i], 0};
            if (is_old(s, frame, candidate.token)) continue;
            for (whole t = 0; t < s->frames; t++) candidate.mass += said(s, place, candidate.token, t);
            count = offer(s, &candidate, best, count, room);
        }
    return count;
}

/* Runs the search on tokens, probs [frames][width] and blanks [frames]. drafted and parents hold up to `room` nodes and the root.
   Returns the number of nodes, root included, or -1 if memory runs out. */
PUBLIC int64_t foredraft_prefixes(
    const int64_t *tokens, const double *probs, const double *blanks, int64_t frames, int64_t width, int64_t room, int64_t depth,
    int64_t *drafted, int64_t *parents
) {
    const size_t places = (size_t)room + 1, cells = places * (size_t)frames;
    double *numbers = malloc(2 * cells * sizeof(double) + places * (sizeof(whole) + sizeof(Candidate)));
    if (numbers == NULL) return -1;
    Candidate *best = (Candidate *)(numbers + 2 * cells);
    const Search s = {
        tokens, probs, blanks, frames, width, drafted, parents, (whole *)(best + places), numbers, numbers + cells,
    };
    whole size = 1;
    s.token[0] = s.parent[0] = -1, s.depth[0] = 0;
    whole count = take(&s, 0, depth, best, 0, room);
    while (size <= room && count > 0) {
        const Candidate candidate = best[0];
        for (whole i = 1; i < count; i++) best[i - 1] = best[i];
        s.token[size] = candidate.token, s.parent[size] = candidate.parent, s.depth[size] = s.depth[candidate.parent] + 1;
        count = take(&s, size, depth, best, count - 1, room);
        size++;
    }
    free(numbers);
    return size;
}
