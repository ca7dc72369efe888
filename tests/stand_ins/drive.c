/* Runs what depends on vectors on every instruction set of SETS, a list of X(name), and prints a digest for each: layers of all
   types at many numbers of rows, residual blocks, whole forwards over trees, laws, and their largest entries. It needs no Python, so
   it runs wherever a compiler or an emulator does. All digests of a name are equal unless a set multiplies in pairs. */

#include <stdio.h>
#include <stdlib.h>

#include "numbers.h"
#include "passed.h"

#define X(set) \
    int foredraft_forward_##set(const Model *, const Step *); \
    int foredraft_linear_##set(const Linear *, int64_t, const void *, int64_t, float *, int64_t); \
    int foredraft_residuals_##set(const Residual *, int64_t, int64_t, const void *, int64_t, void *, int64_t); \
    void foredraft_laws_##set(const float *, int64_t, int64_t, double, double, int64_t, double, float *); \
    void foredraft_largest_##set(const float *, int64_t, int64_t, int64_t, float *, int64_t *);
SETS
#undef X

enum { BF16, F16, F32, Q4, HIDDEN = 96, HEADS = 6, KV_HEADS = 2, HEAD_DIM = 32, MLP = 160, LAYERS = 2, VOCABULARY = 75 };
enum { QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM, PROMPT = 37, NODES = 15, ROOM = 128, BLOCK = 32, PADDED = 96 }; /* BLOCK is that of job.h */

static const char *const TYPES[] = {"bf16", "f16", "f32", "q4"};

static uint64_t state;

static uint32_t word(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

/* A number around zero. */
static float number(float size) { return ((float)(word() >> 8) / 8388608 - 1) * size; }

/* Random numbers of a type. The memory lives until the end. */
static void *numbers(int type, int64_t count, float size) {
    char *all = calloc((size_t)count + 16, 4);
    for (int64_t i = 0; i < count; i++) {
        const float x = number(size);
        if (type == F32) ((float *)all)[i] = x;
        else ((uint16_t *)all)[i] = type == F16 ? half_of_float(x) : bf16_of_float(x);
    }
    return all;
}

static Linear layer(int type, int64_t out, int64_t in) {
    const int64_t padded = (out + 31) / 32 * 32;
    Linear made = {.type = type, .out = out, .in = in, .bias = numbers(F32, padded, 0.5f)};
    if (type != Q4) made.weight = numbers(type, padded * in, 0.2f);
    else {
        Block *blocks = calloc((size_t)(padded / 32 * in / 32), sizeof *blocks);
        for (int64_t b = 0; b < padded / 32 * (in / 32); b++) {
            for (int i = 0; i < 32; i++) blocks[b].scales[i] = bf16_of_float(number(0.1f));
            for (int i = 0; i < (int)sizeof blocks->numbers; i++) ((uint8_t *)blocks[b].numbers)[i] = (uint8_t)word();
        }
        made.weight = blocks;
    }
    return made;
}

static uint64_t digest;

static void add(const void *bytes, int64_t size) {
    for (int64_t i = 0; i < size; i++) digest = (digest ^ ((const unsigned char *)bytes)[i]) * 1099511628211u;
}

static void say(const char *name, const char *type, const char *set) {
    printf("%s_%s %s %016llx\n", name, type, set, (unsigned long long)digest);
    digest = 14695981039346656037u;
}

static Model model_of(int type, int q4) {
    const int of_layers = q4 ? Q4 : type;
    Layer *layers = calloc(LAYERS, sizeof *layers);
    for (int i = 0; i < LAYERS; i++)
        layers[i] = (Layer){
            .input_norm = numbers(F32, HIDDEN, 1), .q_norm = i ? numbers(F32, HEAD_DIM, 1) : NULL, .post_norm = numbers(F32, HIDDEN, 1),
            .qkv = layer(of_layers, QKV, HIDDEN), .output = layer(of_layers, HIDDEN, HEADS * HEAD_DIM),
            .gate = layer(of_layers, MLP, HIDDEN), .up = layer(of_layers, MLP, HIDDEN), .down = layer(of_layers, HIDDEN, MLP),
            .window = i ? 9 : INT64_C(1) << 62,
        };
    return (Model){
        .type = type, .hidden = HIDDEN, .heads = HEADS, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .mlp = MLP, .num_layers = LAYERS,
        .eps = 1e-5f, .rotary_scale = 1, .frequencies = numbers(F32, HEAD_DIM / 2, 1), .embedding = numbers(type, VOCABULARY * HIDDEN, 1),
        .layers = layers, .norm = numbers(F32, HIDDEN, 1), .head = layer(type, VOCABULARY, HIDDEN), .vocabulary = VOCABULARY,
    };
}

typedef int Forward(const Model *, const Step *);

/* A prompt, and a tree behind it. */
static void forward(Forward *run, int type, int q4) {
    static float logits[PROMPT * VOCABULARY];
    static char features[PROMPT * 3 * HIDDEN * 4];
    state = 5;
    const Model model = model_of(type, q4);
    const int64_t plane = LAYERS * KV_HEADS * ROOM * HEAD_DIM, feature_layers[] = {0, 1, -1}, starts[] = {0}, first[] = {0};
    int64_t tokens[PROMPT], chain[PROMPT], blocks[ROOM / BLOCK], rows[PROMPT];
    static const int64_t tree[NODES] = {-1, 0, 0, 1, 2, 1, 3, 4, 6, 2, 6, 0, 8, 12, 13};
    for (int i = 0; i < PROMPT; i++) tokens[i] = word() % VOCABULARY, chain[i] = i - 1, rows[i] = i;
    for (int i = 0; i < ROOM / BLOCK; i++) blocks[i] = ROOM / BLOCK - 1 - i;
    char *keys = numbers(type, plane, 0), *values = numbers(type, plane, 0);
    for (int step = 0; step < 2; step++) {
        const int64_t count = step ? NODES : PROMPT, lengths[] = {step ? PROMPT : 0}, offsets[] = {0, count};
        const Step given = {
            .num_trees = 1, .tokens = tokens, .parents = step ? tree : chain, .offsets = offsets, .lengths = lengths, .first = first,
            .blocks = blocks, .block_starts = starts, .num_rows = count, .rows = rows, .logits = logits, .num_features = 3,
            .feature_layers = feature_layers, .features = features, .keys = keys, .values = values,
            .layer_stride = KV_HEADS * ROOM * HEAD_DIM, .head_stride = ROOM * HEAD_DIM, .threads = 1 + step,
        };
        if (run(&model, &given)) abort();
        add(logits, count * VOCABULARY * 4);
        add(features, count * 3 * HIDDEN * (type == F32 ? 4 : 2));
    }
}

#define LAYERS_ON(set) \
    for (int kind = BF16; kind <= Q4; kind++) { \
        static const int64_t ROWS[] = {1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 24, 40, 97}; \
        const int type = kind == Q4 ? BF16 : kind; \
        state = 3; \
        const Linear one = layer(kind, VOCABULARY, HIDDEN); \
        const Residual blocks[] = {{.linear = layer(kind, PADDED, HIDDEN)}, {layer(kind, PADDED, PADDED), layer(kind, PADDED, PADDED)}}; \
        const void *x = numbers(type, 97 * HIDDEN, 2); \
        static float y[97 * PADDED]; \
        for (int i = 0; i < (int)(sizeof ROWS / sizeof *ROWS); i++) { \
            if (foredraft_linear_##set(&one, type, x, ROWS[i], y, 1 + i % 3)) abort(); \
            add(y, ROWS[i] * VOCABULARY * 4); \
        } \
        say("linear", TYPES[kind], #set); \
        if (foredraft_residuals_##set(blocks, 2, type, x, 23, y, 2)) abort(); \
        add(y, 23 * PADDED * (type == F32 ? 4 : 2)); \
        say("residuals", TYPES[kind], #set); \
        forward(foredraft_forward_##set, type, kind == Q4); \
        say("forward", TYPES[kind], #set); \
    }

#define LAWS_ON(set) \
    for (int64_t size = 1; size < 300; size = size * 3 / 2 + 1) { \
        state = (uint64_t)size; \
        float *x = numbers(F32, 2 * size, 9), *law = numbers(F32, 2 * size, 0), highest[3] = {0}; \
        int64_t places[3] = {0}; \
        if (size > 5) x[size + 3] = NAN, x[2] = -INFINITY; \
        foredraft_laws_##set(x, 2, size, 0.7, -INFINITY, 0, 1, law); \
        add(law, size * 4); /* a row with NaN may hold any NaN */ \
        foredraft_laws_##set(x, 1, size, 1.3, -9, 5, 0.8, law); \
        add(law, size * 4); \
        foredraft_largest_##set(x, 1, size, size < 3 ? size : 3, highest, places); \
        add(highest, sizeof highest), add(places, sizeof places); \
    } \
    say("laws", "f32", #set);

int main(void) {
    digest = 14695981039346656037u;
#define X(set) LAYERS_ON(set) LAWS_ON(set)
    SETS
    return 0;
}
