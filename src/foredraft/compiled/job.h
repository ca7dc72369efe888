/* A step while it runs: see decoder.c, which includes this behind linear.h. */

typedef struct {
    const Model *model;
    const Step *step;
    Hands hands;
    int64_t count;                 /* new nodes, M; in the last layer only those whose logits are wanted, if `only_wanted` */
    int only_wanted;
    int64_t *tree, *node, *depth;  /* of each new node; depth of every node, by packed index */
    float *states, *qkv, *rotary;  /* [M][hidden], [M][heads + 2 kv_heads][head_dim], [M][head_dim]: cosines, then sines */
    bf16 *normed, *query, *mixed, *act, *last; /* [M][hidden], [M][heads][head_dim] twice, [M][mlp], [rows][hidden] */
    bf16 *embedded, *pair;         /* of a draft head: [M][hidden], [M][2 hidden] */
    float *doubled;                /* of one whose layer has two outputs: [M][2 hidden] */
    float *drafted;                /* of one whose own head has fewer tokens: [rows][those] */
    float *weights;                /* [threads][MOST_QUERIES][room]: scores and probabilities */
    int64_t room;                  /* most visible tokens, a multiple of 16 */
} Job;

/* A phase of a job: which layer, or which norm. */
typedef struct {
    const Job *job;
    int64_t index;
    const bf16 *weight;
} Phase;

/* Where the pool holds a head's keys or values of one slot, [positions][head_dim]. */
INLINE bf16 *stored(const Step *s, bf16 *pool, int64_t layer, int64_t tree, int64_t head) {
    return pool + layer * s->layer_stride + s->slots[tree] * s->slot_stride + head * s->head_stride;
}
