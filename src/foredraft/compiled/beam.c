/* The prefix beam search of beam.py and the trie of what it finds, to the last bit. Called by beam.py. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t whole;

/* A label sequence that the beam holds: the probability of its paths that end in a blank, and of those that do not. */
typedef struct {
    whole *labels, length;
    whole first, next; /* places in the beam: of the first sequence that extends it by one label, of the next such; -1: none */
    double in_blank, in_token;
} Prefix;

/* A sequence of the beam, with one label more unless `label` is -1. */
typedef struct {
    const Prefix *of;
    whole label;
    double in_blank, in_token;
} Candidate;

static whole length_of(const Candidate *one) { return one->of->length + (one->label >= 0); }

static whole label_of(const Candidate *one, whole i) { return i < one->of->length ? one->of->labels[i] : one->label; }

/* Whether `a` goes first: the likelier one; of equals, the smaller one in the order of words. */
static int before(const Candidate *a, const Candidate *b) {
    const double x = a->in_blank + a->in_token, y = b->in_blank + b->in_token;
    if (x != y) return x > y;
    for (whole i = 0; i < length_of(a) && i < length_of(b); i++)
        if (label_of(a, i) != label_of(b, i)) return label_of(a, i) < label_of(b, i);
    return length_of(a) < length_of(b);
}

/* Puts a candidate among the best so far, which are in order and at most `room`. Returns how many there are. */
static whole offer(const Candidate *one, Candidate *best, whole count, whole room) {
    if (!(one->in_blank + one->in_token > 0)) return count;
    if (count == room && !before(one, best + count - 1)) return count;
    whole at = count < room ? count : count - 1;
    for (; at > 0 && before(one, best + at - 1); at--) best[at] = best[at - 1];
    best[at] = *one;
    return count < room ? count + 1 : count;
}

static void link_extensions(Prefix *alive, whole count) {
    for (whole p = 0; p < count; p++) {
        alive[p].first = -1;
        for (whole q = 0; q < count; q++)
            if (alive[p].length + 1 == alive[q].length &&
                memcmp(alive[p].labels, alive[q].labels, (size_t)alive[p].length * sizeof(whole)) == 0)
                alive[q].next = alive[p].first, alive[p].first = q;
    }
}

/* One frame: the best candidates of the sequences in the beam. What extends one to another of the beam is added to that. */
static whole advance(
    Prefix *alive, whole count, const whole *tokens, const double *probs, whole num_tokens, double blank, Candidate *best, whole beam,
    Candidate *own
) {
    whole kept = 0;
    link_extensions(alive, count);
    for (whole p = 0; p < count; p++) own[p] = (Candidate){alive + p, -1, (alive[p].in_blank + alive[p].in_token) * blank, 0};
    for (whole p = 0; p < count; p++) {
        const double in_blank = alive[p].in_blank, both = in_blank + alive[p].in_token;
        const whole last = alive[p].length ? alive[p].labels[alive[p].length - 1] : -1;
        for (whole j = 0; j < num_tokens; j++) {
            const Candidate more = {alive + p, tokens[j], 0, (tokens[j] == last ? in_blank : both) * probs[j]};
            whole q = alive[p].first;
            while (q >= 0 && alive[q].labels[alive[q].length - 1] != tokens[j]) q = alive[q].next;
            if (q >= 0) own[q].in_token += more.in_token;
            else kept = offer(&more, best, kept, beam);
            if (tokens[j] == last) own[p].in_token += alive[p].in_token * probs[j];
        }
    }
    for (whole p = 0; p < count; p++) kept = offer(own + p, best, kept, beam);
    return kept;
}

/* ---- the trie -------------------------------------------------------------------------------------------------------------- */

typedef struct {
    whole token, parent, depth, first, next; /* first child, next sibling; -1: none */
    double mass;
} Node;

static whole child_of(Node *nodes, whole *count, whole parent, whole token) {
    whole at = nodes[parent].first;
    while (at >= 0 && nodes[at].token != token) at = nodes[at].next;
    if (at >= 0) return at;
    nodes[*count] = (Node){token, parent, nodes[parent].depth + 1, -1, nodes[parent].first, 0};
    nodes[parent].first = *count;
    return (*count)++;
}

/* Whether node a goes first: by mass, then by depth, then in the order of words. */
static int heavier(const Node *nodes, whole a, whole b) {
    if (nodes[a].mass != nodes[b].mass) return nodes[a].mass > nodes[b].mass;
    if (nodes[a].depth != nodes[b].depth) return nodes[a].depth < nodes[b].depth;
    while (nodes[a].parent != nodes[b].parent) a = nodes[a].parent, b = nodes[b].parent;
    return nodes[a].token < nodes[b].token;
}

/* The nodes of all prefixes of the sequences, as far as `depth`; returns how many, the root's among them. */
static whole grow(const Prefix *alive, whole count, whole depth, Node *nodes) {
    whole size = 1;
    nodes[0] = (Node){-1, -1, 0, -1, -1, 0};
    for (whole p = 0; p < count; p++)
        for (whole i = 0, at = 0; i < alive[p].length && i < depth; i++) {
            at = child_of(nodes, &size, at, alive[p].labels[i]);
            nodes[at].mass += alive[p].in_blank + alive[p].in_token;
        }
    return size;
}

/* Tokens and parents of the heaviest nodes, behind the root; returns how many there are, the root included. */
static whole prune(Node *nodes, whole size, whole room, whole *order, whole *tokens, whole *parents) {
    whole count = 0;
    for (whole node = 1; node < size; node++) {
        if (count == room && (room == 0 || !heavier(nodes, node, order[count - 1]))) continue;
        whole at = count < room ? count++ : count - 1;
        for (; at > 0 && heavier(nodes, node, order[at - 1]); at--) order[at] = order[at - 1];
        order[at] = node;
    }
    nodes[0].first = 0;
    for (whole i = 0; i < count; i++) nodes[order[i]].first = i + 1; /* its place; its children come later */
    for (whole i = 0; i < count; i++)
        tokens[i + 1] = nodes[order[i]].token, parents[i + 1] = nodes[nodes[order[i]].parent].first;
    return count + 1;
}

/* ---- both ------------------------------------------------------------------------------------------------------------------ */

/* tokens, probs [frames][num_tokens], blanks [frames]; drafted and parents have room for `room` nodes and the root. Returns how
   many nodes there are, or -1 where there is no memory. */
int64_t foredraft_beam(
    const int64_t *tokens, const double *probs, const double *blanks, int64_t frames, int64_t num_tokens, int64_t beam, int64_t room,
    int64_t depth, int64_t *drafted, int64_t *parents
) {
    const size_t held = (size_t)beam, per_label = held * (size_t)frames;
    const size_t sizes[] = {
        2 * held * sizeof(Prefix), 2 * held * sizeof(Candidate), 2 * per_label * sizeof(whole), (per_label + 1) * sizeof(Node),
        (size_t)room * sizeof(whole),
    };
    char *block = malloc(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4]);
    if (block == NULL) return -1;
    Prefix *alive = (Prefix *)block, *next = alive + beam;
    Candidate *best = (Candidate *)(block + sizes[0]), *own = best + beam;
    whole *labels = (whole *)(block + sizes[0] + sizes[1]);
    Node *nodes = (Node *)(block + sizes[0] + sizes[1] + sizes[2]);
    whole *order = (whole *)(block + sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    for (whole p = 0; p < 2 * beam; p++) alive[p].labels = labels + p * frames;
    whole count = 1;
    alive[0].length = 0, alive[0].in_blank = 1, alive[0].in_token = 0;
    for (whole frame = 0; frame < frames; frame++) {
        const whole at = frame * num_tokens;
        count = advance(alive, count, tokens + at, probs + at, num_tokens, blanks[frame], best, beam, own);
        for (whole i = 0; i < count; i++) {
            const Candidate *one = best + i;
            memcpy(next[i].labels, one->of->labels, (size_t)one->of->length * sizeof(whole));
            if (one->label >= 0) next[i].labels[one->of->length] = one->label;
            next[i].length = length_of(one), next[i].in_blank = one->in_blank, next[i].in_token = one->in_token;
        }
        Prefix *others = alive;
        alive = next, next = others;
    }
    const whole size = prune(nodes, grow(alive, count, depth, nodes), room, order, drafted, parents);
    free(block);
    return size;
}
