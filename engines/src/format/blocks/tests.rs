//! Blocks compared with the values that ggml reads from them.

use super::*;
use std::path::Path;

const ROWS: usize = 4;
const COLUMNS: usize = 512;

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blocks").join(name);
    std::fs::read(path).expect("the fixture that make.c writes")
}

fn floats(name: &str) -> Vec<f32> {
    fixture(name).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Root mean square of `a` − `b`, relative to that of `b`.
fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut b.iter().copied())).sqrt()
}

/// R4.3: every quantised type dequantises to the values that ggml reads from the same blocks, within f32 rounding.
#[test]
fn every_type_dequantises_as_ggml_does() {
    let source = floats("values.f32");
    for element in ElementType::ALL.into_iter().filter(|element| element.is_quantised()) {
        let bytes = fixture(&format!("{element}.blocks"));
        let row_bytes = element.row_bytes(COLUMNS).expect("512 values are whole blocks");
        assert_eq!(bytes.len(), ROWS * row_bytes, "{element}");
        let mut got = vec![0.0; ROWS * COLUMNS];
        for (row, out) in bytes.chunks(row_bytes).zip(got.chunks_mut(COLUMNS)) {
            dequantise_row(element, row, out);
        }
        let expected = floats(&format!("{element}.f32"));
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let close = (got - expected).abs() <= 2e-7 * expected.abs().max(0.02);
            assert!(close, "{element}[{i}]: {got}, ggml has {expected}");
        }
        let error = relative_error(&got, &source);
        println!("{element:8} {:5.2} bits, error {error:.5}", row_bytes as f32 * 8.0 / COLUMNS as f32);
        assert!(error < 0.4, "{element}: {error}");
    }
}

#[test]
fn every_float_of_16_bits_has_its_value() {
    for bits in 0..=u16::MAX {
        let (got, expected) = (f16_value(bits), half::f16::from_bits(bits).to_f32());
        assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{bits:#x}: {got}");
    }
}

#[test]
fn an_mxfp4_exponent_of_255_decodes_to_nan() {
    let block = decode(ElementType::MXFP4, &[255; 17], 0);
    assert!(block.scales[0].is_nan());
    assert_eq!(decode(ElementType::MXFP4, &[0; 17], 0).scales[0], 2_f32.powi(-128));
    assert_eq!(decode(ElementType::MXFP4, &[128; 17], 0).scales[0], 1.0);
}
