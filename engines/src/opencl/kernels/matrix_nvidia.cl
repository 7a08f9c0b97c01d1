// The operations of tiles.cl by instructions of NVIDIA's GPUs since compute capability 8.0: PTX ISA, "Warp Level Matrix
// Instructions".

#define INLINE static inline __attribute__((always_inline))
// A warp needs no memory to multiply.
#define LANES_SHARE int share
#define DECLARE_SHARE int share = 0;

// Weights, which are read once.
INLINE uint4 load_once(__global const uint4 *p) {
    uint x, y, z, w;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                 : "l"((ulong)p));
    return (uint4)(x, y, z, w);
}

// Scales, which four lanes share.
INLINE uint4 load_shared(__global const uint4 *p) {
    uint x, y, z, w;
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"((ulong)p));
    return (uint4)(x, y, z, w);
}

// Codes, which all panels read.
INLINE uint4 load_cached(__global const uint4 *p) {
    return load_shared(p);
}

// The bytes of `a`, then of `b`, that the four selectors name.
INLINE uint permute(uint a, uint b, uint selectors) {
    uint out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selectors));
    return out;
}

// Looks up four bytes below 16.
INLINE uint look_up(__constant const uchar *table, uint bytes) {
    __constant const uint *words = (__constant const uint *)table;
    uint low = bytes & 0x07070707;
    low |= low >> 4;
    uint selectors = (low & 255) | (low >> 8 & 0xff00);
    uint upper_half = (bytes >> 3 & 0x01010101) * 255;
    uint first = permute(words[0], words[1], selectors);
    uint second = permute(words[2], words[3], selectors);
    return (first & ~upper_half) | (second & upper_half);
}

#define MULTIPLY(NAME, TYPE)                                                                                           \
    INLINE int4 NAME(uint a0, uint a1, uint a2, uint a3, uint2 b, int4 c, int share) {                                 \
        int x, y, z, w;                                                                                                \
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." TYPE ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
                     "{%10,%11,%12,%13};"                                                                              \
                     : "=r"(x), "=r"(y), "=r"(z), "=r"(w)                                                              \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y), "r"(c.x), "r"(c.y), "r"(c.z),           \
                       "r"(c.w));                                                                                      \
        return (int4)(x, y, z, w);                                                                                     \
    }
MULTIPLY(multiply_unsigned, "u8")
MULTIPLY(multiply_signed, "s8")

// Of 16 columns, with unsigned bytes.
INLINE int4 multiply_half(uint a0, uint a1, uint b, int4 c, int share) {
    int x, y, z, w;
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                 : "r"(a0), "r"(a1), "r"(b), "r"(c.x), "r"(c.y), "r"(c.z), "r"(c.w));
    return (int4)(x, y, z, w);
}
