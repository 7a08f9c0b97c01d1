//! A tensor's place in its file, whatever the format.

use super::ElementType;

/// Where one tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// How its numbers are stored.
    pub element: ElementType,
    /// Rows first, innermost dimension last (the order of safetensors; GGUF's is reversed on reading).
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset_bytes: u64,
    /// Length.
    pub length_bytes: u64,
}

/// Bytes of a tensor; `None` where its rows are not whole blocks, or the number overflows.
pub(crate) fn length_bytes(element: ElementType, shape: &[usize]) -> Option<u64> {
    let (inner, outer) = match shape.split_last() {
        Some((inner, outer)) => (*inner, outer),
        None => (1, shape),
    };
    let row = element.row_bytes(inner)? as u64;
    outer.iter().try_fold(row, |bytes, &size| bytes.checked_mul(size as u64))
}

/// Fails with the name of a tensor whose bytes another tensor has too. `extents` are `(start, end, name)`.
pub(crate) fn check_disjoint(extents: &mut [(u64, u64, String)]) -> Result<(), (String, String)> {
    extents.sort();
    for pair in extents.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err((pair[1].2.clone(), format!("it overlaps `{}`", pair[0].2)));
        }
    }
    Ok(())
}
