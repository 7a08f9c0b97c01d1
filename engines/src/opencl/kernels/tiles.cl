// Products with weights in tiles of 32 rows and 256 columns, by instructions that multiply matrices of bytes. The 32
// lanes of a warp, or in the emulation of a work-group, together hold a part of a tile: the operand `a` of such an
// instruction.
//
// The host defines the type of the weights, as for products.cl, and BYTE_SCALES (scales have 8 bits, not 16), SHIFT
// (all scales are multiples of 2^SHIFT, and stored without it), ROWS (rows of codes at a time), WARPS (of a
// work-group). matrix_nvidia.cl or matrix_emulated.cl comes before this file.
//
// Lane 4 g + t holds the columns 4 t ... 4 t + 3 of a block (part 0), and the same four 16 further (part 1), of the
// rows g, g + 8, g + 16, g + 24, in words 0 ... 3. A tile is: chunks of CHUNK_BLOCKS blocks, then scales, minima,
// units. A chunk is units of 16 bytes for each lane:
// - 4, 5, 6 bits: a unit for each block, whose word j has low nibbles of part 0 and, shifted by 4, of part 1;
// - 2, 3, 6 bits: a unit for two blocks, two words each of pairs of bits: word j / 2, shifted by 4 (j % 2) + 2 part;
// - 3, 5 bits: a unit for four blocks, with a word each of single bits, shifted by 2 j + part;
// - 8 bits: two units for each block, one for each part;
// - 16 bits: four units for each block: upper bytes of each part, then lower bytes.
// Scales and minima are [block][g][part, if HALVES is 2][row j], so that 16 bytes have those of a lane's rows; units
// are [g][row j].

#define ROWS_OF_PANEL 32
#define NIBBLES (BITS == 4 || BITS == 5 || BITS == 6)
#define PAIRS (BITS == 2 || BITS == 3 || BITS == 6)
#define SINGLES (BITS == 3 || BITS == 5)
#define CHUNK_BLOCKS (BITS >= 8 ? 2 : 4)
#define CHUNKS (8 / CHUNK_BLOCKS)
#define CODE_UNITS (BITS == 16 ? 8 : BITS == 8 ? 4 : NIBBLES * 4 + PAIRS * 2 + SINGLES)
#define HAS_SCALES (BITS != 16)
// Units of scales and of minima in a chunk.
#define SCALE_UNITS (HAS_SCALES * HALVES * (BYTE_SCALES ? 1 : 2) * CHUNK_BLOCKS / 4)
#define MIN_UNITS (HAS_MINS * HALVES * 2)
#define NEEDS_SUMS (HAS_SCALES && (ZERO != 0 || HAS_MINS))
#define SCALES_AT (CHUNKS * CODE_UNITS * 512)
#define MINS_AT (SCALES_AT + CHUNKS * SCALE_UNITS * 128)
#define UNITS_AT (MINS_AT + CHUNKS * MIN_UNITS * 128)
#define TILE_BYTES (UNITS_AT + 128)
// Four rows of codes are an operand `b`: each has an upper and a lower byte.
#define GROUPS ((ROWS + 3) / 4)

#ifdef LEVELS
// Aligned, because they are looked up four at a time.
__constant uchar levels[16] __attribute__((aligned(16))) = {LEVELS};
#endif

typedef struct {
    uint4 codes[CODE_UNITS];
    uint4 scales[SCALE_UNITS + 1];
    uint4 mins[MIN_UNITS + 1];
} Chunk;

// Sums of a superblock: [group of rows of codes][j, for row g + 8 j of the weights][0: upper bytes, 1: lower bytes].
typedef struct {
    int products[GROUPS][4][2];
#if BITS == 16
    int upper[GROUPS][4][2];
#endif
#if HAS_MINS
    int mins[GROUPS][4][2];
#endif
} Sums;

// What a lane reads of the codes of a group of four rows.
typedef struct {
    __global const uint4 *codes;
    __global const int4 *sums;
} Input;

INLINE uint word_of(uint4 v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Value `i` of a unit of scales or minima.
INLINE int short_of(uint4 v, int i) {
    uint word = word_of(v, i / 2);
    return i % 2 == 0 ? (int)(short)(word & 0xffff) : (int)word >> 16;
}

INLINE int char_of(uint4 v, int i) {
    return (int)(char)(word_of(v, i / 4) >> 8 * (i % 4) & 255);
}

INLINE void load_chunk(Chunk *chunk, __global const uchar *tile, int k, int lane) {
    __global const uint4 *codes = (__global const uint4 *)tile + k * CODE_UNITS * 32 + lane;
#pragma unroll
    for (int i = 0; i < CODE_UNITS; i++) {
        chunk->codes[i] = load_once(codes + i * 32);
    }
    __global const uint4 *scales = (__global const uint4 *)(tile + SCALES_AT) + k * SCALE_UNITS * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < SCALE_UNITS; i++) {
        chunk->scales[i] = load_shared(scales + i * 8);
    }
    __global const uint4 *mins = (__global const uint4 *)(tile + MINS_AT) + k * MIN_UNITS * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < MIN_UNITS; i++) {
        chunk->mins[i] = load_shared(mins + i * 8);
    }
}

// The levels of block `b` of a chunk as unsigned bytes: words 0 ... 3 of part 0, then of part 1.
INLINE void levels_of(const Chunk *chunk, int b, uint out[8]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if BITS == 8
        out[j] = word_of(chunk->codes[2 * b], j);
        out[4 + j] = word_of(chunk->codes[2 * b + 1], j);
#else
        uint low = 0;
        uint high = 0;
#if NIBBLES
        uint nibbles = word_of(chunk->codes[b], j);
        low = nibbles & 0x0f0f0f0f;
        high = nibbles >> 4 & 0x0f0f0f0f;
#endif
#if PAIRS
        uint pairs = word_of(chunk->codes[NIBBLES * 4 + b / 2], b % 2 * 2 + j / 2) >> 4 * (j % 2);
        low |= (pairs & 0x03030303) << NIBBLES * 4;
        high |= (pairs >> 2 & 0x03030303) << NIBBLES * 4;
#endif
#if SINGLES
        uint singles = word_of(chunk->codes[NIBBLES * 4 + PAIRS * 2], b) >> 2 * j;
        low |= (singles & 0x01010101) << (BITS - 1);
        high |= (singles >> 1 & 0x01010101) << (BITS - 1);
#endif
#ifdef LEVELS
        low = look_up(levels, low);
        high = look_up(levels, high);
#endif
        out[j] = low;
        out[4 + j] = high;
#endif
    }
}

// The scale of row g + 8 j in part `part` of block `b` of a chunk.
INLINE int scale_of(const Chunk *chunk, int b, int part, int j) {
    int i = (b * HALVES + part) * 4 + j;
#if BYTE_SCALES
    return char_of(chunk->scales[i / 16], i % 16);
#else
    return short_of(chunk->scales[i / 8], i % 8);
#endif
}

INLINE int min_of(const Chunk *chunk, int b, int part, int j) {
    int i = (b * HALVES + part) * 4 + j;
    return short_of(chunk->mins[i / 8], i % 8);
}

#if ROUNDED
// (level * low + 64) >> 7 of four levels, where `low` is the lower seven bits of a scale.
INLINE uint remainders_of(uint levels, uint low) {
    uint twice = 2 * low;
    uint bias = 0x00810080u - low * (2u * ZERO) * 0x00010001u;
    uint even = (levels & 0x00ff00ff) * twice + bias;
    uint odd = (levels >> 8 & 0x00ff00ff) * twice + bias;
    return (even >> 8 & 0x00ff00ff) | (odd & 0xff00ff00);
}
#endif

#define ADD(SUM, D)                                                                                                    \
    SUM[m][0] += (D).x;                                                                                                \
    SUM[m][1] += (D).y;                                                                                                \
    SUM[m + 1][0] += (D).z;                                                                                            \
    SUM[m + 1][1] += (D).w;

// Adds the products of block `b` of a chunk with a group of rows. `codes` are the group's codes of the block, `sums`
// those of their halves: upper and lower bytes of part 0, of part 1.
INLINE void add_block(Sums *sums, int n, const Chunk *chunk, int b, const uint *levels, uint2 codes, int4 halves,
                      LANES_SHARE) {
#pragma unroll
    for (int m = 0; m < 4; m += 2) {
#if BITS == 16
        int4 zero = (int4)(0);
        const uint4 *units = chunk->codes + 4 * b;
        int4 upper = multiply_signed(word_of(units[0], m), word_of(units[0], m + 1), word_of(units[1], m),
                                     word_of(units[1], m + 1), codes, zero, share);
        int4 lower = multiply_signed(word_of(units[2], m), word_of(units[2], m + 1), word_of(units[3], m),
                                     word_of(units[3], m + 1), codes, zero, share);
        ADD(sums->upper[n], upper)
        ADD(sums->products[n], lower)
#elif HALVES == 2
        int4 first = multiply_half(levels[m], levels[m + 1], codes.x, (int4)(halves.xy, halves.xy) * -ZERO, share);
        int4 second = multiply_half(levels[4 + m], levels[5 + m], codes.y, (int4)(halves.zw, halves.zw) * -ZERO, share);
        int4 scales = (int4)(scale_of(chunk, b, 0, m), scale_of(chunk, b, 0, m), scale_of(chunk, b, 0, m + 1),
                             scale_of(chunk, b, 0, m + 1));
        ADD(sums->products[n], first * scales)
        scales = (int4)(scale_of(chunk, b, 1, m), scale_of(chunk, b, 1, m), scale_of(chunk, b, 1, m + 1),
                        scale_of(chunk, b, 1, m + 1));
        ADD(sums->products[n], second * scales)
#if HAS_MINS
        sums->mins[n][m][0] += min_of(chunk, b, 0, m) * halves.x + min_of(chunk, b, 1, m) * halves.z;
        sums->mins[n][m][1] += min_of(chunk, b, 0, m) * halves.y + min_of(chunk, b, 1, m) * halves.w;
        sums->mins[n][m + 1][0] += min_of(chunk, b, 0, m + 1) * halves.x + min_of(chunk, b, 1, m + 1) * halves.z;
        sums->mins[n][m + 1][1] += min_of(chunk, b, 0, m + 1) * halves.y + min_of(chunk, b, 1, m + 1) * halves.w;
#endif
#else
        int2 whole = halves.xy + halves.zw;
        int4 scales = (int4)(scale_of(chunk, b, 0, m), scale_of(chunk, b, 0, m), scale_of(chunk, b, 0, m + 1),
                             scale_of(chunk, b, 0, m + 1));
        int4 product = multiply_unsigned(levels[m], levels[m + 1], levels[4 + m], levels[5 + m], codes,
                                         (int4)(whole, whole) * -ZERO, share);
#if ROUNDED
        // weight = level * (scale >> 7) + remainder.
        uint first = scales.x & 127;
        uint second = scales.z & 127;
        int4 rest = multiply_signed(remainders_of(levels[m], first), remainders_of(levels[m + 1], second),
                                    remainders_of(levels[4 + m], first), remainders_of(levels[5 + m], second), codes,
                                    (int4)(0), share);
        ADD(sums->products[n], product * (scales >> 7) + rest)
#else
        ADD(sums->products[n], product * scales)
#endif
#if HAS_MINS
        sums->mins[n][m][0] += min_of(chunk, b, 0, m) * whole.x;
        sums->mins[n][m][1] += min_of(chunk, b, 0, m) * whole.y;
        sums->mins[n][m + 1][0] += min_of(chunk, b, 0, m + 1) * whole.x;
        sums->mins[n][m + 1][1] += min_of(chunk, b, 0, m + 1) * whole.y;
#endif
#endif
    }
}

// Adds the products of chunk `k` of superblock `s`.
INLINE void add_chunk(Sums *sums, const Chunk *chunk, const Input *inputs, int s, int k, LANES_SHARE) {
    uint4 codes[GROUPS];
#pragma unroll
    for (int b = 0; b < CHUNK_BLOCKS; b++) {
        uint levels[8];
#if BITS != 16
        levels_of(chunk, b, levels);
#endif
        int block = k * CHUNK_BLOCKS + b;
#pragma unroll
        for (int n = 0; n < GROUPS; n++) {
            // 16 bytes have the codes of two blocks.
            if (b % 2 == 0) {
                codes[n] = load_cached(inputs[n].codes + s * 32 + block / 2 * 8);
            }
            int4 halves = (int4)(0);
#if NEEDS_SUMS
            halves = as_int4(load_cached((__global const uint4 *)(inputs[n].sums + s * 8 + block)));
#endif
            add_block(sums, n, chunk, b, levels, b % 2 == 0 ? codes[n].xy : codes[n].zw, halves, share);
        }
    }
}

INLINE void clear(Sums *sums) {
#pragma unroll
    for (int i = 0; i < GROUPS * 8; i++) {
        sums->products[i / 8][i / 2 % 4][i % 2] = 0;
#if BITS == 16
        sums->upper[i / 8][i / 2 % 4][i % 2] = 0;
#endif
#if HAS_MINS
        sums->mins[i / 8][i / 2 % 4][i % 2] = 0;
#endif
    }
}

// The exact sums of a superblock as a float: upper * 256 + lower.
INLINE float joined(const Sums *sums, int n, int j) {
    int upper = sums->products[n][j][0];
    int lower = sums->products[n][j][1];
#if BITS == 16
    upper += sums->upper[n][j][0] << 8;
    lower += sums->upper[n][j][1] << 8;
#elif HAS_MINS
    upper = (upper << SHIFT) + sums->mins[n][j][0];
    lower = (lower << SHIFT) + sums->mins[n][j][1];
#else
    upper <<= SHIFT;
    lower <<= SHIFT;
#endif
    return fma((float)upper, 256.0f, (float)lower);
}

// The product of a panel of 32 rows of `weights` with ROWS rows of codes, from tile `first_tile` of rows on. A warp
// computes chains of four superblocks; the first item of each output adds the chains in order.
// In a mixture, `experts` has the expert of each row, whose weights are at `first_byte + expert * expert_bytes`, and
// whose bias is at `first_bias + expert * expert_biases`; the codes of row r are those of input r / inputs_shared.
__kernel __attribute__((reqd_work_group_size(32 * WARPS, 1, 1)))
void multiply(__global const uchar *weights, ulong first_byte, uint row_bytes, ulong expert_bytes,
              __global const float *bias, int first_bias, int has_bias, int expert_biases,
              __global const uint4 *codes, __global const int4 *code_sums, __global const float *code_units,
              __global const int *experts, int has_experts, int inputs_shared, int columns, int outputs, int rows,
              __global float *out, int first_tile) {
    __local float chains_of_warps[WARPS][ROWS][ROWS_OF_PANEL];
    __local float totals[ROWS][ROWS_OF_PANEL];
    DECLARE_SHARE
    int item = get_local_id(0);
    int lane = item % 32;
    int warp = item / 32;
    int panel = get_group_id(0);
    int first = (first_tile + get_group_id(1)) * ROWS;
    int count = min(ROWS, rows - first);
    int superblocks = (columns + SUPERBLOCK - 1) / SUPERBLOCK;
    int chains = (superblocks + 3) / 4;
    int expert = has_experts ? experts[first] : 0;
    __global const uchar *tiles =
        weights + first_byte + expert * expert_bytes + (size_t)panel * superblocks * TILE_BYTES;
    Input inputs[GROUPS];
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
        // Lanes beyond the last row compute that one again.
        size_t of_codes = (first + min(4 * n + lane / 8, count - 1)) / inputs_shared;
        size_t of_sums = (first + min(4 * n + lane % 4, count - 1)) / inputs_shared;
        inputs[n].codes = codes + of_codes * superblocks * 32 + lane / 4 % 2 * 4 + lane % 4;
        inputs[n].sums = code_sums + of_sums * superblocks * 8;
    }
    Chunk next;
    if (warp * 4 < superblocks) {
        load_chunk(&next, tiles + (size_t)warp * 4 * TILE_BYTES, 0, lane);
    }
    for (int round = 0; round * WARPS < chains; round++) {
        int chain_number = round * WARPS + warp;
        int end = min(chain_number * 4 + 4, superblocks);
        float chain[GROUPS][4];
#pragma unroll
        for (int i = 0; i < GROUPS * 4; i++) {
            chain[i / 4][i % 4] = 0.0f;
        }
#pragma unroll 1
        for (int s = chain_number * 4; s < end; s++) {
            __global const uchar *tile = tiles + (size_t)s * TILE_BYTES;
            float4 units = as_float4(load_shared((__global const uint4 *)(tile + UNITS_AT) + lane / 4));
            Sums sums;
            clear(&sums);
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) {
                Chunk chunk = next;
                // The next chunk is on its way while this one is multiplied.
                if (k + 1 < CHUNKS) {
                    load_chunk(&next, tile, k + 1, lane);
                } else if (s + 1 < end) {
                    load_chunk(&next, tile + TILE_BYTES, 0, lane);
                } else if ((chain_number + WARPS) * 4 < superblocks) {
                    load_chunk(&next, tiles + (size_t)(chain_number + WARPS) * 4 * TILE_BYTES, 0, lane);
                }
                add_chunk(&sums, &chunk, inputs, s, k, share);
            }
#pragma unroll
            for (int n = 0; n < GROUPS; n++) {
                size_t row = (first + min(4 * n + lane % 4, count - 1)) / inputs_shared;
                float unit = code_units[row * superblocks + s];
                chain[n][0] = fma(joined(&sums, n, 0), units.x * unit, chain[n][0]);
                chain[n][1] = fma(joined(&sums, n, 1), units.y * unit, chain[n][1]);
                chain[n][2] = fma(joined(&sums, n, 2), units.z * unit, chain[n][2]);
                chain[n][3] = fma(joined(&sums, n, 3), units.w * unit, chain[n][3]);
            }
        }
#pragma unroll
        for (int i = 0; i < GROUPS * 4; i++) {
            int row = i / 4 * 4 + lane % 4;
            if (row < ROWS) {
                chains_of_warps[warp][row][i % 4 * 8 + lane / 4] = chain[i / 4][i % 4];
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int i = item; i < ROWS * ROWS_OF_PANEL; i += 32 * WARPS) {
            int row = i / ROWS_OF_PANEL;
            int output = i % ROWS_OF_PANEL;
            float total = totals[row][output];
            for (int w = 0; w < min(WARPS, chains - round * WARPS); w++) {
                float value = chains_of_warps[w][row][output];
                total = round == 0 && w == 0 ? value : total + value;
            }
            totals[row][output] = total;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    for (int i = item; i < count * ROWS_OF_PANEL; i += 32 * WARPS) {
        int output = panel * ROWS_OF_PANEL + i % ROWS_OF_PANEL;
        if (output < outputs) {
            float total = totals[i / ROWS_OF_PANEL][i % ROWS_OF_PANEL];
            if (has_bias) {
                total += bias[first_bias + expert * expert_biases + output];
            }
            out[(size_t)(first + i / ROWS_OF_PANEL) * outputs + output] = total;
        }
    }
}
