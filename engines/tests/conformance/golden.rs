//! R6.1–R6.5: the bits of each family's logits. They change only with [`exo_engines::arithmetic::VERSION`].

use crate::all_fixtures;
use crate::pipeline::Pipeline;
use exo_engines::arithmetic::VERSION;
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::{ActivationBits, KvElement};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The file `fixtures/golden.json`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Golden {
    version: u32,
    /// The hash of the last row's logits, by fixture.
    logits: BTreeMap<String, String>,
}

/// FNV-1a over the numbers' bits. The sign of a zero does not count: the arithmetic does not specify it.
pub(crate) fn hash(logits: &[f32]) -> String {
    let bytes = logits.iter().flat_map(|&logit| (logit + 0.0).to_bits().to_le_bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// The hash of the last row's logits, by fixture.
pub(crate) fn expected_bits() -> BTreeMap<String, String> {
    let golden: Golden =
        serde_json::from_str(include_str!("../fixtures/golden.json")).expect("as the test of the bits prints it");
    assert_eq!(golden.version, VERSION, "the file is of another version");
    golden.logits
}

#[test]
fn the_bits_are_those_of_this_version() {
    let logits = all_fixtures().into_iter().map(|fixture| {
        let mut pipeline =
            Pipeline::with_precision(&fixture.model, &CpuFactory::new(2), 1, KvElement::F16, ActivationBits::Sixteen);
        let rows = pipeline.logits(&fixture.expected.prompt, fixture.expected.prompt.len());
        (fixture.name, hash(&rows[rows.len() - 1]))
    });
    let got = Golden { version: VERSION, logits: logits.collect() };
    let expected = Golden { version: VERSION, logits: expected_bits() };
    let text = serde_json::to_string_pretty(&got).expect("it is plain data");
    assert_eq!(got, expected, "other bits need another version; golden.json would be\n{text}");
}
