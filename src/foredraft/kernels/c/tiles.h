/* bfloat16 products with AMX tiles. linear.h includes this file for sets that have them.

   A tile adds the products of 32 inputs in two chains, of even and of odd inputs, adds both, and adds that to the sum. Denormal
   numbers count as zero. Rows of a tile do not influence each other. Every number of rows goes through tiles, so that a row gets
   the same bits in any step. */

enum { TILE_ROWS = 16, TILE_BYTES = 64 };

/* Tiles 0 to 3: sums of the first 16 rows for both halves of the outputs, then of the next 16 rows. 4, 5: inputs. 6, 7: weights. */
static void configure(int first, int second) {
    struct { uint8_t palette, start_row, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    const int rows[] = {first, first, second, second, first, second, TILE_ROWS, TILE_ROWS};
    for (int i = 0; i < 8; i++) shape.rows[i] = (uint8_t)rows[i], shape.bytes[i] = rows[i] ? TILE_BYTES : 0;
    _tile_loadconfig(&shape);
}

/* Computes the outputs of a tile for up to 32 rows of `size` inputs. `lines` cache lines are prefetched for 32 inputs. */
static void tile_group(int64_t n, const uint16_t *x, const uint16_t *w, int64_t size, Ahead ahead, int lines, float (*out)[TILE]) {
    const int first = (int)least(n, TILE_ROWS), second = (int)n - first;
    const uint16_t *below = x + TILE_ROWS * size;
    configure(first, second);
    _tile_zero(0);
    _tile_zero(1);
    if (second) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < size; i += TILE) {
        for (int line = 0; line < lines; line++) ask(&ahead, 1);
        _tile_loadd(4, x + i, size * 2);
        _tile_loadd(6, w + i * TILE, 2 * TILE_BYTES);
        _tile_loadd(7, w + i * TILE + TILE, 2 * TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!second) continue;
        _tile_loadd(5, below + i, size * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out[0], TILE * 4);
    _tile_stored(1, out[0] + TILE / 2, TILE * 4);
    if (second) {
        _tile_stored(2, out[TILE_ROWS], TILE * 4);
        _tile_stored(3, out[TILE_ROWS] + TILE / 2, TILE * 4);
    }
    _tile_release();
}

/* The same for n rows from `row` on, of `count` rows in all. */
static void tile_products(int64_t n, const uint16_t *x, const void *w, int64_t size, int64_t row, int64_t count, float (*out)[TILE]) {
    enum { MOST = 2 * TILE_ROWS };
    const int64_t groups = (count + MOST - 1) / MOST;
    for (int64_t m = 0; m < n; m += MOST) {
        const Ahead ahead = ahead_of(w, size * TILE * 2, (row + m) / MOST, groups);
        tile_group(least(MOST, n - m), x + m * size, w, size, ahead, groups == 1 ? TILE : 0, out + m);
    }
}
