//! Weights in the order in which the kernels read them.
//!
//! A matrix of `rows` × `columns` is split into panels of sixteen rows. A panel of floats holds the sixteen values of
//! each column side by side. A panel of quantised blocks holds, for each 32 columns, the codes of its sixteen rows,
//! interleaved so that one vector has four successive columns of each row:
//! - 4 to 6 bits: low nibbles of the vectors 0–3 are columns 0–15, high nibbles columns 16–31; planes with the fifth
//!   and sixth bits follow.
//! - 2 and 3 bits: two vectors hold bit pairs; a plane with the third bits follows.
//!
//! Scales are stored separately. The size is that of the file, but for rounding (Q8_0, Q4_0: equal; K-quants: larger,
//! since their scales are expanded).

use crate::format::ElementType;
use crate::format::blocks::{self, BLOCK, Coding, Levels};
use crate::simd::LANES;
use half::{bf16, f16};
#[cfg(target_os = "linux")]
use rustix::mm::{Advice, madvise};

/// The alignment of vector loads.
const LINE_BYTES: usize = 64;

/// The size of a huge page on x86-64 and aarch64.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Bytes aligned to a cache line, initially zero. Pages become resident when they are written.
#[derive(Debug)]
pub(super) struct Lines {
    /// One line longer than `length`, so that `start` can be aligned.
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Lines {
    pub(super) fn zeroed(length: usize) -> Self {
        let bytes = vec![0; length + LINE_BYTES];
        let start = bytes.as_ptr().align_offset(LINE_BYTES).min(LINE_BYTES);
        let mut lines = Self { bytes, start, length };
        lines.ask_for_huge_pages();
        lines
    }

    /// Requests huge pages: every token reads a large matrix from end to end, and fewer pages need fewer translations.
    #[cfg(target_os = "linux")]
    fn ask_for_huge_pages(&mut self) {
        let bytes = self.bytes.as_mut_ptr();
        let before = bytes.align_offset(HUGE_PAGE_BYTES);
        let inside = self.bytes.len().saturating_sub(before) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        if inside == 0 {
            return;
        }
        // A hint: it changes no result, so its error is ignored.
        // SAFETY: the range is whole pages of this allocation; the advice changes their backing, not their contents.
        let _ = unsafe { madvise(bytes.add(before).cast(), inside, Advice::LinuxHugepage) };
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_for_huge_pages(&mut self) {}

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..][..self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.length]
    }
}

/// A weight matrix of the CPU backend, \[rows]\[columns], in panels of sixteen rows.
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
    /// f16, or bf16 for [`Levels::Fp4`]: \[panel]\[block]\[half where split]\[lane].
    pub(super) scales: Vec<u16>,
    /// f16, likewise; empty where the format has no minima.
    pub(super) mins: Vec<u16>,
}

impl Coded {
    /// Bytes of codes in one block of 32 columns × sixteen rows.
    pub(super) fn block_bytes(coding: Coding) -> usize {
        coding.bits as usize * BLOCK * LANES / 8
    }

    /// Scales in one block.
    pub(super) fn block_scales(coding: Coding) -> usize {
        if coding.split { 2 * LANES } else { LANES }
    }

    /// Minima in one block.
    pub(super) fn block_mins(coding: Coding) -> usize {
        if coding.has_mins { Self::block_scales(coding) } else { 0 }
    }
}

/// Encodes `scale` for a panel of `coding`.
pub(super) fn scale_bits(coding: Coding, scale: f32) -> u16 {
    match coding.levels {
        // The scale is a power of two with the exponent range of f32, which f16 cannot hold.
        Levels::Fp4 => bf16::from_f32(scale).to_bits(),
        Levels::Even | Levels::Iq4 => f16::from_f32(scale).to_bits(),
    }
}

fn scale_value(coding: Coding, bits: u16) -> f32 {
    match coding.levels {
        Levels::Fp4 => bf16::from_bits(bits).to_f32(),
        Levels::Even | Levels::Iq4 => f16::from_bits(bits).to_f32(),
    }
}

impl Packed {
    /// Returns the number of panels of sixteen rows.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Returns whether products need activations rounded to codes.
    pub(super) fn is_coded(&self) -> bool {
        matches!(self.form, Form::Coded(_))
    }

    /// Returns the bytes in use.
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
                let split = if self.coding.split { i / 16 * LANES } else { 0 };
                let at = block * Self::block_scales(self.coding) + split + lane;
                let min = self.mins.get(at).copied().unwrap_or(0);
                *value = scale_value(self.coding, self.scales[at]) * self.coding.level(codes[i]) as f32
                    + f16::from_bits(min).to_f32();
            }
        }
    }

    fn read_codes(&self, block: usize, lane: usize) -> [u8; BLOCK] {
        let size = Self::block_bytes(self.coding);
        let bytes = &self.codes.bytes()[block * size..][..size];
        std::array::from_fn(|column| {
            let at = code_position(column, lane);
            let group = column / 4;
            match self.coding.bits {
                8 => return bytes[group * 64 + at.byte],
                2 | 3 => {
                    let low = bytes[group / 4 * 64 + at.byte] >> (group % 4 * 2) & 3;
                    let high = if self.coding.bits == 3 { bytes[128 + at.byte] >> group & 1 } else { 0 };
                    return low | high << 2;
                }
                _ => {}
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

/// The position of a column's nibble in a block.
pub(super) struct CodePosition {
    pub(super) vector: usize,
    pub(super) byte: usize,
    pub(super) nibble: u32,
}

pub(super) fn code_position(column: usize, lane: usize) -> CodePosition {
    let group = column / 4;
    CodePosition { vector: group % 4, byte: lane * 4 + column % 4, nibble: if group < 4 { 0 } else { 4 } }
}
