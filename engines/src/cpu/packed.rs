//! Weights in the order in which the kernels read them.
//!
//! A matrix of `rows` × `columns` is cut into panels of sixteen rows. A panel of quantised blocks holds, for each
//! 32 columns, the codes of its sixteen rows interleaved so that one vector has four successive columns of each row:
//! low nibbles of the vectors 0–3 are columns 0–15, high nibbles columns 16–31; fifth and sixth bits lie in planes
//! behind them. A panel of floats holds sixteen rows' values of one column side by side. Scales lie apart. The size
//! stays the file's to within its rounding (Q8_0, Q4_0: equal; K-quants: their scales are spelt out).

use super::simd::LANES;
use crate::format::ElementType;
use crate::format::blocks::{self, BLOCK, Coding};
use half::f16;

/// Memory for vector loads: lines of 64 bytes.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes aligned to a cache line.
#[derive(Debug)]
pub(super) struct Lines {
    lines: Vec<Line>,
    length: usize,
}

impl Lines {
    fn zeroed(length: usize) -> Self {
        Self { lines: vec![Line([0; 64]); length.div_ceil(64)], length }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: lines are plain bytes without padding, and `length` is at most theirs.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.length) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length) }
    }
}

/// A weight matrix of the CPU backend.
#[derive(Debug)]
pub struct Packed {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) form: Form,
}

#[derive(Debug)]
pub(super) enum Form {
    Dense(Dense),
    Coded(Coded),
}

#[derive(Debug)]
pub(super) struct Dense {
    pub(super) element: ElementType,
    pub(super) values: Lines,
}

#[derive(Debug)]
pub(super) struct Coded {
    pub(super) coding: Coding,
    pub(super) codes: Lines,
    /// f16, \[panel]\[block]\[half where split]\[lane].
    pub(super) scales: Vec<u16>,
    /// f16, \[panel]\[block]\[lane]; empty where the format has no minima.
    pub(super) mins: Vec<u16>,
}

impl Coded {
    /// Bytes of codes in one block of 32 columns × sixteen rows.
    pub(super) fn block_bytes(coding: Coding) -> usize {
        coding.bits as usize * BLOCK * LANES / 8
    }

    /// Scales in one block.
    pub(super) fn block_scales(coding: Coding) -> usize {
        if coding.split_scales { 2 * LANES } else { LANES }
    }
}

/// A value in the matrix is no number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotANumber {
    pub(super) row: usize,
}

impl Packed {
    /// Packs `rows` rows of `columns` values stored as `element`, `bytes` holding exactly these.
    pub(super) fn pack(element: ElementType, rows: usize, columns: usize, bytes: &[u8]) -> Result<Self, NotANumber> {
        let form = match Coding::of(element) {
            Some(coding) => Form::Coded(pack_coded(element, coding, rows, columns, bytes)?),
            None => Form::Dense(pack_dense(element, rows, columns, bytes)?),
        };
        Ok(Self { rows, columns, form })
    }

    /// Panels of sixteen rows.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Whether products want activations rounded to 8 bits.
    pub(super) fn is_coded(&self) -> bool {
        matches!(self.form, Form::Coded(_))
    }

    /// Memory in use.
    pub(super) fn memory_bytes(&self) -> u64 {
        let bytes = match &self.form {
            Form::Dense(dense) => dense.values.length,
            Form::Coded(coded) => coded.codes.length + 2 * (coded.scales.len() + coded.mins.len()),
        };
        bytes as u64
    }

    /// Writes the values of `row`, as f32, to `out`.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / LANES, row % LANES);
        match &self.form {
            Form::Dense(dense) => dense.read_row(self.columns, panel, lane, out),
            Form::Coded(coded) => coded.read_row(self.columns, panel, lane, out),
        }
    }
}

impl Dense {
    fn read_row(&self, columns: usize, panel: usize, lane: usize, out: &mut [f32]) {
        let size = self.element.block_bytes();
        let bytes = self.values.bytes();
        for (column, value) in out.iter_mut().enumerate() {
            let at = ((panel * columns + column) * LANES + lane) * size;
            blocks::dequantise_row(self.element, &bytes[at..at + size], std::slice::from_mut(value));
        }
    }
}

impl Coded {
    fn read_row(&self, columns: usize, panel: usize, lane: usize, out: &mut [f32]) {
        let blocks_per_row = columns / BLOCK;
        for (index, values) in out.chunks_mut(BLOCK).enumerate() {
            let block = panel * blocks_per_row + index;
            let codes = self.read_codes(block, lane);
            for (i, value) in values.iter_mut().enumerate() {
                let split = if self.coding.split_scales { i / 16 * LANES } else { 0 };
                let scale = self.scales[block * Self::block_scales(self.coding) + split + lane];
                let min = self.mins.get(block * LANES + lane).copied().unwrap_or(0);
                *value = f16::from_bits(scale).to_f32() * (i32::from(codes[i]) - self.coding.zero) as f32
                    + f16::from_bits(min).to_f32();
            }
        }
    }

    fn read_codes(&self, block: usize, lane: usize) -> [u8; BLOCK] {
        let size = Self::block_bytes(self.coding);
        let bytes = &self.codes.bytes()[block * size..][..size];
        std::array::from_fn(|column| {
            let at = place(column, lane);
            if self.coding.bits == 8 {
                return bytes[column / 4 * 64 + at.byte];
            }
            let low = bytes[at.vector * 64 + at.byte] >> at.nibble & 15;
            let high = match self.coding.bits {
                5 => bytes[256 + at.byte] >> (column / 4) & 1,
                6 => bytes[256 + column / 16 * 64 + at.byte] >> (column / 4 % 4 * 2) & 3,
                _ => 0,
            };
            low | high << 4
        })
    }
}

/// Where a column's nibble lies in a block.
struct Place {
    vector: usize,
    byte: usize,
    nibble: u32,
}

fn place(column: usize, lane: usize) -> Place {
    let group = column / 4;
    Place { vector: group % 4, byte: lane * 4 + column % 4, nibble: if group < 4 { 0 } else { 4 } }
}

fn pack_dense(element: ElementType, rows: usize, columns: usize, bytes: &[u8]) -> Result<Dense, NotANumber> {
    let size = element.block_bytes();
    let mut values = Lines::zeroed(rows.div_ceil(LANES) * LANES * columns * size);
    let mut floats = vec![0.0; columns];
    for (row, source) in bytes.chunks_exact((columns * size).max(1)).enumerate().take(rows) {
        blocks::dequantise_row(element, source, &mut floats);
        if floats.iter().any(|v| !v.is_finite()) {
            return Err(NotANumber { row });
        }
        let (panel, lane) = (row / LANES, row % LANES);
        let target = &mut values.bytes_mut()[panel * columns * LANES * size..];
        for (column, value) in source.chunks_exact(size).enumerate() {
            target[(column * LANES + lane) * size..][..size].copy_from_slice(value);
        }
    }
    Ok(Dense { element, values })
}

fn pack_coded(
    element: ElementType,
    coding: Coding,
    rows: usize,
    columns: usize,
    bytes: &[u8],
) -> Result<Coded, NotANumber> {
    let blocks_per_row = columns / BLOCK;
    let block_count = rows.div_ceil(LANES) * blocks_per_row;
    let block_scales = Coded::block_scales(coding);
    let mut coded = Coded {
        coding,
        codes: Lines::zeroed(block_count * Coded::block_bytes(coding)),
        scales: vec![0; block_count * block_scales],
        mins: vec![0; if coding.has_mins { block_count * LANES } else { 0 }],
    };
    let row_bytes = bytes.len() / rows.max(1);
    for (row, source) in bytes.chunks_exact(row_bytes.max(1)).enumerate().take(rows) {
        let (panel, lane) = (row / LANES, row % LANES);
        for index in 0..blocks_per_row {
            let block = blocks::decode(element, source, index);
            if block.scales.iter().chain(&block.mins).any(|v| !v.is_finite()) {
                return Err(NotANumber { row });
            }
            coded.put(panel * blocks_per_row + index, lane, &block);
        }
    }
    Ok(coded)
}

impl Coded {
    fn put(&mut self, index: usize, lane: usize, block: &blocks::Block) {
        let coding = self.coding;
        let scales = &mut self.scales[index * Self::block_scales(coding)..];
        scales[lane] = f16::from_f32(block.scales[0]).to_bits();
        if coding.split_scales {
            scales[LANES + lane] = f16::from_f32(block.scales[1]).to_bits();
        }
        if coding.has_mins {
            self.mins[index * LANES + lane] = f16::from_f32(block.mins[0]).to_bits();
        }
        let size = Self::block_bytes(coding);
        let bytes = &mut self.codes.bytes_mut()[index * size..][..size];
        for (column, &code) in block.codes.iter().enumerate() {
            let at = place(column, lane);
            if coding.bits == 8 {
                bytes[column / 4 * 64 + at.byte] = code;
                continue;
            }
            bytes[at.vector * 64 + at.byte] |= (code & 15) << at.nibble;
            match coding.bits {
                5 => bytes[256 + at.byte] |= (code >> 4) << (column / 4),
                6 => bytes[256 + column / 16 * 64 + at.byte] |= (code >> 4) << (column / 4 % 4 * 2),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// R4.3: packing keeps every value, to the half precision of its scale.
        #[test]
        fn packed_rows_read_back(
            element in prop::sample::select(ElementType::ALL.to_vec()),
            rows in 1_usize..40,
            blocks_per_row in 1_usize..3,
            seed in any::<u64>(),
        ) {
            let columns = blocks_per_row * 256;
            let bytes = crate::cpu::test_weights::bytes(element, rows, columns, seed);
            let packed = Packed::pack(element, rows, columns, &bytes).map_err(|e| TestCaseError::fail(format!("{e:?}")))?;
            let row_bytes = element.row_bytes(columns).unwrap_or(1);
            let (mut got, mut expected) = (vec![0.0; columns], vec![0.0; columns]);
            for row in 0..rows {
                packed.read_row(row, &mut got);
                blocks::dequantise_row(element, &bytes[row * row_bytes..][..row_bytes], &mut expected);
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let parts = match Coding::of(element) {
                        None => 0.0,
                        Some(_) => {
                            let block = blocks::decode(element, &bytes[row * row_bytes..][..row_bytes], i / BLOCK);
                            block.scales[i % BLOCK / 16].abs() * 256.0 + block.mins[0].abs()
                        }
                    };
                    prop_assert!((got - expected).abs() <= 0.0005 * parts + 1e-6, "{element}: {got} {expected}");
                }
            }
        }
    }

    #[test]
    fn a_value_that_is_no_number_is_found() {
        let mut bytes = vec![0; 3 * 64 * 4];
        bytes[2 * 64 * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        assert_eq!(Packed::pack(ElementType::F32, 3, 64, &bytes).err(), Some(NotANumber { row: 2 }));
        let mut block = vec![0; 18];
        block[..2].copy_from_slice(&f16::NAN.to_le_bytes());
        assert_eq!(Packed::pack(ElementType::Q4_0, 1, 32, &block).err(), Some(NotANumber { row: 0 }));
    }
}
