//! The OpenCL engine on every OpenCL device of this machine, runtimes for the CPU included.
//!
//! Without a device the tests say so and test nothing. The environment variable `OCL_ICD_VENDORS` chooses the runtimes.

use crate::golden::{expected_bits, hash};
use crate::pipeline::Pipeline;
use crate::{all_fixtures, fixture};
use exo_engines::EngineError;
use exo_engines::engine::{ActivationBits, DeviceId, DeviceReport, Engine, EngineFactory, KvElement};
use exo_engines::opencl::OpenClFactory;
use exo_engines::reference::ReferenceFactory;

/// A factory with one of the devices.
#[derive(Debug)]
struct One(OpenClFactory, DeviceReport);

impl EngineFactory for One {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn probe(&self) -> Vec<DeviceReport> {
        vec![self.1.clone()]
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        self.0.open(device)
    }
}

fn devices() -> Vec<One> {
    let of = |factory: OpenClFactory| factory.probe().into_iter().map(move |report| One(factory, report));
    let factories = [
        OpenClFactory::intel(),
        OpenClFactory::other_gpus(),
        OpenClFactory::cpu_runtimes(),
        OpenClFactory::emulated_matrices(),
    ];
    let devices: Vec<One> = factories.into_iter().flat_map(of).collect();
    if devices.is_empty() {
        println!("SKIPPED: there is no OpenCL device here, so the OpenCL engine was not tested");
    }
    devices
}

/// R3.1–R3.5, R4.3, R6.1–R6.5: the logits of every family have the bits of the CPU engine.
#[test]
fn families_have_the_bits_of_the_arithmetic_on_every_device() {
    let expected = expected_bits();
    for device in devices() {
        for fixture in all_fixtures() {
            let mut pipeline =
                Pipeline::with_precision(&fixture.model, &device, 1, KvElement::F16, ActivationBits::Sixteen);
            let rows = pipeline.logits(&fixture.expected.prompt, fixture.expected.prompt.len());
            let got = hash(&rows[rows.len() - 1]);
            println!("{:18} {}: {got}", fixture.name, device.1.name);
            assert_eq!(got, expected[&fixture.name], "{} on {:?}", fixture.name, device.1);
        }
    }
}

/// R4.2, R6.1–R6.5: so they do in shards and chunks, with every type of cache and of activations.
#[test]
fn shards_chunks_and_caches_have_the_bits_of_the_arithmetic() {
    for device in devices() {
        for (index, name) in ["llama", "gemma2", "qwen3_moe", "gpt_oss_mxfp4"].into_iter().enumerate() {
            let fixture = fixture(name);
            let prompt = &fixture.expected.prompt;
            for (kv, bits) in [
                (KvElement::F32, ActivationBits::Sixteen),
                (KvElement::Q8_0, ActivationBits::Sixteen),
                (KvElement::F16, ActivationBits::Eight),
            ] {
                let mut alone = Pipeline::with_precision(&fixture.model, &ReferenceFactory, 1, kv, bits);
                let mut split = Pipeline::with_precision(&fixture.model, &device, 2, kv, bits);
                let expected = alone.logits(prompt, prompt.len());
                let got = split.logits(prompt, 5 + index);
                assert_eq!(got.len(), expected.len());
                for (row, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    assert_eq!(hash(got), hash(expected), "{name} {kv:?} {bits:?}, row {row}, on {:?}", device.1);
                }
            }
        }
    }
}

/// R6.1–R6.5: attention over several chunks of positions has the bits of the arithmetic, too.
#[test]
fn long_contexts_have_the_bits_of_the_arithmetic() {
    for device in devices() {
        let fixture = fixture("llama");
        let tokens: Vec<u32> = fixture.expected.prompt.iter().copied().cycle().take(300).collect();
        let (kv, bits) = (KvElement::F16, ActivationBits::Sixteen);
        let mut alone = Pipeline::with_precision(&fixture.model, &ReferenceFactory, 1, kv, bits);
        let mut many = Pipeline::with_precision(&fixture.model, &device, 1, kv, bits);
        let (expected, got) = (alone.logits(&tokens, 150), many.logits(&tokens, 150));
        for (row, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(hash(got), hash(expected), "row {row}, on {:?}", device.1);
        }
    }
}
