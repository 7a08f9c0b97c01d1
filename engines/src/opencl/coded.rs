//! Rows of weights in the layout of the kernels: `kernels/products.cl` describes it.
//!
//! Codes are packed as tightly as in the file; scales and minima have 16 bits, and dense numbers become 16-bit
//! integers.

use crate::arithmetic::weights::{Rule, Superblock, dense, superblock};
use crate::arithmetic::{SUPERBLOCK, superblocks};
use crate::format::ElementType;
use crate::format::blocks::{BLOCK, Coding, dequantise_row};

/// The coding of weights, as the kernels know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Coded(ElementType);

impl Coded {
    pub(super) fn new(element: ElementType) -> Self {
        // All dense types become the same integers.
        Self(if Coding::of(element).is_none() { ElementType::F32 } else { element })
    }

    /// The type of the weights; that of dense numbers is `F32`.
    pub(super) fn element(self) -> ElementType {
        self.0
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
    pub(super) fn row_bytes(self, columns: usize) -> usize {
        let blocks = columns.div_ceil(BLOCK);
        let scales = Coding::of(self.0).map_or(0, |coding| 2 * halves(coding) * (1 + usize::from(coding.has_mins)));
        let codes = Coding::of(self.0).map_or(2 * BLOCK, |coding| coding.bits as usize * BLOCK / 8);
        (4 * superblocks(columns) + blocks * (scales + codes)).next_multiple_of(4)
    }

    /// Appends `rows` to `out`. Returns the first row in which a scale or a value is not finite.
    pub(super) fn pack_rows<'a>(
        self,
        rows: impl Iterator<Item = &'a [u8]>,
        element: ElementType,
        columns: usize,
        out: &mut Vec<u8>,
    ) -> Option<usize> {
        rows.enumerate().find_map(|(row, bytes)| (!self.pack(bytes, element, columns, out)).then_some(row))
    }

    /// Appends a row to `out`. Returns false if a scale or a value of the row is not finite.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The code of column `i`, as `weight_of` in `products.cl` reads it.
    fn unpacked(bits: u32, packed: &[u8], i: usize) -> u8 {
        let nibble = || packed[i % 16] >> (4 * (i / 16)) & 15;
        let pair = |packed: &[u8]| packed[i % 8] >> (2 * (i / 8)) & 3;
        let single = |packed: &[u8]| packed[i / 8] >> (i % 8) & 1;
        match bits {
            2 => pair(packed),
            3 => pair(packed) | single(&packed[8..]) << 2,
            4 => nibble(),
            5 => nibble() | single(&packed[16..]) << 4,
            6 => nibble() | pair(&packed[16..]) << 4,
            _ => packed[i],
        }
    }

    #[test]
    fn packed_codes_are_read_again() {
        for (bits, bytes) in [(2, 8), (3, 12), (4, 16), (5, 20), (6, 24), (8, 32)] {
            let codes: [u8; BLOCK] = std::array::from_fn(|i| (i * 37 % (1 << bits)) as u8);
            let mut packed = Vec::new();
            pack_codes(bits, &codes, &mut packed);
            assert_eq!(packed.len(), bytes, "{bits} bits");
            let read: Vec<u8> = (0..BLOCK).map(|i| unpacked(bits, &packed, i)).collect();
            assert_eq!(read, codes, "{bits} bits");
        }
    }
}
