//! The kernels that compute products: what a device has, and what it computes right.

use super::coded::Coded;
use super::tiles::{PANEL_ROWS, TileLayout};
use crate::arithmetic::superblocks;
use opencl3::device::Device;

/// How products are computed, from the slowest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Tier {
    /// Any device: weights in rows.
    Portable,
    /// Instructions that multiply matrices of bytes: weights in tiles.
    Matrix(MatrixUnit),
}

/// What multiplies the matrices of the matrix tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum MatrixUnit {
    /// Tensor cores, by instructions of PTX.
    Nvidia,
    /// Plain OpenCL C: slow, for tests of the tier on any device.
    Emulated,
}

/// Chains of superblocks that a work-group of the matrix tier computes at once.
const WARPS_MAX: usize = 4;
/// Superblocks of a chain.
const CHAIN: usize = 4;

impl Tier {
    /// The best tier of a device, as far as its attributes tell. Compute capability 8.0 has all instructions.
    pub(super) fn of(device: &Device) -> Self {
        match device.compute_capability_major_nv() {
            Ok(8..) => Self::Matrix(MatrixUnit::Nvidia),
            _ => Self::Portable,
        }
    }

    /// Its name, as devices report it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Matrix(MatrixUnit::Nvidia) => "matrix",
            Self::Matrix(MatrixUnit::Emulated) => "matrix, emulated",
        }
    }

    /// The bytes of a matrix on the device.
    pub(super) fn matrix_bytes(self, coded: Coded, rows: usize, columns: usize) -> usize {
        match self {
            Self::Portable => coded.row_bytes(columns).saturating_mul(rows),
            Self::Matrix(_) => TileLayout::of(coded).matrix_bytes(rows, columns),
        }
    }

    /// Rows of codes that a product computes at once, from the smallest number. Rows of different experts are computed
    /// one by one.
    pub(super) fn row_counts(self) -> &'static [usize] {
        match self {
            Self::Portable => &[1, 4],
            // One to four rows cost the same.
            Self::Matrix(MatrixUnit::Nvidia) => &[4, 8, 16],
            // Compiling them takes a while.
            Self::Matrix(MatrixUnit::Emulated) => &[1, 8],
        }
    }

    /// Outputs of a work-group.
    pub(super) fn outputs_at_once(self) -> usize {
        match self {
            Self::Portable => 1,
            Self::Matrix(_) => PANEL_ROWS,
        }
    }

    /// The warps of a work-group for a matrix of `columns`: the largest power of two that is at most the number of its
    /// chains, up to four.
    pub(super) fn warps(self, columns: usize) -> usize {
        match self {
            Self::Matrix(MatrixUnit::Nvidia) => {
                let chains = superblocks(columns).div_ceil(CHAIN);
                (chains + 1).next_power_of_two().div_ceil(2).clamp(1, WARPS_MAX)
            }
            Self::Portable | Self::Matrix(MatrixUnit::Emulated) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_work_group_has_no_more_warps_than_chains() {
        let warps = |columns| Tier::Matrix(MatrixUnit::Nvidia).warps(columns);
        let of = [256, 1024, 1025, 2048, 3072, 4096, 14_336].map(warps);
        assert_eq!(of, [1, 1, 2, 2, 2, 4, 4]);
        assert_eq!(Tier::Matrix(MatrixUnit::Emulated).warps(4096), 1);
    }
}
