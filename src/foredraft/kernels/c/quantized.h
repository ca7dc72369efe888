/* Weights of few bits. linear.h includes this file.

   A weight of output o and input i is (number - zero) * scale + shift. A number has 4, 5, 6 or 8 bits, and zero is 2^(bits - 1).
   Scale and shift belong to the output and to a group of inputs.

   Numbers stand in blocks of 32 outputs and 32 inputs, [out / 32][in / 32][128 * bits bytes]. A block of eight bits is
   [8 steps][32 outputs][4 inputs]. All others begin with the lower four bits, [8 steps][16][4]: the lower half of a byte belongs to
   output o, the upper half to output 16 + o. Behind them stand the other bits of five, [2 halves][16][4], where bit s belongs to step
   s, and of six, [2 halves][2][16][4], where two bits belong to each of four steps.

   The form says where scale and shift are found. `group` inputs share them:
   PLAIN   scales [out / 32][in / group][32] of scale_type, and no shift
   ZEROS   also int8 more[out / 32][in / group][32]: shift = -more * scale
   SHIFTS  also more[out / 32][in / group][32] of scale_type: shift = zero * scale + more
   SUPER   scales [out / 32][in / 256][2][32] of scale_type, d and e; int8 more[out / 32][in / 32][2][32], f and g: scale = d f, and
           shift = zero * scale - e g
   SMALL   scales [out / 32][in / 256][32] of scale_type, and int8 more[out / 32][in / 16][32]: scale = scales * more, no shift */

enum { PLAIN, ZEROS, SHIFTS, SUPER, SMALL };

enum { STEP = 4, STEPS = TILE / STEP, SUPER_GROUP = 256, SMALL_GROUP = 16 };

INLINE int is_shifted(const Linear *layer) { return layer->form >= ZEROS && layer->form <= SUPER; }

/* Returns the bytes of `scales`, and of `more`, for 32 outputs. */
INLINE int64_t scale_bytes(const Linear *layer) {
    const int64_t groups = layer->form == SUPER ? 2 * layer->in / SUPER_GROUP : layer->in / (layer->form == SMALL ? SUPER_GROUP : layer->group);
    return groups * TILE * size_of((int)layer->scale_type);
}

INLINE int64_t more_bytes(const Linear *layer) {
    if (layer->form == SHIFTS) return scale_bytes(layer);
    return TILE * (layer->form == SUPER ? 2 * layer->in / TILE : layer->in / (layer->form == SMALL ? SMALL_GROUP : layer->group));
}

/* Returns the steps of a block that share a scale. */
INLINE int steps_of(const Linear *layer) { return layer->form == SMALL ? SMALL_GROUP / STEP : STEPS; }

INLINE float zero_of(int64_t bits) { return (float)(1 << (bits - 1)); }

/* Returns scale and shift of LANES outputs of a tile from `lane` on, and of the group of input i. */
INLINE V scale_of(const Linear *layer, int64_t tile, int64_t i, int lane, V *shift) {
    const int type = (int)layer->scale_type;
    const int8_t *more = layer->more;
    if (layer->form == SUPER) {
        const int64_t super = (tile * (layer->in / SUPER_GROUP) + i / SUPER_GROUP) * 2 * TILE + lane;
        const int64_t at = (tile * (layer->in / TILE) + i / TILE) * 2 * TILE + lane;
        const V scale = v_mul(load(type, layer->scales, super), v_of_s8(more + at));
        const V low = v_mul(load(type, layer->scales, super + TILE), v_of_s8(more + at + TILE));
        *shift = v_fms(v_set(zero_of(layer->bits)), scale, low);
        return scale;
    }
    if (layer->form == SMALL) {
        const int64_t super = (tile * (layer->in / SUPER_GROUP) + i / SUPER_GROUP) * TILE + lane;
        const int64_t at = (tile * (layer->in / SMALL_GROUP) + i / SMALL_GROUP) * TILE + lane;
        return v_mul(load(type, layer->scales, super), v_of_s8(more + at));
    }
    const int64_t at = (tile * (layer->in / layer->group) + i / layer->group) * TILE + lane;
    const V scale = load(type, layer->scales, at);
    if (layer->form == ZEROS) *shift = v_mul(v_sub(v_set(0), v_of_s8(more + at)), scale);
    if (layer->form == SHIFTS) *shift = v_fma(v_set(zero_of(layer->bits)), scale, load(type, layer->more, at));
    return scale;
}

INLINE int64_t block_bytes(int64_t bits) { return 128 * bits; }

/* Returns the numbers of LANES outputs, from vector v of a block on, and of the four inputs of a step. */
INLINE B numbers_of(const int bits, const uint8_t *block, int step, int v) {
    enum { HALF = VECTORS / 2, WORDS = 64 };
    const int upper = v >= HALF, at = (upper ? v - HALF : v) * LANES * STEP, per = bits == 5 ? 8 : 4;
    if (bits == 8) return b_load(block + step * 2 * WORDS + v * LANES * STEP);
    const B both = b_load(block + step * WORDS + at), four = upper ? b_high(both) : b_low(both);
    if (bits == 4) return four;
    const B plane = b_load(block + (STEPS + (bits - 4) * upper + step / per) * WORDS + at);
    return b_join(four, b_bits(plane, step % per * (bits - 4), bits == 5 ? 1 : 3));
}

/* Returns the number of input k of a block, for the output of a lane. */
INLINE int number_at(int64_t bits, const uint8_t *block, int64_t lane, int64_t k) {
    enum { WORDS = 64 };
    const int64_t step = k / STEP, at = lane % 16 * STEP + k % STEP, upper = lane / 16;
    if (bits == 8) return block[step * 2 * WORDS + lane * STEP + k % STEP];
    const int four = block[step * WORDS + at] >> 4 * upper & 15;
    if (bits == 5) return four | (block[(STEPS + upper) * WORDS + at] >> step & 1) << 4;
    if (bits == 6) return four | (block[(STEPS + 2 * upper + step / 4) * WORDS + at] >> step % 4 * 2 & 3) << 4;
    return four;
}

/* Writes the weights of one output. */
static void weights_of(const Linear *layer, int64_t output, float *out) {
    const int64_t tile = output / TILE, lane = output % TILE, per = STEP * steps_of(layer);
    const uint8_t *blocks = (const uint8_t *)layer->weight + tile * layer->in / TILE * block_bytes(layer->bits);
    for (int64_t begin = 0; begin < layer->in; begin += per) {
        float scales[LANES], shifts[LANES];
        V shift = v_set(0);
        v_store(scales, scale_of(layer, tile, begin, (int)(lane / LANES * LANES), &shift));
        v_store(shifts, shift);
        for (int64_t i = begin; i < begin + per; i++) {
            const int number = number_at(layer->bits, blocks + i / TILE * block_bytes(layer->bits), lane, i % TILE);
            const float value = (float)number - zero_of(layer->bits), scale = scales[lane % LANES];
            out[i] = is_shifted(layer) ? fmaf(value, scale, shifts[lane % LANES]) : value * scale;
        }
    }
}

/* ---- inputs rounded to eight bits --------------------------------------------------------------------------------------------- */

/* Computes all outputs of a tile for n rows. Sums of whole numbers are exact. They are scaled, and added in the order of the groups. */
INLINE void rounded_tile_of(
    const int n, const int bits, const Rows *x, int64_t row, const Linear *layer, int64_t tile, Ahead ahead, float (*out)[TILE]
) {
    const int64_t size = layer->in, blocks = size / TILE, units = size / SMALL_GROUP;
    const int8_t *inputs = (const int8_t *)x->rows + row * size;
    const uint8_t *block = (const uint8_t *)layer->weight + tile * blocks * block_bytes(bits);
    const int per = steps_of(layer), zero = 1 << (bits - 1);
    V sum[MOST_ROWS][VECTORS];
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < VECTORS; v++) sum[m][v] = v_set(0);
    for (int64_t b = 0; b < blocks; b++, block += block_bytes(bits)) {
        for (int step = 0; step < STEPS;) {
            const int begin = step;
            Q whole[MOST_ROWS][VECTORS];
            UNROLL
            for (int m = 0; m < n; m++)
                UNROLL
                for (int v = 0; v < VECTORS; v++) whole[m][v] = q_zero();
            for (; step < begin + per; step++) {
                for (int line = 0; line < (bits == 8 ? 2 : 1); line++) ask(&ahead, 1);
                UNROLL
                for (int v = 0; v < VECTORS; v++) {
                    const B numbers = numbers_of(bits, block, step, v);
                    UNROLL
                    for (int m = 0; m < n; m++) {
                        const int8_t *four = inputs + m * size + b * TILE + STEP * step;
                        whole[m][v] = bits == 4 ? q_dot(whole[m][v], numbers, four) : wide_dot(whole[m][v], numbers, four);
                    }
                }
            }
            UNROLL
            for (int v = 0; v < VECTORS; v++) {
                V shift = v_set(0);
                const V scale = scale_of(layer, tile, b * TILE + STEP * begin, v * LANES, &shift);
                UNROLL
                for (int m = 0; m < n; m++) {
                    const int32_t *sums = (const int32_t *)x->sums + (row + m) * units + 2 * b + begin * STEP / SMALL_GROUP;
                    const int32_t total = per == STEPS ? sums[0] + sums[1] : sums[0];
                    const V value = v_set(x->steps[(row + m) * blocks + b]);
                    const V exact = bits == 4 ? q_sum(whole[m][v], -zero * total) : wide_sum(whole[m][v], -zero * total);
                    sum[m][v] = v_fma(exact, v_mul(scale, value), sum[m][v]);
                    if (is_shifted(layer)) sum[m][v] = v_fma(v_mul(v_set((float)total), value), shift, sum[m][v]);
                }
            }
        }
    }
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < VECTORS; v++) v_store(out[m] + v * LANES, sum[m][v]);
}

/* ---- inputs as they are ------------------------------------------------------------------------------------------------------- */

/* Returns the weights of input STEP * step + k of a block. */
INLINE V exact_weight(const int bits, B numbers, const int k, V scale, V shift, int shifted) {
    const V number = v_sub(v_of_byte(numbers, k), v_set(zero_of(bits)));
    return shifted ? v_fma(number, scale, shift) : v_mul(number, scale);
}

/* Computes all outputs of a tile for n rows of float32 inputs, with weights in float32. Every output adds its products in the order
   of the inputs. */
INLINE void exact_tile_of(
    const int n, const int bits, const float *x, const Linear *layer, int64_t tile, Ahead ahead, float (*out)[TILE]
) {
    const int64_t size = layer->in, blocks = size / TILE;
    const uint8_t *block = (const uint8_t *)layer->weight + tile * blocks * block_bytes(bits);
    const int per = steps_of(layer), shifted = is_shifted(layer);
    V sum[MOST_ROWS][VECTORS];
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < VECTORS; v++) sum[m][v] = v_set(0);
    for (int64_t b = 0; b < blocks; b++, block += block_bytes(bits)) {
        for (int step = 0; step < STEPS;) {
            const int stop = step + per;
            V scale[VECTORS], shift[VECTORS];
            UNROLL
            for (int v = 0; v < VECTORS; v++) {
                shift[v] = v_set(0);
                scale[v] = scale_of(layer, tile, b * TILE + STEP * step, v * LANES, shift + v);
            }
            for (; step < stop; step++) {
                for (int line = 0; line < (bits == 8 ? 2 : 1); line++) ask(&ahead, 1);
                UNROLL
                for (int v = 0; v < VECTORS; v++) {
                    const B numbers = numbers_of(bits, block, step, v);
                    UNROLL
                    for (int k = 0; k < STEP; k++) {
                        const V weight = exact_weight(bits, numbers, k, scale[v], shift[v], shifted);
                        UNROLL
                        for (int m = 0; m < n; m++)
                            sum[m][v] = v_fma(weight, v_set(x[m * size + b * TILE + STEP * step + k]), sum[m][v]);
                    }
                }
            }
        }
    }
    UNROLL
    for (int m = 0; m < n; m++)
        UNROLL
        for (int v = 0; v < VECTORS; v++) v_store(out[m] + v * LANES, sum[m][v]);
}

/* Converts the weights of inputs `begin` to `end` - 1 and `count` vectors of outputs, from vector `first` on. */
INLINE void unpack_numbers_of(
    const int bits, const Linear *layer, int64_t tile, int64_t begin, int64_t end, int first, const int count, float *out
) {
    const uint8_t *block = (const uint8_t *)layer->weight + (tile * layer->in + begin) / TILE * block_bytes(bits);
    const int per = steps_of(layer), shifted = is_shifted(layer);
    for (int64_t i = begin; i < end; i += TILE, block += block_bytes(bits))
        for (int step = 0; step < STEPS; step++, out += STEP * count * LANES)
            for (int v = 0; v < count; v++) {
                V shift = v_set(0);
                const V scale = scale_of(layer, tile, i + step / per * per * STEP, (first + v) * LANES, &shift);
                const B numbers = numbers_of(bits, block, step, first + v);
                UNROLL
                for (int k = 0; k < STEP; k++)
                    v_store(out + (k * count + v) * LANES, exact_weight(bits, numbers, k, scale, shift, shifted));
            }
}

#if PAIRED
/* ---- pairs of bf16 inputs ------------------------------------------------------------------------------------------------------ */

/* The numbers of a step as bf16: for each vector of outputs those of inputs 0 and 2, then those of inputs 1 and 3. */
INLINE void pairs_of(const int bits, const uint8_t *block, int step, P out[VECTORS][2]) {
    if (bits == 4) p_nibbles(b_load(block + step * 64), out);
    else
        UNROLL
        for (int v = 0; v < VECTORS; v++) p_bytes(numbers_of(bits, block, step, v), (int)zero_of(bits), out[v]);
}

/* Where the converted numbers of a tile are: nowhere yet; nowhere yet, and they are kept for later groups of rows; or kept. */
enum { DIRECT, KEEPING, KEPT };

enum { SPAN = 256 }; /* inputs whose converted numbers are kept. They fill 16 KB, half of an L1 cache */

/* Adds the products of inputs `begin` to `end` - 1 of a tile for n rows. Products of a group are added in pairs, in the order of the
   inputs 2, 0, 3, 1 of each step. Then they are scaled, and added in the order of the groups. Beside many sums within a group, the
   others do not fit into registers. */
INLINE void paired_part_of(
    const int n, const int bits, const int mode, const uint16_t *x, const float *sums, P *kept, const Linear *layer, int64_t tile,
    int64_t begin, int64_t end, Ahead *ahead, float (*out)[TILE]
) {
    enum { FEW = MOST_ROWS / 2 };
    const int64_t size = layer->in, units = size / SMALL_GROUP;
    const uint8_t *block = (const uint8_t *)layer->weight + (tile * size + begin) / TILE * block_bytes(bits);
    const int per = steps_of(layer), shifted = is_shifted(layer), held = n <= FEW;
    Ahead next = *ahead;
    V sum[FEW][VECTORS];
    if (begin == 0)
        for (int m = 0; m < n; m++)
            for (int v = 0; v < VECTORS; v++) v_store(out[m] + v * LANES, v_set(0));
    if (held)
        UNROLL
        for (int m = 0; m < n; m++)
            UNROLL
            for (int v = 0; v < VECTORS; v++) sum[m][v] = v_load(out[m] + v * LANES);
    for (int64_t i = begin; i < end; i += TILE, block += block_bytes(bits))
        for (int step = 0; step < STEPS;) {
            const int64_t at = i + STEP * step;
            const int stop = step + per;
            V part[MOST_ROWS][VECTORS];
            UNROLL
            for (int m = 0; m < n; m++)
                UNROLL
                for (int v = 0; v < VECTORS; v++) part[m][v] = v_set(0);
            for (; step < stop; step++) {
                P pairs[VECTORS][2];
                if (mode == KEPT) memcpy(pairs, kept, sizeof pairs);
                else {
                    for (int line = 0; line < (bits == 8 ? 2 : 1); line++) ask(&next, 1);
                    pairs_of(bits, block, step, pairs);
                }
                if (mode == KEEPING) memcpy(kept, pairs, sizeof pairs);
                kept += 2 * VECTORS;
                UNROLL
                for (int k = 0; k < 2; k++)
                    UNROLL
                    for (int m = 0; m < n; m++)
                        UNROLL
                        for (int v = 0; v < VECTORS; v++)
                            part[m][v] = p_dot(part[m][v], pairs[v][k], x + m * size + i + STEP * step + 2 * k);
            }
            UNROLL
            for (int v = 0; v < VECTORS; v++) {
                V shift = v_set(0);
                const V scale = scale_of(layer, tile, at, v * LANES, &shift);
                UNROLL
                for (int m = 0; m < n; m++) {
                    V total = v_fma(part[m][v], scale, held ? sum[m][v] : v_load(out[m] + v * LANES));
                    const float *some = sums + m * units + at / SMALL_GROUP;
                    if (shifted) total = v_fma(v_set(per == STEPS ? some[0] + some[1] : some[0]), shift, total);
                    if (held) sum[m][v] = total;
                    else v_store(out[m] + v * LANES, total);
                }
            }
        }
    if (held)
        UNROLL
        for (int m = 0; m < n; m++)
            UNROLL
            for (int v = 0; v < VECTORS; v++) v_store(out[m] + v * LANES, sum[m][v]);
    *ahead = next;
}
#endif
