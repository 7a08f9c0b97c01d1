//! The choice of an instruction set for the kernels.

use super::Kernel;
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512};

/// An instruction set, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// The baseline of the compiler's target.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// Those of AVX-512, and AMX with bytes for products of many rows.
    Amx,
}

impl Tier {
    /// Returns the tiers that this machine supports, worst first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut tiers = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if avx2::is_available() {
                tiers.push(Self::Avx2);
            }
            if avx512::is_available() {
                tiers.push(Self::Avx512);
            }
            if amx::is_available() {
                tiers.push(Self::Amx);
            }
        }
        tiers
    }

    /// Returns the best tier that this machine supports.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self::Portable)
    }

    /// Returns the name for reports: `portable`, `avx2`, `avx512-vnni` or `amx-int8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512-vnni",
            Self::Amx => "amx-int8",
        }
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            Self::Portable => kernel.run::<Portable>(),
            // SAFETY: a tier above portable comes from `available`, which checks the CPU's features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Amx => unsafe { avx512::run(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Amx => kernel.run::<Portable>(),
        }
    }
}
