/* What decoder.c is given: the same fields in the same order stand in models/packed.py. */

#include <stdint.h>

typedef uint16_t bf16;

typedef struct {
    const void *weight; /* [out / 32][in / 2][32][2] bf16, out padded with zeros to a multiple of 32; or if `few`, of four bits: */
    int64_t few;        /* [out / 32][in / 32] Block, padded alike */
    const bf16 *bias;   /* [out] or NULL */
    int64_t out, in;
} Linear;

/* 32 inputs of 32 outputs: the weight of output o is (number - 8) scales[o], and its number the lower half of the bytes
   numbers[i / 4][o][i % 4] for o < 16, the upper half of numbers[i / 4][o - 16][i % 4] for the others. */
typedef struct {
    bf16 scales[32];
    uint8_t numbers[8][16][4];
} Block;

/* x + silu(linear of x), or with `skip` (weight not NULL) skip of x + that. */
typedef struct {
    Linear linear, skip;
} Residual;

typedef struct {
    const bf16 *input_norm, *q_norm, *k_norm, *post_norm; /* NULL: no norm there; q_norm, k_norm: [head_dim] */
    Linear qkv, output, gate, up, down; /* down of a draft head's layer: 2 hidden outputs, where what is scored and what is carried differ */
    int64_t window; /* tokens that a token sees, itself included */
} Layer;

/* How a draft head takes in an embedding and a feature: by fc, or by feature_norm, or not at all (both NULL). */
typedef struct {
    Linear fc;            /* EAGLE's: of [embedding ; feature] */
    const bf16 *norm;     /* of FSPAD's perceptron, whose gate is driven by the embedding; NULL: there is none */
    Linear gate, up, down;
    const bf16 *feature_norm; /* EAGLE-3's: qkv takes [input_norm of the embedding ; this of the feature], the residual is the feature */
    Linear ahead;             /* of a head that drafts in parallel: entries of all slots behind a pair, of [embedding ; feature] */
} Entry;

typedef struct {
    int64_t hidden, heads, kv_heads, head_dim, mlp, num_layers;
    float eps, rotary_scale;
    const float *frequencies; /* [head_dim / 2] */
    const bf16 *embedding;    /* [vocabulary][hidden], or NULL: */
    const bf16 *tied;         /* laid out as the weight of a linear layer */
    const Layer *layers;
    const bf16 *norm;         /* NULL: none */
    Linear head;              /* weight NULL: there is none, and the states are the features that are given */
    int64_t vocabulary;
    const int64_t *token_ids; /* of the head's outputs; NULL: it has one for every token */
    Linear blank;             /* one output more, behind the head's; weight NULL: none */
    Entry entry;
} Model;

typedef struct {
    int64_t num_trees;
    const int64_t *tokens, *parents, *offsets; /* of a TreeBatch */
    const int64_t *lengths, *slots, *first;    /* per tree: committed tokens, slot in the pool, nodes run before */
    int64_t num_rows;
    const int64_t *rows; /* new nodes whose logits are wanted, counted in packed order */
    float *logits;       /* [num_rows][vocabulary], the blank's among them */
    int64_t num_features;
    const int64_t *feature_layers; /* 0: embedding, i: after i layers, -1: after the last norm */
    bf16 *features;                /* [new nodes][num_features * hidden] */
    bf16 *keys, *values;           /* the pool, [layers][slots][kv_heads][positions][head_dim] */
    int64_t layer_stride, slot_stride, head_stride;
    int64_t threads;
    const bf16 *const *given; /* of a draft head, per tree: [num_given][hidden] features of its first nodes, */
    const int64_t *num_given;
    bf16 *const *carried;     /* and [nodes][hidden] those that come out of wanted nodes, for the nodes behind them; or NULL */
    int64_t num_slots; /* the last so many nodes of every tree are slots to be filled; such trees have no nodes run before */
} Step;
