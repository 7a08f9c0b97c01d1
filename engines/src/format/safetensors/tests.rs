//! Valid files are read; the errors of invalid files name what is wrong.

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn file(header: &serde_json::Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn sound() -> Vec<u8> {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    });
    file(&header, &[0; 22])
}

fn open(files: &[(&str, &[u8])]) -> Result<SafeTensors, FormatError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("written");
    }
    SafeTensors::open_folder(folder.path())
}

fn refused(header: &serde_json::Value, data: &[u8]) -> String {
    let error = open(&[("model.safetensors", &file(header, data))]).expect_err("an invalid file");
    assert!(!error.remedy().is_empty());
    error.to_string()
}

#[test]
fn tensors_are_found_in_one_file_and_in_several() {
    let one = open(&[("model.safetensors", &sound())]).expect("a valid file");
    assert_eq!(one.tensors["a"].1.shape, [2, 2]);
    assert_eq!(one.tensors["b"].1.element, ElementType::BF16);
    let other = file(&json!({"c": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}), &[0; 2]);
    let index = json!({"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}}).to_string();
    let files: [(&str, &[u8]); 4] = [
        ("x.safetensors", &sound()),
        ("y.safetensors", &other),
        ("stray.safetensors", b"not in the index"),
        ("model.safetensors.index.json", index.as_bytes()),
    ];
    let several = open(&files).expect("valid files");
    assert_eq!(several.tensors["c"].0, 1);
    assert_eq!(several.tensors.len(), 3);
}

/// R4.1: of the files of a folder those are a model's that transformers takes: one whole file before a stale index;
/// hidden files of macOS, adapters and Mistral's copy never.
#[test]
fn other_files_beside_a_model_are_left_alone() {
    let index = json!({"weight_map": {"a": "model-00001-of-00002.safetensors"}}).to_string();
    let others: [(&str, &[u8]); 4] = [
        ("._model.safetensors", b"resource fork"),
        ("consolidated.safetensors", b"Mistral's copy"),
        ("adapter_model.safetensors", b"an adapter"),
        ("model.safetensors.index.json", index.as_bytes()),
    ];
    let whole = sound();
    let with_index = [&[("model.safetensors", &whole[..])], &others[..]].concat();
    assert_eq!(open(&with_index).expect("a whole file").tensors.len(), 2);
    let shards = [&[("x.safetensors", &whole[..])], &others[..3]].concat();
    assert_eq!(open(&shards).expect("shards without an index").tensors.len(), 2);
}

#[test]
fn an_index_cannot_point_elsewhere() {
    for name in ["../x.safetensors", "/etc/passwd", ".hidden"] {
        let index = json!({"weight_map": {"a": name}}).to_string();
        let error = open(&[("model.safetensors.index.json", index.as_bytes())]).expect_err("an invalid index");
        assert!(error.to_string().contains(name), "{error}");
    }
    let index = json!({"weight_map": {"a": "missing.safetensors"}}).to_string();
    assert!(matches!(open(&[("model.safetensors.index.json", index.as_bytes())]), Err(FormatError::Io { .. })));
}

#[test]
fn claims_of_a_header_are_checked() {
    let entry = |dtype: &str, shape: serde_json::Value, start: u64, end: u64| json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
    let cases = [
        (json!({"t": entry("F32", json!([2]), 0, 4)}), "do not fit"),
        (json!({"t": entry("F32", json!([1]), 8, 4)}), "do not fit"),
        (json!({"t": entry("F32", json!([1_u64 << 40, 1_u64 << 40]), 0, 4)}), "overflows"),
        (json!({"t": entry("F32", json!([100]), 0, 400)}), "cut short"),
        (json!({"t": entry("F32", json!([1]), u64::MAX - 4, u64::MAX)}), ""),
        (json!({"t": entry("I64", json!([1]), 0, 8)}), "I64"),
        (json!({"t": entry("F32", json!([-1]), 0, 4)}), "`t`"),
        (json!({"t": 7}), "`t`"),
    ];
    for (header, named) in cases {
        let message = refused(&header, &[0; 8]);
        assert!(message.contains(named) && message.contains("`t`"), "{header}: {message}");
    }
    let overlapping = json!({"t": entry("F32", json!([1]), 0, 4), "u": entry("F32", json!([1]), 2, 6)});
    let message = refused(&overlapping, &[0; 8]);
    assert!(message.contains("`u`") && message.contains("overlaps `t`"), "{message}");
}

#[test]
fn duplicate_names_and_malformed_headers_are_refused() {
    let error = open(&[("x.safetensors", &sound()), ("y.safetensors", &sound())]).expect_err("equal names");
    assert!(error.to_string().contains("two files"), "{error}");
    let mut huge = sound();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(open(&[("model.safetensors", &huge)]), Err(FormatError::TooLarge { .. })));
    let no_json = [&4_u64.to_le_bytes()[..], b"{\"a\""].concat();
    assert!(matches!(open(&[("model.safetensors", &no_json)]), Err(FormatError::Malformed { .. })));
    assert!(matches!(open(&[]), Err(FormatError::NotAModel { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_file_cut_short_is_refused(share in 0.0..1.0_f64) {
        let bytes = sound();
        let length = (bytes.len() as f64 * share) as usize;
        prop_assert!(open(&[("model.safetensors", &bytes[..length])]).is_err());
    }

    /// A file with damaged bytes is read or refused, without a panic. Every tensor of a readable file lies inside it.
    #[test]
    fn damage_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = sound();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(read) = open(&[("model.safetensors", &bytes)]) {
            for (_, info) in read.tensors.values() {
                prop_assert!(info.offset_bytes + info.length_bytes <= bytes.len() as u64);
            }
        }
    }
}
