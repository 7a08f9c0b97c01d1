//! Rows as codes, and their products with weights.

use super::device::WORK_GROUP_SIZE;
use super::fault::unsupported;
use super::programs::{KernelSet, TileProduct};
use super::queue::Arg;
use super::rows::{OpenClBackend, Rows};
use super::scratch::Scratch;
use super::tier::Tier;
use super::tiles::LANES;
use super::weights::{Matrices, Placed};
use crate::arithmetic::{SUPERBLOCK, superblocks};
use crate::engine::ActivationBits;
use crate::error::EngineError;

/// Rows as integers of two bytes with units: `encode` in `kernels/rows.cl` describes the order.
#[derive(Debug)]
pub(super) struct Codes {
    /// \[row]\[superblock]\[512 bytes].
    codes: Scratch,
    /// \[row]\[16 columns]\[sum of upper bytes, of lower bytes].
    sums: Scratch,
    /// \[row]\[superblock].
    units: Scratch,
    rows: usize,
    columns: usize,
}

/// The experts of rows: \[row]\[choice].
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) experts: Scratch,
    pub(super) weights: Scratch,
    /// Experts of a row.
    pub(super) used: usize,
}

/// The input of an expert's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExpertInput {
    /// All experts of a row have the same input.
    Shared,
    /// Each choice of a row has an input of its own.
    Own,
}

impl OpenClBackend {
    /// The kernels of products with a matrix, and the work-items of their work-groups.
    pub(super) fn kernels(&self, placed: &Placed, rows: usize) -> (KernelSet, usize) {
        let Placed { coded, columns, .. } = *placed;
        match self.tier {
            Tier::Portable => (KernelSet::Products(coded, rows), WORK_GROUP_SIZE),
            Tier::Matrix(unit) => {
                let warps = self.tier.warps(columns);
                (KernelSet::Tiles(TileProduct { coded, unit, rows, warps }), warps * LANES)
            }
        }
    }

    pub(super) fn encode(&mut self, rows: &Rows) -> Result<Codes, EngineError> {
        let count = superblocks(rows.width);
        let codes = self.pool.take(&self.queue, rows.count * count * 2 * SUPERBLOCK)?;
        let sums = self.pool.take(&self.queue, rows.count * count * SUPERBLOCK / 16 * 2 * size_of::<i32>())?;
        let units = self.pool.take(&self.queue, rows.count * count * size_of::<f32>())?;
        let upper_only = Arg::flag(self.bits == ActivationBits::Eight);
        let arguments = [rows.arg(), Arg::int(rows.width), upper_only, codes.arg(), sums.arg(), units.arg()];
        self.queue.run(KernelSet::Rows, "encode", &arguments, (count, rows.count))?;
        Ok(Codes { codes, sums, units, rows: rows.count, columns: rows.width })
    }

    /// The product of all rows of `codes` with matrix `index`.
    pub(super) fn product(&mut self, matrices: &Matrices, index: usize, codes: &Codes) -> Result<Rows, EngineError> {
        let placed = find(matrices, index)?;
        // The smallest number that holds all rows, or else the largest.
        let counts = self.tier.row_counts();
        let at_once = counts.iter().copied().find(|&count| count >= codes.rows).or(counts.last().copied()).unwrap_or(1);
        let experts = [Arg::unused(), Arg::flag(false), Arg::int(1)];
        self.multiply(matrices, placed, (0, 0), codes, experts, (codes.rows, at_once))
    }

    /// The product of each row with the matrices of its experts: \[row]\[choice]\[output]. Matrix `index` is that of
    /// the first expert; that of the next one comes `period` matrices later.
    pub(super) fn expert_product(
        &mut self,
        matrices: &Matrices,
        (index, period): (usize, usize),
        codes: &Codes,
        (chosen, input): (&Chosen, ExpertInput),
    ) -> Result<Rows, EngineError> {
        let placed = find(matrices, index)?;
        let stride = match matrices.placed().get(index + period) {
            None => (0, 0),
            Some(next) => (
                next.first_byte - placed.first_byte,
                next.first_bias.unwrap_or(0).saturating_sub(placed.first_bias.unwrap_or(0)),
            ),
        };
        let of_expert = matrices.placed().iter().skip(index).step_by(period).enumerate();
        let is_regular = |(expert, other): (usize, &Placed)| {
            (other.coded, other.rows, other.columns) == (placed.coded, placed.rows, placed.columns)
                && other.first_byte == placed.first_byte + expert * stride.0
                && other.first_bias == placed.first_bias.map(|first| first + expert * stride.1)
        };
        if !of_expert.clone().all(is_regular) {
            return Err(unsupported("experts whose weights differ in type or shape".to_owned()));
        }
        let (rows, shared) = match input {
            ExpertInput::Shared => (codes.rows * chosen.used, chosen.used),
            ExpertInput::Own => (codes.rows, 1),
        };
        let experts = [chosen.experts.arg(), Arg::flag(true), Arg::int(shared)];
        self.multiply(matrices, placed, stride, codes, experts, (rows, 1))
    }

    fn multiply(
        &mut self,
        matrices: &Matrices,
        placed: Placed,
        (expert_bytes, expert_biases): (usize, usize),
        codes: &Codes,
        [experts, has_experts, inputs_shared]: [Arg; 3],
        (rows, at_once): (usize, usize),
    ) -> Result<Rows, EngineError> {
        if placed.columns != codes.columns {
            return Err(EngineError::BadStep { what: format!("{} columns, not {}", codes.columns, placed.columns) });
        }
        let out = self.allocate_rows(rows, placed.rows)?;
        let arguments = [
            matrices.arg(),
            Arg::Long(placed.first_byte as u64),
            Arg::Unsigned(u32::try_from(placed.row_bytes).unwrap_or(u32::MAX)),
            Arg::Long(expert_bytes as u64),
            matrices.bias_arg(),
            Arg::int(placed.first_bias.unwrap_or(0)),
            Arg::flag(placed.first_bias.is_some()),
            Arg::int(expert_biases),
            codes.codes.arg(),
            codes.sums.arg(),
            codes.units.arg(),
            experts,
            has_experts,
            inputs_shared,
            Arg::int(placed.columns),
            Arg::int(placed.rows),
            Arg::int(rows),
            out.arg(),
        ];
        let groups = (placed.rows.div_ceil(self.tier.outputs_at_once()), rows.div_ceil(at_once));
        let work = (placed.rows * at_once).saturating_mul(placed.columns) as u64;
        let (set, size) = self.kernels(&placed, at_once);
        self.queue.run_in_parts(set, "multiply", &arguments, (groups, size), work)?;
        Ok(out)
    }
}

fn find(matrices: &Matrices, index: usize) -> Result<Placed, EngineError> {
    let missing = || EngineError::BadStep { what: format!("no projection {index}") };
    matrices.placed().get(index).copied().ok_or_else(missing)
}

#[cfg(test)]
mod tests;
