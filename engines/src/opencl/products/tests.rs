//! Products with weights of every type, compared with the arithmetic to the bit.

use super::super::listing::{Family, find};
use super::super::tier::{MatrixUnit, Tier};
use super::*;
use crate::arithmetic::{activations, products, weights};
use crate::backend::{Backend, LinearData, MatrixShape, TensorData};
use crate::cpu::test_weights;
use crate::format::{ElementType, TensorBytes};

/// The backends of all OpenCL devices here. Without any, the tests say so and test nothing.
fn backends() -> Vec<OpenClBackend> {
    let mut found: Vec<_> =
        [Family::Intel, Family::OtherGpus, Family::CpuRuntimes].into_iter().flat_map(find).collect();
    // Each device with each tier that it can have.
    let others: Vec<_> = found
        .iter()
        .cloned()
        .map(|found| match found.tier {
            Tier::Portable => found.with_tier(Tier::Matrix(MatrixUnit::Emulated)),
            Tier::Matrix(_) => found.with_tier(Tier::Portable),
        })
        .collect();
    found.extend(others);
    if found.is_empty() {
        println!("SKIPPED: there is no OpenCL device here, so nothing was tested");
    }
    found.iter().map(|found| OpenClBackend::new(found).expect("the device opens")).collect()
}

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| random.f32() * 8.0 - 4.0).collect()
}

/// R4.3, R6.1–R6.5: for every type of weights, number of rows and width, products have the bits of the arithmetic.
#[test]
fn products_have_the_bits_of_the_arithmetic() {
    for mut backend in backends() {
        // Each tile is a launch of its own.
        backend.queue.launch_work_max = 1;
        for element in ElementType::ALL {
            for (rows, columns) in [(1, 256_usize), (3, 1280), (9, 416), (2, 603), (5, 2400)] {
                let columns = columns.next_multiple_of(element.block_values());
                for bits in ActivationBits::ALL {
                    check(&mut backend, element, (rows, columns), bits);
                }
            }
            // Several launches of 16 rows, and several chains for each warp.
            check(&mut backend, element, (21, 4352), ActivationBits::Sixteen);
            println!("{element}: exact, {} on {}", backend.tier.name(), backend.queue.device());
        }
    }
}

fn check(backend: &mut OpenClBackend, element: ElementType, (rows, columns): (usize, usize), bits: ActivationBits) {
    // Several panels, the last one not full.
    const OUTPUTS: usize = 71;
    let bytes = |seed| test_weights::bytes(element, OUTPUTS, columns, seed);
    let data = |seed| {
        let bytes = TensorBytes::Gathered(bytes(seed));
        let weight = TensorData { name: "w", element, rows: OUTPUTS, columns, bytes };
        LinearData { weight, bias: Some(random(OUTPUTS, seed)) }
    };
    let shape = MatrixShape { element, rows: OUTPUTS, columns };
    let mut parts = [Ok(data(5)), Ok(data(6))].into_iter();
    let matrices = backend.linears(&[shape, shape], &mut parts).expect("loaded");
    let values = random(rows * columns, 3);
    backend.set_activations(bits).expect("it has them");
    let input = backend.upload(values.clone(), columns).expect("uploaded");
    let codes = backend.encode(&input).expect("encoded");
    let out = backend.product(&matrices, 1, &codes).expect("multiplied");
    let got = backend.download(out).expect("read");
    let (bytes, bias) = (bytes(6), random(OUTPUTS, 6));
    let row_bytes = bytes.len() / OUTPUTS;
    for (row, values) in values.chunks(columns).enumerate() {
        let input = activations::encode(bits, values);
        for (output, bias) in bias.iter().enumerate() {
            let weights = weights::row(element, &bytes[output * row_bytes..(output + 1) * row_bytes], columns);
            let expected = products::dot(&weights, &input) + bias;
            let got = got[row * OUTPUTS + output];
            assert_eq!(
                got.to_bits(),
                expected.to_bits(),
                "{element} {bits:?}, row {row}, output {output}: {got} {expected}"
            );
        }
    }
}
