//! Whether a device computes products of its tier right: a driver's compiler may not.

use super::listing::Found;
use super::rows::OpenClBackend;
use super::tier::Tier;
use super::weights::Matrices;
use crate::arithmetic::weights::WeightRow;
use crate::arithmetic::{activations, products, weights};
use crate::backend::{Backend, LinearData, MatrixShape, TensorData};
use crate::engine::ActivationBits;
use crate::error::EngineError;
use crate::format::{ElementType, TensorBytes};

/// The shape of the products: several panels, and several chains for each warp.
const OUTPUTS: usize = 71;
const COLUMNS: usize = 4352;
/// One row, and more than are computed at once.
const ROWS: [usize; 2] = [1, 21];
/// Each way to compute with weights: minima, two scales for each block, rounding and a table, two bytes.
const ELEMENTS: [ElementType; 4] = [ElementType::Q4_K, ElementType::Q6_K, ElementType::IQ4_NL, ElementType::F16];

/// Opens a device with its tier, or with the portable one if the tier's products do not compile or are wrong.
pub(super) fn open(found: Found) -> Result<OpenClBackend, EngineError> {
    open_if(found, |backend| ELEMENTS.iter().try_fold(true, |exact, &element| Ok(exact && is_exact(backend, element)?)))
}

fn open_if(
    found: Found,
    is_exact: impl FnOnce(&mut OpenClBackend) -> Result<bool, EngineError>,
) -> Result<OpenClBackend, EngineError> {
    let mut backend = OpenClBackend::new(&found)?;
    if found.tier == Tier::Portable {
        return Ok(backend);
    }
    let (device, tier) = (found.report.id.to_string(), found.tier.name());
    match is_exact(&mut backend) {
        Ok(true) => return Ok(backend),
        Ok(false) => {
            tracing::warn!(device, tier, "its products are wrong: the portable kernels compute in their place")
        }
        Err(error @ EngineError::Device { .. }) => {
            tracing::warn!(device, tier, %error, "its kernels fail: the portable ones compute in their place");
            // After a failure any call may hang, also one that releases.
            std::mem::forget(backend);
        }
        Err(error) => return Err(error),
    }
    OpenClBackend::new(&found.with_tier(Tier::Portable))
}

/// Whether products with weights of a type have the bits of the arithmetic.
fn is_exact(backend: &mut OpenClBackend, element: ElementType) -> Result<bool, EngineError> {
    let rows: Vec<Vec<u8>> = (0..OUTPUTS).map(|output| weight_row(element, output)).collect();
    let shape = MatrixShape { element, rows: OUTPUTS, columns: COLUMNS };
    let bytes = TensorBytes::Gathered(rows.concat());
    let weight = TensorData { name: "a test of exactness", element, rows: OUTPUTS, columns: COLUMNS, bytes };
    let mut parts = std::iter::once(Ok(LinearData { weight, bias: None }));
    let matrices = Matrices::all((&backend.queue, backend.tier), &[shape], &mut parts)?;
    let weights: Vec<WeightRow> = rows.iter().map(|row| weights::row(element, row, COLUMNS)).collect();
    for count in ROWS {
        let values: Vec<f32> = (0..count * COLUMNS).map(|i| (i * 7919 % 1009) as f32 / 100.0 - 5.0).collect();
        let input = backend.upload(values.clone(), COLUMNS)?;
        let codes = backend.encode(&input)?;
        let out = backend.product(&matrices, 0, &codes)?;
        let got = backend.download(out)?;
        let inputs = values.chunks(COLUMNS).map(|values| activations::encode(ActivationBits::Sixteen, values));
        let expected: Vec<f32> =
            inputs.flat_map(|input| weights.iter().map(move |weights| products::dot(weights, &input))).collect();
        if !are_equal(&got, &expected) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether numbers are equal to the bit.
fn are_equal(got: &[f32], expected: &[f32]) -> bool {
    got.len() == expected.len() && got.iter().zip(expected).all(|(got, expected)| got.to_bits() == expected.to_bits())
}

/// The weights of an output, which differ from those of others.
fn weight_row(element: ElementType, output: usize) -> Vec<u8> {
    let length = element.row_bytes(COLUMNS).unwrap_or(0);
    let mut row: Vec<u8> = (0..length).map(|i| ((i + 13 * output) * 37 % 251) as u8).collect();
    // Floats of half precision, from 1/32 on, where a block has floats.
    let half = (0x2800 + 16 * (output as u16 % 64)).to_le_bytes();
    for block in row.chunks_exact_mut(element.block_bytes()) {
        let floats = match element {
            ElementType::Q4_K => 0..4,
            ElementType::Q6_K => block.len() - 2..block.len(),
            ElementType::IQ4_NL => 0..2,
            // Any numbers but infinity.
            _ => {
                block[1] &= 0x3f;
                continue;
            }
        };
        block[floats].chunks_exact_mut(2).for_each(|float| float.copy_from_slice(&half));
    }
    row
}

#[cfg(test)]
mod tests {
    use super::super::listing::{Family, find};
    use super::super::tier::MatrixUnit;
    use super::*;
    use crate::error::DeviceFault;
    use std::collections::BTreeSet;

    /// Devices with a tier that is not the portable one.
    fn devices() -> Vec<Found> {
        let found = [Family::Intel, Family::OtherGpus, Family::CpuRuntimes].into_iter().flat_map(find);
        let with_matrices = |found: Found| match found.tier {
            Tier::Portable => found.with_tier(Tier::Matrix(MatrixUnit::Emulated)),
            Tier::Matrix(_) => found,
        };
        found.map(with_matrices).collect()
    }

    /// R1.4, R6.1–R6.5: a tier that computes right is used.
    #[test]
    fn a_tier_that_computes_right_is_used() {
        for found in devices() {
            let wanted = found.tier;
            assert_eq!(open(found).expect("it opens").tier, wanted);
        }
    }

    /// R1.4: a tier that computes wrong numbers or does not compile is not used, and the device still computes; without
    /// memory it does not open.
    #[test]
    fn a_tier_that_computes_wrong_is_not_used() {
        for found in devices() {
            let device = found.report.id.0.clone();
            let compiler = EngineError::Device { device, fault: DeviceFault::Compile, what: "planned".to_owned() };
            for outcome in [Ok(false), Err(compiler)] {
                let opened = open_if(found.clone(), |_| outcome).expect("it opens");
                assert_eq!(opened.tier, Tier::Portable);
            }
            let full = EngineError::OutOfMemory { what: "planned".to_owned(), needed_bytes: 2, free_bytes: 1 };
            assert_eq!(open_if(found, |_| Err(full.clone())).err(), Some(full));
        }
    }

    #[test]
    fn one_wrong_bit_is_found() {
        let right = [1.0, -2.5, 1e-40];
        assert!(are_equal(&right, &right));
        assert!(!are_equal(&right[..2], &right));
        assert!(!are_equal(&[1.0, -2.5, f32::from_bits(right[2].to_bits() + 1)], &right));
    }

    /// The products of the test are finite and differ.
    #[test]
    fn outputs_have_weights_of_their_own() {
        for element in ELEMENTS {
            let row = |output| weights::row(element, &weight_row(element, output), COLUMNS);
            let rows: Vec<WeightRow> = (0..OUTPUTS).map(row).collect();
            assert!(rows.iter().flat_map(|row| &row.units).all(|unit| unit.is_finite()), "{element}");
            let input = activations::encode(ActivationBits::Sixteen, &vec![1.0; COLUMNS]);
            let sums: BTreeSet<u32> = rows.iter().map(|row| products::dot(row, &input).to_bits()).collect();
            assert!(sums.len() > OUTPUTS * 9 / 10, "{element}: {}", sums.len());
        }
    }
}
