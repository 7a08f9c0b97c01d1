//! The location of a tensor in its file, for every format.

use super::ElementType;

/// The location of one tensor in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The storage type of the tensor's numbers.
    pub element: ElementType,
    /// Rows first, innermost dimension last (the order of safetensors; GGUF's is reversed on reading).
    pub shape: Vec<usize>,
    /// Offset of the first byte from the start of the file.
    pub offset_bytes: u64,
    /// Length of the tensor's data.
    pub length_bytes: u64,
}

/// Returns the bytes of a tensor; `None` if its rows are not whole blocks, or the number overflows.
pub(crate) fn length_bytes(element: ElementType, shape: &[usize]) -> Option<u64> {
    let (inner, outer) = match shape.split_last() {
        Some((inner, outer)) => (*inner, outer),
        None => (1, shape),
    };
    let row = element.row_bytes(inner)? as u64;
    outer.iter().try_fold(row, |bytes, &size| bytes.checked_mul(size as u64))
}

/// Checks that no two tensors share a byte. `extents` are `(start, end, name)`.
///
/// # Errors
/// The name of the second tensor of an overlapping pair, and what is wrong with it.
pub(crate) fn check_disjoint(extents: &mut [(u64, u64, String)]) -> Result<(), (String, String)> {
    extents.sort();
    for pair in extents.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err((pair[1].2.clone(), format!("it overlaps `{}`", pair[0].2)));
        }
    }
    Ok(())
}
