/* The state of a running step. set.c includes this file after linear.h. */

typedef struct {
    const Model *model;
    const Step *step;
    Workspace workspace;
    int type;                      /* of the model's numbers */
    int64_t count;                 /* number of new nodes, M; if `only_wanted`, only those whose logits are computed */
    int only_wanted;
    int64_t *tree, *node, *depth;  /* tree and node of each new node; depth of every node, by packed index */
    float *states, *qkv, *rotary;  /* [M][hidden], [M][heads + 2 kv_heads][head_dim], [M][head_dim]: cosines, then sines */
    void *normed, *query, *mixed, *act, *last; /* inputs: [M][hidden], [M][heads][head_dim] twice, [M][mlp], [rows][hidden] */
    void *embedded, *pair;         /* draft head, inputs: [M][hidden], [M][2 hidden] */
    float *doubled;                /* draft head with two output states: [M][2 hidden] */
    float *drafted;                /* draft head with a smaller vocabulary: [rows][outputs of the head] */
    float *weights;                /* [threads][MOST_QUERIES][room]: scores and probabilities */
    int64_t room;                  /* largest number of visible tokens, rounded up to a multiple of 16 */
} Job;

/* A phase of a job, with the index of its layer or the weight of its norm. */
typedef struct {
    const Job *job;
    int64_t index;
    const float *weight;
} Phase;

/* Tokens of a block of the pool. */
enum { BLOCK = 32 };

/* Returns where a token of a tree stands in the pool, for layer 0 and head 0. */
INLINE int64_t place_of(const Step *s, int64_t tree, int64_t position, int64_t size) {
    return (s->blocks[s->block_starts[tree] + position / BLOCK] * BLOCK + position % BLOCK) * size;
}
