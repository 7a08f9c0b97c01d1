// Products with weights of one type. The host defines the type:
// BITS (2, 3, 4, 5, 6, 8; 16: integers without scales), HALVES (scales of a block: 1 or 2), HAS_MINS, ZERO, ROUNDED,
// and for types with a table LEVELS, its sixteen levels.
//
// A row of weights is: units (a float for each superblock), scales and minima (shorts, HALVES for each block), codes.
// Codes of a block are, as far as the type has them: 16 bytes of low nibbles (column i and i + 16), 8 bytes of pairs of
// bits (columns i, i + 8, i + 16, i + 24), 4 bytes of single bits (a little-endian word).

#if BITS == 16
#define CODE_BYTES 64
#elif BITS == 8
#define CODE_BYTES 32
#elif BITS == 6
#define CODE_BYTES 24
#elif BITS == 5
#define CODE_BYTES 20
#elif BITS == 4
#define CODE_BYTES 16
#elif BITS == 3
#define CODE_BYTES 12
#else
#define CODE_BYTES 8
#endif

#ifdef LEVELS
__constant uchar levels[16] = {LEVELS};
#endif

typedef struct {
    __global const float *units;
    __global const short *scales;
    __global const short *mins;
    __global const uchar *codes;
} Row;

Row row_of(__global const uchar *row, int blocks) {
    Row out;
    out.units = (__global const float *)row;
    out.scales = (__global const short *)(out.units + (blocks + 7) / 8);
    out.mins = out.scales;
#if BITS == 16
    out.codes = (__global const uchar *)out.scales;
#else
    out.mins = out.scales + blocks * HALVES;
#if HAS_MINS
    out.codes = (__global const uchar *)(out.mins + blocks * HALVES);
#else
    out.codes = (__global const uchar *)out.mins;
#endif
#endif
    return out;
}

// The weight of column `i` of a block, as an integer.
int weight_of(const Row *row, int block, int i) {
    __global const uchar *codes = row->codes + (size_t)block * CODE_BYTES;
#if BITS == 16
    return ((__global const short *)codes)[i];
#else
    int code;
#if BITS == 8
    code = codes[i];
#elif BITS >= 4
    code = (codes[i & 15] >> (i < 16 ? 0 : 4)) & 15;
#if BITS == 5
    __global const uchar *single_bits = codes + 16;
    code |= ((single_bits[i >> 3] >> (i & 7)) & 1) << 4;
#elif BITS == 6
    __global const uchar *bit_pairs = codes + 16;
    code |= ((bit_pairs[i & 7] >> (2 * (i >> 3))) & 3) << 4;
#endif
#else
    code = (codes[i & 7] >> (2 * (i >> 3))) & 3;
#if BITS == 3
    __global const uchar *single_bits = codes + 8;
    code |= ((single_bits[i >> 3] >> (i & 7)) & 1) << 2;
#endif
#endif
#ifdef LEVELS
    code = levels[code];
#endif
    int part = block * HALVES + (HALVES == 2 ? i >> 4 : 0);
    int product = (code - ZERO) * row->scales[part];
#if ROUNDED
    return (product + 64) >> 7;
#elif HAS_MINS
    return product + row->mins[part];
#else
    return product;
#endif
#endif
}

// The product of the rows of `weights` with tiles of TILE rows of codes, from tile `first_tile` on. A work-group
// computes one output of a tile; a work-item computes the exact sums of every 64th block.
//
// In a mixture, `experts` has the expert of each row, whose weights are at `first_byte + expert * expert_bytes`, and
// whose bias is at `first_bias + expert * expert_biases`; the codes of row r are those of input r / inputs_shared.
__kernel __attribute__((reqd_work_group_size(WORK_GROUP_SIZE, 1, 1)))
void multiply(__global const uchar *weights, ulong first_byte, uint row_bytes, ulong expert_bytes,
              __global const float *bias, int first_bias, int has_bias, int expert_biases,
              __global const char *codes, __global const int4 *code_sums, __global const float *code_units,
              __global const int *experts, int has_experts, int inputs_shared, int columns, int outputs, int rows,
              __global float *out, int first_tile) {
    __local int sums[TILE][WORK_GROUP_SIZE][2];
    __local float joined[TILE][WORK_GROUP_SIZE / 8];
    int item = get_local_id(0);
    int output = get_group_id(0);
    int first = (first_tile + get_group_id(1)) * TILE;
    int count = min(TILE, rows - first);
    int blocks = (columns + BLOCK - 1) / BLOCK;
    int superblocks = (columns + SUPERBLOCK - 1) / SUPERBLOCK;
    int expert = has_experts ? experts[first] : 0;
    Row row = row_of(weights + first_byte + expert * expert_bytes + (size_t)output * row_bytes, blocks);
    float total = 0.0f;
    for (int pass = 0; pass < superblocks; pass += WORK_GROUP_SIZE / 8) {
        int block = pass * 8 + item;
        int upper[TILE];
        int lower[TILE];
        for (int r = 0; r < TILE; r++) {
            upper[r] = 0;
            lower[r] = 0;
        }
        if (block < blocks) {
            for (int i = 0; i < BLOCK; i++) {
                int weight = weight_of(&row, block, i);
                for (int r = 0; r < count; r++) {
                    size_t input = (size_t)((first + r) / inputs_shared) * superblocks + block / 8;
                    __global const char *code = codes + input * 2 * SUPERBLOCK + code_index(block % 8 * BLOCK + i);
                    upper[r] += weight * code[0];
                    lower[r] += weight * code[LOWER];
                }
            }
        }
        for (int r = 0; r < TILE; r++) {
            sums[r][item][0] = upper[r];
            sums[r][item][1] = lower[r];
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int i = item; i < TILE * (WORK_GROUP_SIZE / 8); i += WORK_GROUP_SIZE) {
            int r = i / (WORK_GROUP_SIZE / 8);
            int s = i % (WORK_GROUP_SIZE / 8);
            int high = 0;
            int low = 0;
            for (int part = s * 8; part < s * 8 + 8; part++) {
                high += sums[r][part][0];
                low += sums[r][part][1];
            }
            joined[r][s] = fma((float)high, 256.0f, (float)low);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item < count) {
            __global const float *units = code_units + (size_t)((first + item) / inputs_shared) * superblocks;
            for (int start = pass; start < min(pass + WORK_GROUP_SIZE / 8, superblocks); start += 4) {
                float chain = 0.0f;
                for (int s = start; s < min(start + 4, superblocks); s++) {
                    chain = fma(joined[item][s - pass], row.units[s] * units[s], chain);
                }
                total = start == 0 ? chain : total + chain;
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (item < count) {
        if (has_bias) {
            total += bias[first_bias + expert * expert_biases + output];
        }
        out[(size_t)(first + item) * outputs + output] = total;
    }
}

// The rows `tokens` of a table, times `scale`: [token][column]. `count` is that of values.
__kernel void embed(__global const uchar *weights, uint row_bytes, __global const int *tokens, int count, int columns,
                    float scale, __global float *out) {
    int i = get_global_id(0);
    if (i >= count) {
        return;
    }
    int column = i % columns;
    Row row = row_of(weights + (size_t)tokens[i / columns] * row_bytes, (columns + BLOCK - 1) / BLOCK);
    float weight = (float)weight_of(&row, column / BLOCK, column % BLOCK);
    out[i] = weight * row.units[column / SUPERBLOCK] * scale;
}
