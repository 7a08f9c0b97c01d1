//! Weights on the device: the matrices of a role are in one buffer.

use super::coded::Coded;
use super::queue::{Arg, Queue};
use super::tier::Tier;
use super::tiles::{PANEL_ROWS, TileLayout};
use crate::backend::{LinearData, MatrixShape, TensorData};
use crate::error::EngineError;
use crate::format::FormatError;
use opencl3::memory::Buffer;

/// A matrix on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) coded: Coded,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// The bytes of a row, where weights are in rows.
    pub(super) row_bytes: usize,
    /// Where the matrix begins in its buffer, in bytes.
    pub(super) first_byte: usize,
    /// Where its bias begins in the buffer of biases, if it has one, in numbers.
    pub(super) first_bias: Option<usize>,
}

/// Matrices in one buffer.
#[derive(Debug)]
pub struct Matrices {
    buffer: Buffer<u8>,
    /// The biases of all matrices that have one, one after the other.
    biases: Option<Buffer<u8>>,
    placed: Vec<Placed>,
    /// The bytes of weights and biases.
    bytes: u64,
}

impl Matrices {
    /// Copies one matrix to the device.
    pub(super) fn one((queue, tier): (&Queue, Tier), tensor: &TensorData<'_>) -> Result<Self, EngineError> {
        let shape = MatrixShape { element: tensor.element, rows: tensor.rows, columns: tensor.columns };
        let mut matrices = Self::reserve((queue, tier), &[shape])?;
        matrices.write((queue, tier), 0, tensor)?;
        Ok(matrices)
    }

    /// Copies projections to the device, one after the other.
    pub(super) fn all(
        (queue, tier): (&Queue, Tier),
        shapes: &[MatrixShape],
        parts: &mut dyn Iterator<Item = Result<LinearData<'_>, EngineError>>,
    ) -> Result<Self, EngineError> {
        let mut matrices = Self::reserve((queue, tier), shapes)?;
        let mut biases: Vec<f32> = Vec::new();
        for index in 0..shapes.len() {
            let missing = || EngineError::BadStep { what: "fewer projections than shapes".to_owned() };
            let LinearData { weight, bias } = parts.next().ok_or_else(missing)??;
            matrices.write((queue, tier), index, &weight)?;
            if let Some(bias) = bias {
                matrices.placed[index].first_bias = Some(biases.len());
                biases.extend(bias);
            }
        }
        if !biases.is_empty() {
            let mut buffer = queue.allocate(size_of_val(biases.as_slice()), "biases")?;
            queue.write(&mut buffer, 0, &biases)?;
            matrices.bytes += size_of_val(biases.as_slice()) as u64;
            matrices.biases = Some(buffer);
        }
        Ok(matrices)
    }

    fn reserve((queue, tier): (&Queue, Tier), shapes: &[MatrixShape]) -> Result<Self, EngineError> {
        let mut end = 0_usize;
        let mut placed = Vec::with_capacity(shapes.len());
        for &MatrixShape { element, rows, columns } in shapes {
            let coded = Coded::new(element);
            let row_bytes = coded.row_bytes(columns);
            placed.push(Placed { coded, rows, columns, row_bytes, first_byte: end, first_bias: None });
            end = end.saturating_add(tier.matrix_bytes(coded, rows, columns));
        }
        Ok(Self { buffer: queue.allocate(end, "weights")?, biases: None, placed, bytes: end as u64 })
    }

    fn write(
        &mut self,
        (queue, tier): (&Queue, Tier),
        index: usize,
        tensor: &TensorData<'_>,
    ) -> Result<(), EngineError> {
        let placed = self.placed[index];
        if (tensor.rows, tensor.columns, Coded::new(tensor.element)) != (placed.rows, placed.columns, placed.coded) {
            return Err(EngineError::BadStep { what: format!("{} has another shape than announced", tensor.name) });
        }
        let file_row = tensor.bytes.length() / tensor.rows.max(1);
        // Some rows at a time, so that the host needs little memory: whole panels.
        let panel_bytes = tier.matrix_bytes(placed.coded, PANEL_ROWS, placed.columns);
        let rows_at_once = (PART_BYTES / panel_bytes.max(1)).max(1) * PANEL_ROWS;
        let (mut buffer, mut packed) = (Vec::new(), Vec::new());
        let mut at = placed.first_byte;
        for first in (0..tensor.rows).step_by(rows_at_once) {
            let end = (first + rows_at_once).min(tensor.rows);
            let bytes = tensor.bytes.part(first * file_row..end * file_row, &mut buffer)?;
            packed.clear();
            let broken = match tier {
                Tier::Portable => {
                    placed.coded.pack_rows(bytes.chunks(file_row.max(1)), tensor.element, placed.columns, &mut packed)
                }
                Tier::Matrix(_) => {
                    packed.resize(tier.matrix_bytes(placed.coded, end - first, placed.columns), 0);
                    let panels = packed.chunks_exact_mut(panel_bytes.max(1));
                    let rows = bytes.chunks((PANEL_ROWS * file_row).max(1));
                    let layout = TileLayout::of(placed.coded);
                    panels.zip(rows).enumerate().find_map(|(panel, (tiles, rows))| {
                        let broken =
                            layout.pack(tiles, rows.chunks(file_row.max(1)), tensor.element, placed.columns)?;
                        Some(panel * PANEL_ROWS + broken)
                    })
                }
            };
            if let Some(row) = broken {
                return Err(EngineError::Format(FormatError::not_a_number(tensor.name, first + row)));
            }
            queue.write(&mut self.buffer, at, &packed)?;
            at += packed.len();
        }
        Ok(())
    }

    pub(super) fn arg(&self) -> Arg {
        Arg::of(&self.buffer)
    }

    pub(super) fn bias_arg(&self) -> Arg {
        self.biases.as_ref().map_or_else(Arg::unused, Arg::of)
    }

    pub(super) fn placed(&self) -> &[Placed] {
        &self.placed
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The bytes of weights that are packed at once: large enough for few transfers, small beside a model.
const PART_BYTES: usize = 16 << 20;
