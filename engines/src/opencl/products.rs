//! Rows as codes, and their products with weights.

use super::fault::unsupported;
use super::programs::KernelSet;
use super::queue::Arg;
use super::rows::{OpenClBackend, Rows};
use super::scratch::Scratch;
use super::weights::{Matrices, Placed};
use crate::arithmetic::{SUPERBLOCK, superblocks};
use crate::engine::ActivationBits;
use crate::error::EngineError;

/// Rows that a work-group multiplies at once.
pub(super) const TILE: usize = 4;

/// Rows as integers of two bytes with units: `encode` in `kernels/rows.cl` describes the order.
#[derive(Debug)]
pub(super) struct Codes {
    /// \[row]\[superblock]\[256 upper bytes, 256 lower bytes].
    codes: Scratch,
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
    pub(super) fn encode(&mut self, rows: &Rows) -> Result<Codes, EngineError> {
        let count = superblocks(rows.width);
        let codes = self.pool.take(&self.queue, rows.count * count * 2 * SUPERBLOCK)?;
        let units = self.pool.take(&self.queue, rows.count * count * size_of::<f32>())?;
        let upper_only = Arg::flag(self.bits == ActivationBits::Eight);
        let arguments = [rows.arg(), Arg::int(rows.width), upper_only, codes.arg(), units.arg()];
        self.queue.run(KernelSet::Rows, "encode", &arguments, (count, rows.count))?;
        Ok(Codes { codes, units, rows: rows.count, columns: rows.width })
    }

    /// The product of all rows of `codes` with matrix `index`.
    pub(super) fn product(&mut self, matrices: &Matrices, index: usize, codes: &Codes) -> Result<Rows, EngineError> {
        let placed = find(matrices, index)?;
        let tile = if codes.rows == 1 { 1 } else { TILE };
        let experts = [Arg::unused(), Arg::flag(false), Arg::int(1)];
        self.multiply(matrices, placed, (0, 0), codes, experts, (codes.rows, tile))
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
        (rows, tile): (usize, usize),
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
            codes.units.arg(),
            experts,
            has_experts,
            inputs_shared,
            Arg::int(placed.columns),
            Arg::int(placed.rows),
            Arg::int(rows),
            out.arg(),
        ];
        let groups = (placed.rows, rows.div_ceil(tile));
        let work = (placed.rows * tile).saturating_mul(placed.columns) as u64;
        self.queue.run_in_parts(KernelSet::Products(placed.coded, tile), "multiply", &arguments, groups, work)?;
        Ok(out)
    }
}

fn find(matrices: &Matrices, index: usize) -> Result<Placed, EngineError> {
    let missing = || EngineError::BadStep { what: format!("no projection {index}") };
    matrices.placed().get(index).copied().ok_or_else(missing)
}

#[cfg(test)]
mod tests;
