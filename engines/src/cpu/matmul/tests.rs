//! Products compared with the arithmetic to the bit, and with f64.

use super::*;
use crate::arithmetic::{activations, products, weights};
use crate::cpu::activation::Rows;
use crate::cpu::buffer_pool::BufferPool;
use crate::cpu::kernels::{self, Operand};
use crate::cpu::pack::Source;
use crate::cpu::test_weights;
use crate::format::blocks::dequantise_row;
use crate::format::{ElementType, TensorBytes};
use proptest::prelude::*;

/// The outputs of the rows from `first` on.
fn product(tier: Tier, bits: ActivationBits, threads: usize, weights: &Packed, input: &Rows, first: usize) -> Rows {
    let rows = first..input.count();
    let mut out = Rows::zeroed(rows.len(), weights.rows);
    let mut pool = ThreadPool::new(threads).expect("threads");
    let mut products = [Product::new(weights, None, rows, &mut out.values)];
    let wanted = wanted(tier, bits, &products);
    let operand = Operand::Rows(input);
    let codes = kernels::encode(tier, &mut pool, &mut BufferPool::default(), operand, bits, wanted).expect("no panic");
    run(tier, &mut pool, &codes, &mut products).expect("no panic");
    out
}

/// Rows with a few values far above the others, as the residual streams of real models have; some rows have a value
/// that is not finite.
fn input(rows: usize, width: usize, seed: u64) -> Rows {
    let mut random = fastrand::Rng::with_seed(seed);
    let values = (0..rows * width).map(|_| {
        let outlier = if random.u8(..) == 0 { 50.0 } else { 1.0 };
        (random.f32() - 0.5) * 4.0 * outlier
    });
    let mut rows = Rows { width, values: values.collect() };
    for row in rows.values.chunks_mut(width) {
        if random.u8(..16) == 0 {
            row[random.usize(..width)] = if random.bool() { f32::INFINITY } else { f32::NAN };
        }
    }
    rows
}

/// The bits of numbers, but for what the arithmetic leaves open: the sign of a zero and the payload of a NaN.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { (value + 0.0).to_bits() }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    /// R6.1–R6.5: for every weight type, tier and precision of activations, each output has the bits of the arithmetic,
    /// in a batch on three threads as alone on one, and is close to the f64 product of the file's values.
    #[test]
    fn products_are_those_of_the_arithmetic(
        element in prop::sample::select(ElementType::ALL.to_vec()),
        rows in 1_usize..40,
        first in 0_usize..20,
        outputs in 1_usize..70,
        blocks in 1_usize..44,
        precision in prop::sample::select(ActivationBits::ALL.to_vec()),
        seed in any::<u64>(),
    ) {
        let columns = (blocks * 32).next_multiple_of(element.block_values());
        let bytes = test_weights::bytes(element, outputs, columns, seed);
        let mut pool = ThreadPool::new(1).expect("threads");
        let source = Source { element, rows: outputs, columns, bytes: &TensorBytes::Gathered(bytes.clone()) };
        let packed = Packed::pack(Tier::best(), &mut pool, &source).expect("finite weights");
        let first = first.min(rows - 1);
        let input = input(rows, columns, seed);
        let row_bytes = element.row_bytes(columns).expect("whole blocks");
        let weight_rows: Vec<_> = bytes.chunks(row_bytes).map(|row| weights::row(element, row, columns)).collect();
        let coded: Vec<_> = (first..rows).map(|row| activations::encode(precision, input.row(row))).collect();
        let expected: Vec<f32> =
            coded.iter().flat_map(|row| weight_rows.iter().map(|weights| products::dot(weights, row))).collect();
        for tier in Tier::available() {
            let together = product(tier, precision, 3, &packed, &input, first);
            prop_assert_eq!(bits(&together.values), bits(&expected), "{} {}", element, tier.name());
            let alone = Rows { width: columns, values: input.row(rows - 1).to_vec() };
            let alone = product(tier, precision, 1, &packed, &alone, 0);
            prop_assert_eq!(bits(alone.row(0)), bits(together.row(rows - 1 - first)));
        }
        let mut values = vec![0.0; columns];
        for (output, bytes) in bytes.chunks(row_bytes).enumerate() {
            dequantise_row(element, bytes, &mut values);
            let largest = values.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
            for row in (first..rows).filter(|&row| input.row(row).iter().all(|value| value.is_finite())) {
                let input = input.row(row);
                let exact: f64 = values.iter().zip(input).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                let size = input.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
                let error = (f64::from(expected[(row - first) * outputs + output]) - exact).abs();
                let precision = if precision == ActivationBits::Eight { 0.1 } else { 1e-3 };
                let bound = precision * f64::from(largest) * size;
                prop_assert!(error <= bound, "{element}: off by {error}, bound {bound}");
            }
        }
    }
}

/// The largest sums of a block: every code the least or the greatest, and every byte of activations −128 or 127.
#[test]
fn extreme_codes_and_bytes_overflow_no_sum() {
    let columns = 512;
    for element in ElementType::ALL.into_iter().filter(|&element| weights::Rule::of(element).is_some()) {
        // 128 is 256 − 128, and −32,512 is 256 · −127.
        let codes = [-128.0, 127.0, 128.0, -32_512.0];
        for (fill, code) in [0x00, 0xff].into_iter().flat_map(|fill| codes.map(|code| (fill, code))) {
            // Random scales, but only codes that are equal.
            let row_bytes = element.row_bytes(columns).expect("whole blocks");
            let mut bytes = test_weights::bytes(element, 16, columns, 1);
            let equal = vec![fill; row_bytes];
            for row in bytes.chunks_mut(row_bytes) {
                for (block, equal) in row.chunks_mut(element.block_bytes()).zip(equal.chunks(element.block_bytes())) {
                    set_codes(element, block, equal);
                }
            }
            // The largest magnitude is in the second block, so that the others have codes of one byte pattern.
            let mut input = Rows { width: columns, values: vec![code; columns] };
            for superblock in input.values.chunks_mut(256) {
                superblock[40] = activations::CODE_MAX;
            }
            let mut pool = ThreadPool::new(1).expect("threads");
            let source = Source { element, rows: 16, columns, bytes: &TensorBytes::Gathered(bytes.clone()) };
            let packed = Packed::pack(Tier::best(), &mut pool, &source).expect("finite weights");
            for precision in ActivationBits::ALL {
                let coded = activations::encode(precision, input.row(0));
                let dot = |row| products::dot(&weights::row(element, row, columns), &coded);
                let expected: Vec<f32> = bytes.chunks(row_bytes).map(dot).collect();
                for tier in Tier::available() {
                    let got = product(tier, precision, 1, &packed, &input, 0);
                    assert_eq!(bits(&got.values), bits(&expected), "{element} {} {fill} {code}", tier.name());
                }
            }
        }
    }
}

/// Replaces the codes of a block of the file, but not its scales and minima.
fn set_codes(element: ElementType, block: &mut [u8], codes: &[u8]) {
    let range = match element {
        ElementType::Q4_0 | ElementType::Q5_0 | ElementType::Q8_0 | ElementType::IQ4_NL => 2..block.len(),
        ElementType::Q4_1 | ElementType::Q5_1 => 4..block.len(),
        ElementType::Q2_K => 16..80,
        ElementType::Q3_K => 0..96,
        ElementType::Q4_K | ElementType::Q5_K => 16..block.len(),
        ElementType::Q6_K => 0..192,
        ElementType::IQ4_XS => 8..block.len(),
        ElementType::MXFP4 => 1..block.len(),
        ElementType::F32 | ElementType::F16 | ElementType::BF16 => unreachable!("dense floats have no codes"),
    };
    block[range.clone()].copy_from_slice(&codes[range]);
}
