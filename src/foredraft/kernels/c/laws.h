/* Computes laws of float32 logits and draws from them. set.c includes this file after vectors.h.

   Top-k and top-p need the value of the last kept token, but no order of all tokens. A radix search finds the value in three passes
   over the bits of the floats, mapped to integers of the same order. Sums are in float64, in one fixed order. */

INLINE uint32_t in_order(float x) {
    uint32_t bits;
    x += 0.0f; /* makes -0 equal to 0 */
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

/* The smallest kept value when the largest values of total weight `wanted` are kept, and how many equal values are kept. */
typedef struct {
    uint32_t value;
    int64_t equal;
} Edge;

/* weights: weight of every token, or NULL for weight 1. Tokens of weight 0 are ignored. */
static Edge edge_of(const float *x, const float *weights, int64_t size, double wanted) {
    static const int SHIFTS[] = {21, 10, 0}, BINS[] = {2048, 2048, 1024};
    uint32_t value = 0, known = 0;
    double before = 0, single = 1; /* weight of all larger values; weight of one token of this value */
    for (int level = 0; level < 3; level++) {
        double bins[2048] = {0};
        for (int64_t i = 0; i < size; i++) {
            uint32_t key = in_order(x[i]);
            if ((key & known) != value) continue;
            double weight = weights ? weights[i] : 1;
            bins[key >> SHIFTS[level] & (BINS[level] - 1)] += weight;
            if (weight > 0) single = weight;
        }
        int last = 0;
        double larger = before;
        for (int bin = BINS[level] - 1; bin >= 0; bin--) {
            if (!(bins[bin] > 0)) continue;
            before = larger, last = bin;
            larger += bins[bin];
            if (larger >= wanted) break;
        }
        value |= (uint32_t)last << SHIFTS[level];
        known |= (uint32_t)(BINS[level] - 1) << SHIFTS[level];
    }
    double equal = ceil((wanted - before) / single);
    return (Edge){value, equal < 1 ? 1 : equal < (double)size ? (int64_t)equal : size};
}

/* Adds a law in float64: 16 partial sums, then their sum. */
static double mass_of(const float *law, int64_t size) {
    double parts[GROUP] = {0};
    int64_t i = 0;
    for (; i + GROUP <= size; i += GROUP)
        for (int lane = 0; lane < GROUP; lane++) parts[lane] += law[i + lane];
    for (int64_t lane = 0; i + lane < size; lane++) parts[lane] += law[i + lane];
    for (int half = GROUP / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) parts[lane] += parts[lane + half];
    return parts[0];
}

/* Normalises a law unless it has no mass. Returns the mass before. */
static double normalize_law(float *law, int64_t size) {
    const double mass = mass_of(law, size);
    const float share = (float)(1 / mass);
    if (mass > 0)
        for (int64_t i = 0; i < size; i++) law[i] *= share;
    return mass;
}

/* Computes the probabilities of one row; see `warp` in kernels/laws.py. */
static void law_of(const float *logits, int64_t size, float temperature, float least, int64_t top_k, double top_p, float *probs) {
    V highest = v_set(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) highest = v_max(highest, v_load(logits + i));
    float largest = largest_of(highest);
    for (; i < size; i++) largest = logits[i] > largest ? logits[i] : largest;
    const V most = v_set(largest), scale = v_set(temperature), lowest = v_set(least);
    uint32_t edge = 0;
    if (top_k > 0 && top_k < size) edge = edge_of(logits, 0, size, (double)top_k).value;
    for (i = 0; i < size; i += LANES) {
        const V x = v_div(v_sub(v_load_some(logits + i, size - i), most), scale);
        v_store_some(probs + i, v_keep(exponential(x), ~v_below(x, lowest)), size - i);
    }
    const int is_law = (edge == 0 && top_p >= 1) || mass_of(probs, size) > 0;
    if (edge && is_law)
        for (int64_t i = 0; i < size; i++)
            if (in_order(logits[i]) < edge) probs[i] = 0;
    if (top_p < 1 && is_law) {
        Edge last = edge_of(logits, probs, size, top_p * mass_of(probs, size));
        for (int64_t i = 0; i < size; i++) {
            uint32_t key = in_order(logits[i]);
            if (key < last.value || (key == last.value && last.equal-- <= 0)) probs[i] = 0;
        }
    }
    if (!(normalize_law(probs, size) > 0))
        for (int64_t i = 0; i < size; i++) probs[i] = NAN; /* a logit is NaN or infinity, or every logit is minus infinity */
}

/* Computes the probabilities of all rows. temperature is above 0; least is log(min_p) or minus infinity. top_k 0 and top_p 1 keep
   all tokens. */
void EXPORT(laws)(
    const float *logits, int64_t rows, int64_t size, double temperature, double least, int64_t top_k, double top_p, float *probs
) {
    for (int64_t row = 0; row < rows; row++)
        law_of(logits + row * size, size, (float)temperature, (float)least, top_k, top_p, probs + row * size);
}

/* Finds the `count` largest numbers of every row, in descending order, and their indices. Ties go to the smaller index. */
void EXPORT(largest)(const float *x, int64_t rows, int64_t size, int64_t count, float *values, int64_t *places) {
    for (int64_t row = 0; row < rows; row++, x += size, values += count, places += count) {
        int64_t have = 0;
        for (int64_t i = 0; i < size; i += LANES) {
            unsigned larger = size - i >= LANES ? (1u << LANES) - 1 : (1u << (size - i)) - 1;
            if (have == count) larger &= v_above(v_load_some(x + i, size - i), v_set(values[count - 1]));
            for (; larger; larger &= larger - 1) {
                const int64_t place = i + __builtin_ctz(larger);
                if (have == count && !(x[place] > values[count - 1])) continue; /* an earlier number raised the bound */
                int64_t at = have < count ? have++ : count - 1;
                for (; at && values[at - 1] < x[place]; at--) values[at] = values[at - 1], places[at] = places[at - 1];
                values[at] = x[place], places[at] = place;
            }
        }
    }
}

/* Returns the first token at which the cumulative mass exceeds `uniform` times the total, or -1 if there is no mass. The law need
   not be normalised. */
int64_t EXPORT(categorical)(const float *probs, int64_t size, double uniform) {
    enum { STRIDE = 128 };
    double before[size / STRIDE + 1], sum = 0;
    for (int64_t i = 0; i < size; i++) {
        if (i % STRIDE == 0) before[i / STRIDE] = sum;
        sum += probs[i];
    }
    if (!(sum > 0)) return -1;
    const double wanted = uniform * sum;
    int64_t block = (size - 1) / STRIDE, last = -1;
    while (block > 0 && before[block] > wanted) block--;
    sum = before[block];
    for (int64_t i = block * STRIDE; i < size; i++) {
        if (!(probs[i] > 0)) continue;
        sum += probs[i], last = i;
        if (sum > wanted) return i;
    }
    for (int64_t i = size - 1; last < 0; i--) /* rounding made `wanted` reach the total */
        if (probs[i] > 0) last = i;
    return last;
}

/* Writes norm([target - draft]+) to `left`. Returns its mass before normalisation. */
double EXPORT(subtract)(const float *target, const float *draft, int64_t size, float *left) {
    for (int64_t i = 0; i < size; i++) {
        const float x = target[i] - draft[i];
        left[i] = x > 0 ? x : 0;
    }
    return normalize_law(left, size);
}

/* Writes the law without one token to `left`, normalised. Returns its mass before normalisation. */
double EXPORT(without)(const float *law, int64_t token, int64_t size, float *left) {
    memcpy(left, law, (size_t)size * sizeof *law);
    left[token] = 0;
    return normalize_law(left, size);
}
