//! Weights in the layout of the kernels: `kernels/products.cl` describes a row.
//!
//! A row takes about as many bytes as in the file: the codes are packed as tightly, and scales and minima have 16 bits.

use super::queue::{Arg, Queue};
use crate::arithmetic::weights::{Rule, Superblock, dense, superblock};
use crate::arithmetic::{SUPERBLOCK, superblocks};
use crate::backend::{LinearData, MatrixShape, TensorData};
use crate::error::EngineError;
use crate::format::blocks::{BLOCK, Coding, dequantise_row};
use crate::format::{ElementType, FormatError};
use opencl3::memory::Buffer;

/// The coding of weights, as the kernels know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Coded(ElementType);

impl Coded {
    pub(super) fn new(element: ElementType) -> Self {
        // All dense types become the same integers.
        Self(if Coding::of(element).is_none() { ElementType::F32 } else { element })
    }

    /// The definitions that `products.cl` asks for.
    pub(super) fn defines(self) -> String {
        let (Some(coding), Some(rule)) = (Coding::of(self.0), Rule::of(self.0)) else {
            return "-DBITS=16 -DHALVES=1 -DHAS_MINS=0 -DZERO=0 -DROUNDED=0".to_owned();
        };
        let (bits, zero, halves) = (coding.bits, coding.zero, halves(coding));
        let (mins, rounded) = (u8::from(coding.has_mins), u8::from(rule == Rule::Rounded));
        let levels = coding.levels.table().map(|table| {
            let levels: Vec<String> = table.iter().map(u8::to_string).collect();
            format!(" -DLEVELS={}", levels.join(","))
        });
        let levels = levels.unwrap_or_default();
        format!("-DBITS={bits} -DHALVES={halves} -DHAS_MINS={mins} -DZERO={zero} -DROUNDED={rounded}{levels}")
    }

    /// The bytes of a row of `columns`.
    fn row_bytes(self, columns: usize) -> usize {
        let blocks = columns.div_ceil(BLOCK);
        let scales = Coding::of(self.0).map_or(0, |coding| 2 * halves(coding) * (1 + usize::from(coding.has_mins)));
        let codes = Coding::of(self.0).map_or(2 * BLOCK, |coding| coding.bits as usize * BLOCK / 8);
        (4 * superblocks(columns) + blocks * (scales + codes)).next_multiple_of(4)
    }

    /// Appends a row to `out`. Returns false if a scale or a value of the row is not a number.
    fn pack(self, row: &[u8], element: ElementType, columns: usize, out: &mut Vec<u8>) -> bool {
        let end = out.len() + self.row_bytes(columns);
        let is_finite = match Coding::of(element) {
            None => pack_dense(row, element, columns, out),
            Some(coding) => {
                let blocks: Vec<Superblock> =
                    (0..superblocks(columns)).map(|index| superblock(element, row, columns, index)).collect();
                pack_blocks(coding, &blocks, out);
                blocks.iter().all(|block| block.unit.is_finite())
            }
        };
        out.resize(end, 0);
        is_finite
    }
}

fn halves(coding: Coding) -> usize {
    if coding.split { 2 } else { 1 }
}

fn pack_dense(row: &[u8], element: ElementType, columns: usize, out: &mut Vec<u8>) -> bool {
    let mut values = vec![0.0; columns];
    dequantise_row(element, row, &mut values);
    let mut codes = vec![0_i16; columns];
    let parts = values.chunks(SUPERBLOCK).zip(codes.chunks_mut(SUPERBLOCK));
    let units: Vec<f32> = parts.map(|(values, codes)| dense(values, codes)).collect();
    out.extend(units.iter().flat_map(|unit| unit.to_ne_bytes()));
    out.extend(codes.iter().flat_map(|code| code.to_ne_bytes()));
    units.iter().all(|unit| unit.is_finite())
}

fn pack_blocks(coding: Coding, superblocks: &[Superblock], out: &mut Vec<u8>) {
    let blocks = || superblocks.iter().flat_map(|superblock| superblock.blocks());
    out.extend(superblocks.iter().flat_map(|superblock| superblock.unit.to_ne_bytes()));
    let count = halves(coding);
    out.extend(blocks().flat_map(|block| block.scales.into_iter().take(count)).flat_map(i16::to_ne_bytes));
    if coding.has_mins {
        out.extend(blocks().flat_map(|block| block.mins.into_iter().take(count)).flat_map(i16::to_ne_bytes));
    }
    for block in blocks() {
        pack_codes(coding.bits, &block.codes, out);
    }
}

/// Packs the codes of a block: low nibbles, then pairs of bits, then single bits, as far as `bits` has them.
fn pack_codes(bits: u32, codes: &[u8; BLOCK], out: &mut Vec<u8>) {
    if bits == 8 {
        return out.extend(codes);
    }
    let pairs = |shift: u32| -> [u8; 8] {
        std::array::from_fn(|i| (0..4).map(|part| (codes[i + 8 * part] >> shift & 3) << (2 * part)).sum())
    };
    let singles = |shift: u32| -> [u8; 4] {
        std::array::from_fn(|byte| (0..8).map(|bit| (codes[8 * byte + bit] >> shift & 1) << bit).sum())
    };
    if bits >= 4 {
        out.extend((0..16).map(|i| (codes[i] & 15) | (codes[i + 16] & 15) << 4));
    } else {
        out.extend(pairs(0));
    }
    match bits {
        6 => out.extend(pairs(4)),
        5 => out.extend(singles(4)),
        3 => out.extend(singles(2)),
        _ => {}
    }
}

/// A matrix on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) coded: Coded,
    pub(super) rows: usize,
    pub(super) columns: usize,
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
    biases: Option<Buffer<u8>>,
    placed: Vec<Placed>,
    bytes: u64,
}

impl Matrices {
    /// Copies one matrix to the device.
    pub(super) fn one(queue: &Queue, tensor: &TensorData<'_>) -> Result<Self, EngineError> {
        let shape = MatrixShape { element: tensor.element, rows: tensor.rows, columns: tensor.columns };
        let mut matrices = Self::reserve(queue, &[shape])?;
        matrices.write(queue, 0, tensor)?;
        Ok(matrices)
    }

    /// Copies projections to the device, one after the other.
    pub(super) fn all(
        queue: &Queue,
        shapes: &[MatrixShape],
        parts: &mut dyn Iterator<Item = Result<LinearData<'_>, EngineError>>,
    ) -> Result<Self, EngineError> {
        let mut matrices = Self::reserve(queue, shapes)?;
        let mut biases: Vec<f32> = Vec::new();
        for index in 0..shapes.len() {
            let missing = || EngineError::BadStep { what: "fewer projections than shapes".to_owned() };
            let LinearData { weight, bias } = parts.next().ok_or_else(missing)??;
            matrices.write(queue, index, &weight)?;
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

    fn reserve(queue: &Queue, shapes: &[MatrixShape]) -> Result<Self, EngineError> {
        let mut end = 0_usize;
        let mut placed = Vec::with_capacity(shapes.len());
        for &MatrixShape { element, rows, columns } in shapes {
            let coded = Coded::new(element);
            let row_bytes = coded.row_bytes(columns);
            placed.push(Placed { coded, rows, columns, row_bytes, first_byte: end, first_bias: None });
            end = end.saturating_add(row_bytes.saturating_mul(rows));
        }
        Ok(Self { buffer: queue.allocate(end, "weights")?, biases: None, placed, bytes: end as u64 })
    }

    fn write(&mut self, queue: &Queue, index: usize, tensor: &TensorData<'_>) -> Result<(), EngineError> {
        let placed = self.placed[index];
        if (tensor.rows, tensor.columns, Coded::new(tensor.element)) != (placed.rows, placed.columns, placed.coded) {
            return Err(EngineError::BadStep { what: format!("{} has another shape than announced", tensor.name) });
        }
        let file_row = tensor.bytes.length() / tensor.rows.max(1);
        // Some rows at a time, so that the host needs little memory.
        let rows_at_once = (PART_BYTES / placed.row_bytes.max(1)).max(1);
        let (mut buffer, mut packed) = (Vec::new(), Vec::new());
        for first in (0..tensor.rows).step_by(rows_at_once) {
            let end = (first + rows_at_once).min(tensor.rows);
            let bytes = tensor.bytes.part(first * file_row..end * file_row, &mut buffer)?;
            packed.clear();
            for (row, bytes) in (first..end).zip(bytes.chunks(file_row.max(1))) {
                if !placed.coded.pack(bytes, tensor.element, placed.columns, &mut packed) {
                    return Err(EngineError::Format(FormatError::not_a_number(tensor.name, row)));
                }
            }
            queue.write(&mut self.buffer, placed.first_byte + first * placed.row_bytes, &packed)?;
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

/// The bytes of weights that are packed at once.
const PART_BYTES: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_codes_have_the_bits_of_the_type() {
        let codes: [u8; BLOCK] = std::array::from_fn(|i| (i * 7 % 64) as u8);
        for (bits, bytes) in [(2, 8), (3, 12), (4, 16), (5, 20), (6, 24), (8, 32)] {
            let mut out = Vec::new();
            pack_codes(bits, &codes.map(|code| code & ((1_u16 << bits) - 1) as u8), &mut out);
            assert_eq!(out.len(), bytes, "{bits} bits");
        }
    }
}
