//! Weights in tiles of 32 rows and 256 columns, in the order of the operands of instructions that multiply matrices:
//! `kernels/tiles.cl` describes it.

use super::coded::Coded;
use crate::arithmetic::weights::{Rule, Superblock, dense, superblock};
use crate::arithmetic::{SUPERBLOCK, superblocks};
use crate::format::ElementType;
use crate::format::blocks::{BLOCK, Coding, dequantise_row};

/// Rows of a panel, whose tiles follow each other.
pub(super) const PANEL_ROWS: usize = 32;
/// Lanes that hold a tile together.
pub(super) const LANES: usize = 32;
/// Bytes that a lane reads at once.
const UNIT_BYTES: usize = 16;
/// Blocks of a superblock.
const BLOCKS: usize = SUPERBLOCK / BLOCK;

/// The layout of a tile of weights of one type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileLayout {
    bits: usize,
    /// Scales of a block: 1 or 2; 0 for dense weights.
    scales: usize,
    has_mins: bool,
    /// Whether scales have 8 bits, without `shift`.
    has_byte_scales: bool,
    shift: u32,
}

impl TileLayout {
    pub(super) fn of(coded: Coded) -> Self {
        let (Some(coding), Some(rule)) = (Coding::of(coded.element()), Rule::of(coded.element())) else {
            return Self { bits: 16, scales: 0, has_mins: false, has_byte_scales: false, shift: 0 };
        };
        let (has_byte_scales, shift) = match rule {
            Rule::Product { byte_scales: true, shift } => (true, shift),
            Rule::Product { .. } | Rule::Rounded => (false, 0),
        };
        let scales = if coding.split { 2 } else { 1 };
        Self { bits: coding.bits as usize, scales, has_mins: coding.has_mins, has_byte_scales, shift }
    }

    /// The definitions that `tiles.cl` asks for, beside those of `products.cl`.
    pub(super) fn defines(self) -> String {
        format!("-DBYTE_SCALES={} -DSHIFT={}", u8::from(self.has_byte_scales), self.shift)
    }

    fn chunk_blocks(self) -> usize {
        if self.bits >= 8 { 2 } else { 4 }
    }

    fn chunks(self) -> usize {
        BLOCKS / self.chunk_blocks()
    }

    fn nibble_units(self) -> usize {
        if matches!(self.bits, 4..=6) { 4 } else { 0 }
    }

    fn pair_units(self) -> usize {
        if matches!(self.bits, 2 | 3 | 6) { 2 } else { 0 }
    }

    /// Units of a lane in a chunk.
    fn code_units(self) -> usize {
        match self.bits {
            8 => 4,
            16 => 8,
            bits => self.nibble_units() + self.pair_units() + usize::from(matches!(bits, 3 | 5)),
        }
    }

    fn scales_at(self) -> usize {
        self.chunks() * self.code_units() * LANES * UNIT_BYTES
    }

    fn mins_at(self) -> usize {
        let scale_bytes = if self.has_byte_scales { 1 } else { 2 };
        self.scales_at() + BLOCKS * self.scales * PANEL_ROWS * scale_bytes
    }

    fn units_at(self) -> usize {
        self.mins_at() + if self.has_mins { BLOCKS * self.scales * PANEL_ROWS * 2 } else { 0 }
    }

    /// The bytes of a tile.
    pub(super) fn tile_bytes(self) -> usize {
        self.units_at() + PANEL_ROWS * size_of::<f32>()
    }

    /// The bytes of a matrix.
    pub(super) fn matrix_bytes(self, rows: usize, columns: usize) -> usize {
        let tiles = rows.div_ceil(PANEL_ROWS).saturating_mul(superblocks(columns));
        tiles.saturating_mul(self.tile_bytes())
    }

    /// Where a lane's word `word` of unit `unit` of chunk `k` is.
    fn word_at(self, k: usize, unit: usize, lane: usize, word: usize) -> usize {
        ((k * self.code_units() + unit) * LANES + lane) * UNIT_BYTES + 4 * word
    }

    /// Where the scale or minimum `part` of a block is, counted in values of which `per_unit` are in a unit.
    fn value_at(self, block: usize, part: usize, row: usize, per_unit: usize) -> usize {
        let value = (block * self.scales + part) * 4 + row / 8;
        (value / per_unit * 8 + row % 8) * per_unit + value % per_unit
    }

    /// Puts the codes of four columns into a tile: those from `16 part + 4 t` on of a block of `row`.
    fn put_codes(self, tile: &mut [u8], (row, block): (usize, usize), (part, t): (usize, usize), codes: u32) {
        let (j, lane) = (row / 8, row % 8 * 4 + t);
        let (k, b) = (block / self.chunk_blocks(), block % self.chunk_blocks());
        let mut put = |unit: usize, word: usize, bits: u32| {
            let at = self.word_at(k, unit, lane, word);
            let bytes = bits.to_le_bytes();
            tile[at..at + 4].iter_mut().zip(bytes).for_each(|(byte, bits)| *byte |= bits);
        };
        if self.bits == 8 {
            return put(2 * b + part, j, codes);
        }
        let nibbles = self.nibble_units();
        if nibbles > 0 {
            put(b, j, (codes & 0x0f0f_0f0f) << (4 * part));
        }
        if self.pair_units() > 0 {
            put(nibbles + b / 2, b % 2 * 2 + j / 2, (codes >> nibbles & 0x0303_0303) << (4 * (j % 2) + 2 * part));
        }
        if matches!(self.bits, 3 | 5) {
            let unit = nibbles + self.pair_units();
            put(unit, b, (codes >> (self.bits - 1) & 0x0101_0101) << (2 * j + part));
        }
    }

    /// Puts four dense weights into a tile: their upper and their lower bytes.
    fn put_dense(self, tile: &mut [u8], (row, block): (usize, usize), (part, t): (usize, usize), weights: [i16; 4]) {
        let (j, lane) = (row / 8, row % 8 * 4 + t);
        let (k, b) = (block / self.chunk_blocks(), block % self.chunk_blocks());
        let upper = self.word_at(k, 4 * b + part, lane, j);
        let lower = self.word_at(k, 4 * b + 2 + part, lane, j);
        for (i, weight) in weights.into_iter().enumerate() {
            let (high, low) = crate::arithmetic::activations::bytes(weight);
            tile[upper + i] = high.cast_unsigned();
            tile[lower + i] = low.cast_unsigned();
        }
    }

    fn put_unit(self, tile: &mut [u8], row: usize, unit: f32) {
        let at = self.units_at() + (row % 8 * 4 + row / 8) * size_of::<f32>();
        tile[at..at + size_of::<f32>()].copy_from_slice(&unit.to_ne_bytes());
    }

    /// Puts a row of a quantised superblock into a tile of zeros.
    fn put_superblock(self, tile: &mut [u8], row: usize, superblock: &Superblock) {
        for (number, block) in superblock.blocks().iter().enumerate() {
            let (words, _) = block.codes.as_chunks::<4>();
            for (index, &codes) in words.iter().enumerate() {
                self.put_codes(tile, (row, number), (index / 4, index % 4), u32::from_le_bytes(codes));
            }
            for part in 0..self.scales {
                let scale = block.scales[part];
                if self.has_byte_scales {
                    let at = self.scales_at() + self.value_at(number, part, row, UNIT_BYTES);
                    tile[at] = (scale >> self.shift) as u8;
                } else {
                    let at = self.scales_at() + 2 * self.value_at(number, part, row, UNIT_BYTES / 2);
                    tile[at..at + 2].copy_from_slice(&scale.to_ne_bytes());
                }
                if self.has_mins {
                    let at = self.mins_at() + 2 * self.value_at(number, part, row, UNIT_BYTES / 2);
                    tile[at..at + 2].copy_from_slice(&block.mins[part].to_ne_bytes());
                }
            }
        }
        self.put_unit(tile, row, superblock.unit);
    }

    /// Packs a panel into `tiles`, which are zeros. `rows` are its rows as in the file, at most 32, each of `element`.
    /// Returns the first row in which a scale or a value is not finite.
    pub(super) fn pack<'a>(
        self,
        tiles: &mut [u8],
        rows: impl Iterator<Item = &'a [u8]>,
        element: ElementType,
        columns: usize,
    ) -> Option<usize> {
        let mut broken = None;
        for (row, bytes) in rows.enumerate() {
            let is_finite = match Coding::of(element) {
                Some(_) => tiles.chunks_exact_mut(self.tile_bytes()).enumerate().all(|(index, tile)| {
                    let superblock = superblock(element, bytes, columns, index);
                    self.put_superblock(tile, row, &superblock);
                    superblock.unit.is_finite()
                }),
                None => self.pack_dense(tiles, row, bytes, element, columns),
            };
            broken = broken.or((!is_finite).then_some(row));
        }
        broken
    }

    fn pack_dense(self, tiles: &mut [u8], row: usize, bytes: &[u8], element: ElementType, columns: usize) -> bool {
        let mut values = vec![0.0; columns];
        dequantise_row(element, bytes, &mut values);
        values.chunks(SUPERBLOCK).zip(tiles.chunks_exact_mut(self.tile_bytes())).all(|(values, tile)| {
            let mut codes = [0_i16; SUPERBLOCK];
            let unit = dense(values, &mut codes);
            let (words, _) = codes.as_chunks::<4>();
            for (index, &weights) in words.iter().enumerate() {
                self.put_dense(tile, (row, index / 8), (index % 8 / 4, index % 4), weights);
            }
            self.put_unit(tile, row, unit);
            unit.is_finite()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes that `tiles.cl` computes.
    #[test]
    fn tiles_have_the_sizes_of_the_kernels() {
        let bytes = |element| TileLayout::of(Coded::new(element)).tile_bytes();
        assert_eq!(bytes(ElementType::Q4_0), 8 * 512 + 512 + 128);
        assert_eq!(bytes(ElementType::Q4_K), 8 * 512 + 256 + 512 + 128);
        assert_eq!(bytes(ElementType::Q6_K), 8 * 768 + 512 + 128);
        assert_eq!(bytes(ElementType::Q2_K), 8 * 256 + 512 + 1024 + 128);
        assert_eq!(bytes(ElementType::Q8_0), 8 * 1024 + 512 + 128);
        assert_eq!(bytes(ElementType::F16), 8 * 2048 + 128);
        let layout = TileLayout::of(Coded::new(ElementType::Q4_0));
        assert_eq!(layout.matrix_bytes(33, 257), 2 * 2 * layout.tile_bytes());
    }
}
