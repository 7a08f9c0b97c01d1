// Single weights out of tiles, for embeddings. tiles.cl comes before this file, and describes the layout.

// Byte `byte` of unit `unit` of a lane, in chunk `k`.
INLINE uint byte_of(__global const uchar *tile, int k, int unit, int lane, int byte) {
    return tile[((k * CODE_UNITS + unit) * 32 + lane) * 16 + byte];
}

// The weight of column `i` of a block of row `row` of a tile, as an integer.
INLINE int weight_of(__global const uchar *tile, int row, int block, int i) {
    int j = row / 8;
    int lane = row % 8 * 4 + i % 16 / 4;
    int part = i / 16;
    int k = block / CHUNK_BLOCKS;
    int b = block % CHUNK_BLOCKS;
    int byte = i % 4;
#if BITS == 16
    int upper = (char)byte_of(tile, k, 4 * b + part, lane, 4 * j + byte);
    return upper * 256 + (char)byte_of(tile, k, 4 * b + 2 + part, lane, 4 * j + byte);
#else
    int level = 0;
#if BITS == 8
    level = byte_of(tile, k, 2 * b + part, lane, 4 * j + byte);
#endif
#if NIBBLES
    level = byte_of(tile, k, b, lane, 4 * j + byte) >> 4 * part & 15;
#endif
#if PAIRS
    uint pairs = byte_of(tile, k, NIBBLES * 4 + b / 2, lane, 4 * (b % 2 * 2 + j / 2) + byte);
    level |= (pairs >> (4 * (j % 2) + 2 * part) & 3) << NIBBLES * 4;
#endif
#if SINGLES
    level |= (byte_of(tile, k, NIBBLES * 4 + PAIRS * 2, lane, 4 * b + byte) >> (2 * j + part) & 1) << (BITS - 1);
#endif
#ifdef LEVELS
    level = levels[level];
#endif
    int scaled = HALVES == 2 ? part : 0;
    int value = (b * HALVES + scaled) * 4 + j;
    int per_unit = BYTE_SCALES ? 16 : 8;
    int at = ((k * SCALE_UNITS + value / per_unit) * 8 + row % 8) * per_unit + value % per_unit;
#if BYTE_SCALES
    int scale = ((__global const char *)(tile + SCALES_AT))[at] << SHIFT;
#else
    int scale = ((__global const short *)(tile + SCALES_AT))[at];
#endif
    int product = (level - ZERO) * scale;
#if ROUNDED
    return (product + 64) >> 7;
#elif HAS_MINS
    int min_at = ((k * MIN_UNITS + value / 8) * 8 + row % 8) * 8 + value % 8;
    return product + ((__global const short *)(tile + MINS_AT))[min_at];
#else
    return product;
#endif
#endif
}

// The rows `tokens` of a table, times `scale`: [token][column]. `count` is that of values.
__kernel void embed(__global const uchar *weights, uint row_bytes, __global const int *tokens, int count, int columns,
                    float scale, __global float *out) {
    int i = get_global_id(0);
    if (i >= count) {
        return;
    }
    int column = i % columns;
    int row = tokens[i / columns];
    int superblocks = (columns + SUPERBLOCK - 1) / SUPERBLOCK;
    size_t number = (size_t)(row / ROWS_OF_PANEL) * superblocks + column / SUPERBLOCK;
    __global const uchar *tile = weights + number * TILE_BYTES;
    row %= ROWS_OF_PANEL;
    float weight = (float)weight_of(tile, row, column % SUPERBLOCK / BLOCK, column % BLOCK);
    float unit = ((__global const float *)(tile + UNITS_AT))[row % 8 * 4 + row / 8];
    out[i] = weight * unit * scale;
}
