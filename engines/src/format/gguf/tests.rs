//! Valid files are read; the errors of invalid files name what is wrong.

use super::super::gguf_writer::{Datum, GgufWriter};
use super::*;
use crate::format::ElementType;
use proptest::prelude::*;

fn sound() -> GgufWriter {
    GgufWriter::default()
        .text("general.architecture", "llama")
        .count("llama.block_count", 2)
        .pair("general.scale", Datum::Float(0.5))
        .pair("general.flag", Datum::Bool(true))
        .texts("tokenizer.ggml.tokens", ["a", "b", "c"])
        .floats("first", &[2, 3], (0..6).map(|i| i as f32))
        .floats("second", &[4], [1.0; 4])
}

fn open(bytes: &[u8]) -> Result<Gguf, FormatError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("test.gguf");
    std::fs::write(&path, bytes).expect("written");
    Gguf::open(&path)
}

fn refused(bytes: &[u8]) -> String {
    let error = open(bytes).expect_err("an invalid file");
    assert!(!error.remedy().is_empty());
    error.to_string()
}

#[test]
fn metadata_and_tensors_are_read() {
    let file = open(&sound().bytes()).expect("a valid file");
    assert_eq!(file.get("llama.block_count", Value::as_u64), Ok(Some(2)));
    assert_eq!(file.get("general.scale", Value::as_f64), Ok(Some(0.5)));
    assert_eq!(file.get("nowhere", Value::as_u64), Ok(None));
    assert!(matches!(file.get("general.flag", Value::as_text), Err(FormatError::BadConfig { .. })));
    let first = &file.tensors["first"];
    assert_eq!((first.element, &first.shape[..], first.length_bytes), (ElementType::F32, &[2, 3][..], 24));
    let second = &file.tensors["second"];
    let range = second.offset_bytes..second.offset_bytes + second.length_bytes;
    assert_eq!(file.file.read(range, "second").expect("inside the file"), [1.0_f32; 4].map(f32::to_le_bytes).concat());
}

#[test]
fn counts_above_the_limits_are_refused() {
    for at in [8, 16] {
        let mut bytes = sound().bytes();
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refused(&bytes).contains("claims 18446744073709551615"), "{}", refused(&bytes));
    }
}

#[test]
fn a_list_longer_than_the_file_is_refused() {
    let file = sound();
    let mut bytes = file.bytes();
    let key = b"tokenizer.ggml.tokens";
    let at = bytes.windows(key.len()).position(|window| window == key).expect("the key") + key.len() + 8;
    bytes[at..at + 8].copy_from_slice(&(1_u64 << 60).to_le_bytes());
    assert!(refused(&bytes).contains("tokenizer.ggml.tokens"));
}

#[test]
fn tensors_that_overlap_are_named() {
    let message = refused(&sound().bytes_with_offsets(&[0, 0]));
    assert!(message.contains("overlaps") && message.contains("first") && message.contains("second"), "{message}");
}

#[test]
fn tensors_outside_the_file_are_named() {
    for offset in [1 << 20, u64::MAX - 31] {
        let message = refused(&sound().bytes_with_offsets(&[0, offset]));
        assert!(message.contains("second"), "{message}");
    }
    assert!(refused(&sound().bytes_with_offsets(&[0, 33])).contains("multiple"));
}

#[test]
fn impossible_shapes_are_named() {
    let huge = GgufWriter::default().tensor("huge", &[1 << 40, 1 << 40], 0, vec![]);
    assert!(refused(&huge.bytes()).contains("huge"));
    let ragged = GgufWriter::default().tensor("ragged", &[1, 33], 2, vec![0; 36]);
    assert!(refused(&ragged.bytes()).contains("ragged"));
    let deep = GgufWriter::default().tensor("deep", &[1; 5], 0, vec![0; 4]);
    assert!(refused(&deep.bytes()).contains("5 dimensions"));
}

#[test]
fn duplicate_names_are_refused() {
    let twice = GgufWriter::default().floats("same", &[1], [0.0]).floats("same", &[1], [0.0]);
    assert!(refused(&twice.bytes()).contains("same"));
    let twice = GgufWriter::default().count("same", 1).count("same", 2);
    assert!(refused(&twice.bytes()).contains("twice"));
}

#[test]
fn an_unsupported_type_is_named() {
    let file = GgufWriter::default().tensor("experts", &[1, 256], 16, vec![0; 66]);
    let message = refused(&file.bytes());
    assert!(message.contains("experts") && message.contains("IQ2_XXS"), "{message}");
}

#[test]
fn other_file_types_and_versions_are_refused() {
    assert!(refused(b"PK\x03\x04 and so on, for long enough").contains("does not start with `GGUF`"));
    let mut old = sound().bytes();
    old[4] = 1;
    assert!(refused(&old).contains("version 1"));
    assert!(matches!(open(&[]), Err(FormatError::Truncated { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// A file cut anywhere is refused.
    #[test]
    fn a_file_cut_short_is_refused(share in 0.0..1.0_f64) {
        let bytes = sound().bytes();
        // The padding after the last tensor belongs to no tensor, so its loss is no error.
        let length = ((bytes.len() - 16) as f64 * share) as usize;
        prop_assert!(open(&bytes[..length]).is_err());
    }

    /// A file with damaged bytes is read or refused, without a panic. Every tensor of a readable file lies inside it.
    #[test]
    fn damage_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = sound().bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(file) = open(&bytes) {
            for info in file.tensors.values() {
                prop_assert!(info.offset_bytes + info.length_bytes <= bytes.len() as u64);
            }
        }
    }
}
