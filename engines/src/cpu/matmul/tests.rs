//! Products compared with f64, and rows computed alone compared with the same rows in a batch.

use super::*;
use crate::cpu::activation::CodedRowMut;
use crate::cpu::pack::Source;
use crate::cpu::test_weights;
use crate::format::TensorBytes;
use proptest::prelude::*;

struct Encode<'a> {
    rows: &'a Rows,
    coded: &'a mut CodedRows,
}

impl Kernel for Encode<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let blocks = self.rows.width / BLOCK;
        for row in 0..self.rows.count() {
            let mut target = CodedRowMut {
                codes: &mut self.coded.codes[row * blocks * BLOCK_CODES..][..blocks * BLOCK_CODES],
                scales: &mut self.coded.scales[row * blocks..][..blocks],
                half_sums: &mut self.coded.half_sums[row * blocks * 2..][..blocks * 2],
                weighted_sums: &mut self.coded.weighted_sums[row * blocks..][..blocks],
            };
            target.encode(self.rows.row(row));
        }
    }
}

fn product(tier: Tier, threads: usize, weights: &Packed, input: &Rows) -> Rows {
    let mut codes = CodedRows::zeroed(input.count(), input.width);
    if weights.is_coded() {
        tier.run(Encode { rows: input, coded: &mut codes });
    }
    let mut out = Rows::zeroed(input.count(), weights.rows);
    let mut pool = ThreadPool::new(threads).expect("threads");
    let operand = Operand { floats: input, codes: Some(&codes) };
    let mut products = [Product { weights, bias: None, rows: 0..input.count(), out: &mut out.values }];
    run(tier, &mut pool, &operand, &mut products).expect("no panic");
    out
}

fn input(rows: usize, width: usize) -> Rows {
    Rows { width, values: (0..rows * width).map(|i| (i as f32 * 0.7311).sin() * 2.0).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// R6.1–R6.5: for every weight type and tier, the product is close to the f64 product of the dequantised values,
    /// and a row has the same bits alone on one thread as in a batch on three threads.
    #[test]
    fn products_are_accurate_and_row_independent(
        element in prop::sample::select(ElementType::ALL.to_vec()),
        rows in 1_usize..20,
        outputs in 1_usize..70,
        seed in any::<u64>(),
    ) {
        let columns = 512;
        let bytes = test_weights::bytes(element, outputs, columns, seed);
        let mut pool = ThreadPool::new(1).expect("threads");
        let source = Source { element, rows: outputs, columns, bytes: &TensorBytes::Gathered(bytes) };
        let weights = Packed::pack(&mut pool, &source).expect("finite weights");
        let input = input(rows, columns);
        for tier in Tier::available() {
            let together = product(tier, 3, &weights, &input);
            for row in 0..rows {
                let alone = Rows { width: columns, values: input.row(row).to_vec() };
                let alone = product(tier, 1, &weights, &alone);
                prop_assert_eq!(alone.row(0), together.row(row));
            }
            let mut values = vec![0.0; columns];
            for output in 0..outputs {
                weights.read_row(output, &mut values);
                for row in 0..rows {
                    let terms = values.iter().zip(input.row(row)).map(|(&a, &b)| f64::from(a) * f64::from(b));
                    let (exact, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t * t));
                    let error = (f64::from(together.row(row)[output]) - exact).abs();
                    let bound = 5e-4 * size.sqrt().max(0.1);
                    prop_assert!(error <= bound, "{element} {}: off by {error}, bound {bound}", tier.name());
                }
            }
        }
    }
}
