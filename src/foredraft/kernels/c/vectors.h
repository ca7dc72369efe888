/* What all kernels do with vectors, over the operations of one instruction set (vector_*.h): numbers of every type, ordered sums,
   the exponential. LANES is the number of lanes of a vector; every result is the same for any LANES. */

/* Types of weights, and of the numbers of a model: states, keys and values. NUMBERS: few bits, for weights only. */
enum { BF16, F16, F32, NUMBERS };

enum { GROUP = 16, PER_GROUP = GROUP / LANES }; /* sums over lanes are sums of 16 partial sums, whatever the set */

INLINE int64_t size_of(int type) { return type == F32 ? 4 : 2; }

/* Numbers as they are stored: in the type of the model. */
INLINE V load(int type, const void *x, int64_t i) {
    if (type == F32) return v_load((const float *)x + i);
    const C cells = c_load((const uint16_t *)x + i);
    return type == BF16 ? v_of_bf16(cells) : v_of_half(cells);
}

INLINE void store(int type, void *to, int64_t i, V x) {
    if (type == F32) v_store((float *)to + i, x);
    else c_store((uint16_t *)to + i, type == BF16 ? bf16_of_v(x) : half_of_v(x));
}

INLINE float load_one(int type, const void *x, int64_t i) {
    if (type == F32) return ((const float *)x)[i];
    const uint16_t cell = ((const uint16_t *)x)[i];
    return type == BF16 ? float_of_bf16(cell) : float_of_half(cell);
}

/* Inputs of linear layers, rounded to the type of the model and stored as this set multiplies them: pairs of bf16, or float32. */
INLINE int is_paired(int type) { return PAIRED && type == BF16; }

INLINE int64_t input_size(int type) { return is_paired(type) ? 2 : 4; }

INLINE void *input_at(int type, const void *x, int64_t i) { return (char *)x + i * input_size(type); }

INLINE V load_input(int type, const void *x, int64_t i) {
    return is_paired(type) ? v_of_bf16(c_load((const uint16_t *)x + i)) : v_load((const float *)x + i);
}

INLINE V rounded(int type, V x) {
    if (type == F32) return x;
    return type == BF16 ? v_of_bf16(bf16_of_v(x)) : v_of_half(half_of_v(x));
}

INLINE void store_input(int type, void *to, int64_t i, V x) {
    if (is_paired(type)) c_store((uint16_t *)to + i, bf16_of_v(x));
    else v_store((float *)to + i, rounded(type, x));
}

/* Adds or compares 16 partial results in a fixed order. */
INLINE float sum_of(const V *parts) {
    float x[GROUP];
    for (int v = 0; v < PER_GROUP; v++) v_store(x + v * LANES, parts[v]);
    for (int half = GROUP / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

INLINE float largest_of(V part) {
    float x[LANES];
    v_store(x, part);
    for (int i = 1; i < LANES; i++) x[0] = x[0] > x[i] ? x[0] : x[i];
    return x[0];
}

/* e^x as 2^n times a polynomial in the remainder. Relative error below 1e-6. 0 for x far below 0, NaN for NaN. */
INLINE V exponential(V x) {
    x = v_max(v_set(-104.0f), x);
    const V n = v_round(v_mul(x, v_set(1.44269504f)));
    V r = v_fnma(n, v_set(0.693359375f), x);
    r = v_fnma(n, v_set(-2.12194440e-4f), r);
    V p = v_set(1.0f / 720);
    p = v_fma(p, r, v_set(1.0f / 120));
    p = v_fma(p, r, v_set(1.0f / 24));
    p = v_fma(p, r, v_set(1.0f / 6));
    p = v_fma(p, r, v_set(0.5f));
    p = v_fma(p, r, v_set(1.0f));
    p = v_fma(p, r, v_set(1.0f));
    return v_scale(p, n);
}

/* x / (1 + e^-x) */
INLINE V silu(V x) { return v_div(x, v_add(v_set(1.0f), exponential(v_sub(v_set(0.0f), x)))); }
