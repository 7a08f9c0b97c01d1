// The operations of tiles.cl in plain OpenCL C, for devices without instructions for matrices: a work-group has one
// warp, whose lanes exchange their operands in local memory.

#define INLINE static inline __attribute__((always_inline))
// Local memory for the operands of all lanes.
#define LANES_SHARE __local uint *share
#define DECLARE_SHARE __local uint share[32 * 6];

// Weights, which are read once.
INLINE uint4 load_once(__global const uint4 *p) {
    return *p;
}

// Scales, which four lanes share.
INLINE uint4 load_shared(__global const uint4 *p) {
    return *p;
}

// Codes, which all panels read.
INLINE uint4 load_cached(__global const uint4 *p) {
    return *p;
}

// Looks up four bytes below 16.
INLINE uint look_up(__constant const uchar *table, uint bytes) {
    return table[bytes & 15] | table[bytes >> 8 & 15] << 8 | table[bytes >> 16 & 15] << 16 | (uint)table[bytes >> 24] << 24;
}

// The products of the rows g and g + 8 of `a` with the columns 2 t and 2 t + 1 of `b`, plus `c`. Words 0 and 1 of a
// lane are the columns 4 t ... 4 t + 3 of rows g and g + 8, words 2 and 3 those 16 further; word 0 of `b` are the rows
// 4 t ... 4 t + 3 of column g, word 1 those 16 further.
INLINE int4 multiply_words(uint4 a, uint2 b, int4 c, int words, bool is_signed, __local uint *share) {
    int lane = get_local_id(0);
    vstore4(a, lane, share);
    vstore2(b, lane, share + 32 * 4);
    barrier(CLK_LOCAL_MEM_FENCE);
    int sums[4] = {c.x, c.y, c.z, c.w};
    for (int out = 0; out < 4; out++) {
        for (int part = 0; part < words * 4; part++) {
            int t = part % 4;
            uint left = share[(lane / 4 * 4 + t) * 4 + part / 4 * 2 + out / 2];
            uint right = share[32 * 4 + ((lane % 4 * 2 + out % 2) * 4 + t) * 2 + part / 4];
            for (int byte = 0; byte < 4; byte++) {
                uint value = left >> 8 * byte & 255;
                sums[out] += (is_signed ? (int)(char)value : (int)value) * (int)(char)(right >> 8 * byte & 255);
            }
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    return (int4)(sums[0], sums[1], sums[2], sums[3]);
}

INLINE int4 multiply_unsigned(uint a0, uint a1, uint a2, uint a3, uint2 b, int4 c, __local uint *share) {
    return multiply_words((uint4)(a0, a1, a2, a3), b, c, 2, false, share);
}

INLINE int4 multiply_signed(uint a0, uint a1, uint a2, uint a3, uint2 b, int4 c, __local uint *share) {
    return multiply_words((uint4)(a0, a1, a2, a3), b, c, 2, true, share);
}

// Of 16 columns, with unsigned bytes.
INLINE int4 multiply_half(uint a0, uint a1, uint b, int4 c, __local uint *share) {
    return multiply_words((uint4)(a0, a1, 0, 0), (uint2)(b, 0), c, 1, false, share);
}
