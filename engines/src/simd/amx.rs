//! Tiles of AMX: products of 16 × 64 signed bytes.
//!
//! Rust has no stable intrinsics for tiles, so this module has the instructions. Source: Intel's Architecture Software
//! Developer's Manual, volume 1, chapter 18, and the kernel's `Documentation/arch/x86/xstate.rst` for the permission.

use super::avx512;
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::LazyLock;

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Bytes of a tile.
pub(crate) const TILE_BYTES: usize = 1024;

/// Whether this process may use tiles. The first call asks the kernel, once for all threads.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| has_tiles() && avx512::is_available() && is_permitted());
    *AVAILABLE
}

/// Whether the CPU has AMX-TILE and AMX-INT8: bits 24 and 25 of EDX in leaf 7.
fn has_tiles() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 24 & 3 == 3
}

#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let result: i64;
    // SAFETY: this system call changes only which processor state the kernel keeps for this process.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// The memory format of LDTILECFG.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tiles of the current thread, all of 16 rows × 64 bytes, until this value is dropped.
pub(crate) struct Tiles {
    /// Tiles belong to their thread.
    thread: PhantomData<*const ()>,
}

/// The sums of [`Tiles::multiply`]: \[product]\[row]\[column], of the upper and lower weight bytes with the upper bytes
/// of activations, then with the lower.
#[repr(C, align(64))]
pub(crate) struct TileSums(pub(crate) [[[i32; 16]; TILE_ROWS]; 4]);

impl Tiles {
    /// Configures the thread's tiles.
    ///
    /// # Safety
    /// [`is_available`] has returned true, and the thread has no other value of this type.
    pub(crate) unsafe fn configure() -> Self {
        let config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // SAFETY: the CPU has tiles, and the configuration is valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self { thread: PhantomData }
    }

    /// Writes the sums of `steps` steps of 64 columns, for 16 rows × 16 outputs.
    ///
    /// A step of activations is a tile of upper and a tile of lower bytes, each \[row]\[column]. A step of weights is a
    /// tile of upper and a tile of lower bytes, each \[group of four columns]\[output]\[column].
    ///
    /// # Safety
    /// `activations` and `weights` are valid for reads of `steps` · 2 tiles, and `steps` is at least 1.
    #[inline(always)]
    pub(crate) unsafe fn multiply(
        &self,
        activations: *const u8,
        weights: *const u8,
        steps: usize,
        sums: &mut TileSums,
    ) {
        // SAFETY: the caller upholds the contract of this method; tiles are configured while `self` lives.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {line}]",
                "tileloadd tmm6, [{w} + {line}]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {line} + 1024]",
                "tdpbssd tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {line} + 1024]",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {w}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                "tilestored [{sums} + {line} + 3072], tmm3",
                a = inout(reg) activations => _,
                w = inout(reg) weights => _,
                steps = inout(reg) steps => _,
                line = in(reg) 64_usize,
                sums = in(reg) sums,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Runs `rounds` rounds of four products of tiles, without loads: 4 · 16 · 64 · 16 pairs of bytes each.
    ///
    /// # Safety
    /// `rounds` is at least 1.
    pub(crate) unsafe fn multiply_alone(&self, rounds: usize) {
        // SAFETY: tiles are configured while `self` lives, and nothing reads their sums.
        unsafe {
            asm!(
                "tilezero tmm4",
                "tilezero tmm5",
                "2:",
                "tdpbssd tmm0, tmm4, tmm5",
                "tdpbssd tmm1, tmm4, tmm5",
                "tdpbssd tmm2, tmm4, tmm5",
                "tdpbssd tmm3, tmm4, tmm5",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                options(nostack, nomem),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // Without tiles in use, the kernel saves no tile data when it switches threads.
        // SAFETY: the tiles are configured, and nothing reads them any more.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random tiles, compared with plain loops.
    #[test]
    fn tiles_multiply_as_plain_loops_do() {
        if !is_available() {
            return;
        }
        let mut random = fastrand::Rng::with_seed(5);
        for steps in [1, 2, 4] {
            let activations: Vec<i8> = (0..steps * 2 * TILE_BYTES).map(|_| random.i8(..)).collect();
            let weights: Vec<i8> = (0..steps * 2 * TILE_BYTES).map(|_| random.i8(..)).collect();
            let mut sums = TileSums([[[7; 16]; 16]; 4]);
            // SAFETY: tiles are available, and the slices have the lengths that the call reads.
            unsafe {
                let tiles = Tiles::configure();
                tiles.multiply(activations.as_ptr().cast(), weights.as_ptr().cast(), steps, &mut sums);
            }
            for (product, sums) in sums.0.iter().enumerate() {
                for (row, sums) in sums.iter().enumerate() {
                    for (output, &sum) in sums.iter().enumerate() {
                        let term = |column: usize| {
                            let (step, within) = (column / 64, column % 64);
                            let activation = activations[(step * 2 + product / 2) * TILE_BYTES + row * 64 + within];
                            let tile = (step * 2 + product % 2) * TILE_BYTES;
                            let weight = weights[tile + within / 4 * 64 + output * 4 + within % 4];
                            i32::from(activation) * i32::from(weight)
                        };
                        assert_eq!(sum, (0..steps * 64).map(term).sum::<i32>(), "{product} {row} {output}");
                    }
                }
            }
        }
    }
}
