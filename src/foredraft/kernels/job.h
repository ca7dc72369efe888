/* The state of a running step. decoder.c includes this file after linear.h. */

typedef struct {
    const Model *model;
    const Step *step;
    Hands hands;
    int64_t count;                 /* number of new nodes, M; if `only_wanted`, only those whose logits are computed */
    int only_wanted;
    int64_t *tree, *node, *depth;  /* tree and node of each new node; depth of every node, by packed index */
    float *states, *qkv, *rotary;  /* [M][hidden], [M][heads + 2 kv_heads][head_dim], [M][head_dim]: cosines, then sines */
    bf16 *normed, *query, *mixed, *act, *last; /* [M][hidden], [M][heads][head_dim] twice, [M][mlp], [rows][hidden] */
    bf16 *embedded, *pair;         /* draft head: [M][hidden], [M][2 hidden] */
    float *doubled;                /* draft head with two output states: [M][2 hidden] */
    float *drafted;                /* draft head with a smaller vocabulary: [rows][outputs of the head] */
    float *weights;                /* [threads][MOST_QUERIES][room]: scores and probabilities */
    int64_t room;                  /* largest number of visible tokens, rounded up to a multiple of 16 */
} Job;

/* A phase of a job, with the index of its layer or the weight of its norm. */
typedef struct {
    const Job *job;
    int64_t index;
    const bf16 *weight;
} Phase;

/* Returns a head's keys or values in the pool for the slot of a tree, [positions][head_dim]. */
INLINE bf16 *stored(const Step *s, bf16 *pool, int64_t layer, int64_t tree, int64_t head) {
    return pool + layer * s->layer_stride + s->slots[tree] * s->slot_stride + head * s->head_stride;
}
