/* The arguments of the decoder. structures.py has structures with the same fields in the same order. */

#include <stdint.h>

typedef uint16_t bf16;

typedef struct {
    /* BF16: [out / 32][in / 2][32][2]. F16, F32: [out / 32][in][32]. NUMBERS: see quantized.h. out is padded to 32 with zeros */
    const void *weight;
    int64_t type;      /* of the weights */
    const float *bias; /* [out] or NULL */
    int64_t out, in;
    /* of the type NUMBERS only, see quantized.h */
    int64_t bits, is_rounded; /* of a number: 4, 5, 6 or 8; whether inputs are rounded to eight bits */
    int64_t form, group;      /* how numbers become weights; inputs that share a scale */
    int64_t scale_type;       /* BF16, F16 or F32 */
    const void *scales, *more;
} Linear;

/* x + silu(linear(x)), or skip(x) + silu(linear(x)) if the weight of `skip` is not NULL. */
typedef struct {
    Linear linear, skip;
} Residual;

typedef struct {
    const float *input_norm, *q_norm, *k_norm, *post_norm; /* NULL: no such norm; q_norm, k_norm: [head_dim] */
    Linear qkv[3]; /* their outputs follow each other; fewer parts if weights are stored alike, the others have no outputs */
    Linear output, gate, up, down; /* a draft head's down has 2 hidden outputs if it scores one state and carries another */
    int64_t window; /* tokens that a token sees, itself included */
} Layer;

/* The part of a draft head that combines an embedding and a feature: fc, or feature_norm, or none (both NULL). */
typedef struct {
    Linear fc;            /* EAGLE: input is [embedding ; feature] */
    const float *norm;    /* norm of FSPAD's perceptron, whose gate takes the embedding; NULL: no perceptron */
    Linear gate, up, down;
    const float *feature_norm; /* EAGLE-3: qkv takes [input_norm(embedding) ; feature_norm(feature)]; the residual is the feature */
    Linear ahead;             /* parallel drafting: maps [embedding ; feature] to the inputs of all slots behind the pair */
} Entry;

typedef struct {
    int64_t type; /* of states, keys and values: BF16, F16 or F32 */
    int64_t hidden, heads, kv_heads, head_dim, mlp, num_layers;
    float eps, rotary_scale;
    const float *frequencies; /* [head_dim / 2] */
    const void *embedding;    /* [vocabulary][hidden], or NULL if `tied` holds it */
    Linear tied;              /* the embedding as a linear layer, which is usually the head */
    const Layer *layers;
    const float *norm;        /* NULL: no norm */
    Linear head;              /* weight NULL: no head, and the input states are the given features */
    int64_t vocabulary;
    const int64_t *token_ids; /* token of each output of the head; NULL: output i is token i */
    Linear blank;             /* one more output after those of the head; weight NULL: none */
    Entry entry;
} Model;

typedef struct {
    int64_t num_trees;
    const int64_t *tokens, *parents, *offsets; /* as in a TreeBatch */
    const int64_t *lengths, *first;            /* per tree: committed tokens, nodes run before */
    const int64_t *blocks, *block_starts;      /* block table: the blocks of 32 tokens of each tree, by number; first block per tree */
    int64_t num_rows;
    const int64_t *rows; /* new nodes whose logits are computed, by index among the new nodes */
    float *logits;       /* [num_rows][vocabulary]; the blank is part of the vocabulary */
    int64_t num_features;
    const int64_t *feature_layers; /* 0: embedding, i: state after i layers, -1: state after the last norm */
    void *features;                /* [new nodes][num_features * hidden] */
    void *keys, *values; /* the pool; a token stands at layer_stride * layer + head_stride * head + head_dim * (32 * its block + position % 32) */
    int64_t layer_stride, head_stride;
    int64_t threads;
    const void *const *given; /* draft head, per tree: features of its first nodes, [num_given][hidden] */
    const int64_t *num_given;
    void *const *carried;     /* draft head, per tree: output features of its nodes for their children, [nodes][hidden]; or NULL */
    int64_t num_slots; /* number of slots to be filled at the end of every tree; such trees have no nodes that ran before */
} Step;

/* What to draw after the trees of a step, `depth` tokens each. */
typedef struct {
    int64_t depth, kept;    /* a law keeps its most likely tokens: this many, at least 1 */
    const double *uniforms; /* [trees][depth]; NULL: the most likely tokens are taken */
    double temperature, least; /* the limits of the laws, see `laws` */
    int64_t top_k;
    double top_p;
    int64_t *tokens;        /* [trees][depth] */
    float *laws;            /* with uniforms: [trees][depth][kept] */
    int64_t *token_ids;     /* with uniforms, if not all tokens are kept: the tokens of the laws */
} Chains;

/* How the children of a node were drawn, as in core/shape.py. */
enum { WITHOUT_REPLACEMENT = 2 };

/* Trees that are verified together. The numbers of a node stand at its packed index. */
typedef struct {
    int64_t num_trees;
    const int64_t *offsets, *rows;             /* per tree: first node, and the row of its logits; [num_trees + 1], [num_trees] */
    const int64_t *tokens, *parents, *drawn, *draft_row; /* as in a TreeBatch */
    const float *logits;                       /* [rows][size] */
    int64_t size;
    const float *draft_probs;                  /* [num_laws][kept] */
    const int64_t *draft_ids;                  /* the tokens of the draft laws; NULL: entry i is token i */
    int64_t num_laws, kept;
    const double *limits;                      /* [num_trees][4]: temperature, log of min_p, top_k, top_p */
    const double *accept_uniforms, *next_uniforms; /* per node; NULL if every temperature is 0 */
    /* per tree, returned: last accepted node, -1 for a tree that cannot be read; the token after it; first node of the path whose
       logits define no law, or -1 */
    int64_t *last, *next, *lawless;
} Trees;
