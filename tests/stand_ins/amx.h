/* Stand-ins for AMX. Written from the manual, volume 2, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE and TDPBF16PS. What
   the processor refuses with an exception aborts here. */

enum { SI_TILES = 8, SI_ROWS = 16, SI_BYTES = 64 };

/* The tiles of a thread. Rows and bytes beyond those of its shape are zero in every tile. */
typedef struct {
    int is_configured;
    int rows[SI_TILES], bytes[SI_TILES];
    unsigned char data[SI_TILES][SI_ROWS][SI_BYTES];
} SiTiles;

static _Thread_local SiTiles si_tiles;

STAND_IN void si_require(int condition) {
    if (!condition) abort();
}

/* Returns the number of a tile that has a shape. */
STAND_IN int si_tile(int tile) {
    si_require(si_tiles.is_configured && tile >= 0 && tile < SI_TILES && si_tiles.rows[tile] && si_tiles.bytes[tile]);
    return tile;
}

STAND_IN void _tile_release(void) { memset(&si_tiles, 0, sizeof si_tiles); }

/* LDTILECFG: byte 0 is the palette, 1 the row to start from, 16 to 47 the bytes of a row, 48 to 63 the rows; others must be zero. */
STAND_IN void _tile_loadconfig(const void *from) {
    unsigned char config[64];
    memcpy(config, from, sizeof config);
    _tile_release();
    si_require(config[0] == 1 && config[1] == 0);
    for (int i = 2; i < 16; i++) si_require(config[i] == 0);
    for (int tile = 0; tile < 16; tile++) {
        const int rows = config[48 + tile], bytes = config[16 + 2 * tile] | config[17 + 2 * tile] << 8;
        si_require(tile < SI_TILES ? rows <= SI_ROWS && bytes <= SI_BYTES && !rows == !bytes : !rows && !bytes);
        if (tile < SI_TILES) si_tiles.rows[tile] = rows, si_tiles.bytes[tile] = bytes;
    }
    si_tiles.is_configured = 1;
}

STAND_IN void _tile_zero(int tile) { memset(si_tiles.data[si_tile(tile)], 0, sizeof si_tiles.data[tile]); }

STAND_IN void _tile_loadd(int tile, const void *from, int64_t stride) {
    _tile_zero(tile);
    for (int row = 0; row < si_tiles.rows[tile]; row++)
        memcpy(si_tiles.data[tile][row], (const char *)from + row * stride, (size_t)si_tiles.bytes[tile]);
}

STAND_IN void _tile_stored(int tile, void *to, int64_t stride) {
    for (int row = 0; row < si_tiles.rows[si_tile(tile)]; row++)
        memcpy((char *)to + row * stride, si_tiles.data[tile][row], (size_t)si_tiles.bytes[tile]);
}

STAND_IN uint16_t si_number(int tile, int row, int column) {
    uint16_t number;
    memcpy(&number, si_tiles.data[tile][row] + 2 * column, sizeof number);
    return number;
}

STAND_IN float si_flushed_sum(float a, float b) { return si_flushed(si_flushed(a) + si_flushed(b)); }

/* TDPBF16PS: for every row and output two chains, of even and of odd numbers, start at 0. Each is a chain of fused multiply-adds.
   They are added, and the sum is added to the destination. DAZ, FTZ, nearest even; MXCSR is neither read nor written. */
STAND_IN void _tile_dpbf16ps(int to, int a, int b) {
    const int rows = si_tiles.rows[si_tile(to)], columns = si_tiles.bytes[to] / 4, pairs = si_tiles.bytes[si_tile(a)] / 4;
    si_require(to != a && to != b && a != b);
    si_require(si_tiles.rows[a] == rows && si_tiles.rows[si_tile(b)] == pairs && si_tiles.bytes[b] == si_tiles.bytes[to]);
    si_require(si_tiles.bytes[to] % 4 == 0 && si_tiles.bytes[a] % 4 == 0);
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            float chains[2] = {0, 0}, sum;
            for (int k = 0; k < pairs; k++)
                for (int odd = 0; odd < 2; odd++) {
                    const float x = si_of_bf16(si_number(a, m, 2 * k + odd)), y = si_of_bf16(si_number(b, k, 2 * n + odd));
                    chains[odd] = si_flushed_fma(x, y, chains[odd]);
                }
            memcpy(&sum, si_tiles.data[to][m] + 4 * n, sizeof sum);
            sum = si_flushed_sum(sum, si_flushed_sum(chains[0], chains[1]));
            memcpy(si_tiles.data[to][m] + 4 * n, &sum, sizeof sum);
        }
}
