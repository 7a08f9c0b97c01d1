//! The tensor of a file, or the part of one, that holds the values of a role.

use super::{Layout, TensorSlice};
use crate::format::{ElementType, TensorInfo};
use std::ops::Range;

/// A possible location of a role's values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorSource {
    pub(super) tensor: String,
    pub(super) values: Values,
}

/// The values of a tensor that belong to a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Values {
    All,
    /// Some rows, with all dimensions but the last merged into one; of a vector, some values.
    Rows(Range<usize>),
    /// Row r, column c is the value `first` + r · `row_step` + c · `column_step` of a dense tensor.
    Strided(Strided),
}

/// A strided matrix in a dense tensor. All counts are in values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Strided {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) first: usize,
    pub(super) row_step: usize,
    pub(super) column_step: usize,
}

impl TensorSource {
    pub(super) fn all(tensor: String) -> Self {
        Self { tensor, values: Values::All }
    }

    pub(super) fn rows(tensor: String, rows: Range<usize>) -> Self {
        Self { tensor, values: Values::Rows(rows) }
    }

    pub(super) fn strided(tensor: String, strided: Strided) -> Self {
        Self { tensor, values: Values::Strided(strided) }
    }

    /// The slice of file number `file` at this location; `None` if the tensor does not have such values.
    pub(super) fn slice(&self, file: usize, info: &TensorInfo) -> Option<TensorSlice> {
        let whole = TensorSlice::whole(&self.tensor, file, info);
        match &self.values {
            Values::All => Some(whole),
            Values::Rows(range) => rows(whole, info.shape.len() < 2, range.clone()),
            Values::Strided(strided) => strided.slice(whole, info.element),
        }
    }
}

fn rows(whole: TensorSlice, is_vector: bool, range: Range<usize>) -> Option<TensorSlice> {
    let unit = if is_vector { 1 } else { whole.columns };
    let row_bytes = whole.element.row_bytes(unit)? as u64;
    if range.end as u64 > whole.length_bytes / row_bytes.max(1) {
        return None;
    }
    let (rows, columns) = if is_vector { (1, range.len()) } else { (range.len(), unit) };
    Some(TensorSlice {
        rows,
        columns,
        offset_bytes: whole.offset_bytes + range.start as u64 * row_bytes,
        length_bytes: range.len() as u64 * row_bytes,
        ..whole
    })
}

impl Strided {
    /// The index after the last value.
    fn end(&self) -> Option<usize> {
        let last_row = self.rows.checked_sub(1)?.checked_mul(self.row_step)?;
        let last_column = self.columns.checked_sub(1)?.checked_mul(self.column_step)?;
        self.first.checked_add(last_row)?.checked_add(last_column)?.checked_add(1)
    }

    fn slice(&self, whole: TensorSlice, element: ElementType) -> Option<TensorSlice> {
        let size = element.block_bytes() as u64;
        if element.is_quantised() || self.end()? as u64 * size > whole.length_bytes {
            return None;
        }
        Some(TensorSlice {
            rows: self.rows,
            columns: self.columns,
            offset_bytes: whole.offset_bytes + self.first as u64 * size,
            length_bytes: (self.rows * self.columns) as u64 * size,
            layout: Layout::Strided { row_step: self.row_step as u64, column_step: self.column_step as u64 },
            ..whole
        })
    }
}
