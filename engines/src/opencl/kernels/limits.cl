// What the device's memory delivers: work-items read `count` values of 16 bytes side by side.
__kernel __attribute__((reqd_work_group_size(WORK_GROUP_SIZE, 1, 1)))
void read(__global const uint4 *values, uint count, __global uint *out) {
    uint4 sum = 0;
    uint step = get_global_size(0);
    for (uint i = get_global_id(0); i < count; i += step) {
        sum ^= values[i];
    }
    // No compiler can leave the reads out, and hardly a value is written.
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x9e3779b9u) {
        out[0] = sum.x;
    }
}

// Gives memory contents: memory that was never written may be one page for all.
__kernel void fill(__global uint4 *values, uint count) {
    uint step = get_global_size(0);
    for (uint i = get_global_id(0); i < count; i += step) {
        values[i] = (uint4)(i, i + 1, i + 2, i + 3);
    }
}
