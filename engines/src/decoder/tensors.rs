//! The tensors of a shard's files, checked against the architecture.

use crate::backend::TensorData;
use crate::error::EngineError;
use crate::format::blocks::dequantise_row;
use crate::format::quantise::{self, QuantiseError};
use crate::format::{ElementType, FormatError, TensorBytes};
use crate::model::{Role, TensorSlice, WeightReader, WeightSource};

pub(super) struct Tensors<'a> {
    pub(super) source: &'a WeightSource,
    pub(super) reader: WeightReader,
}

impl Tensors<'_> {
    pub(super) fn is_tied(&self) -> bool {
        let place = |role| self.source.tensors.get(&role).map(|slice| (slice.file, slice.offset_bytes));
        place(Role::Output) == place(Role::TokenEmbedding)
    }

    /// Returns the tensor of `role`, if its shape and size match the architecture.
    pub(super) fn slice(&self, role: Role, rows: usize, columns: usize) -> Result<&TensorSlice, EngineError> {
        let Some(slice) = self.source.tensors.get(&role) else {
            return Err(FormatError::BadTensor {
                path: self.source.files.first().cloned().unwrap_or_default(),
                tensor: format!("{role:?}"),
                what: "it is missing".to_owned(),
            }
            .into());
        };
        if (slice.rows, slice.columns) != (rows, columns) {
            let what = format!("its shape is {}×{}, not {rows}×{columns}", slice.rows, slice.columns);
            return Err(self.bad(slice, what).into());
        }
        if expected_bytes(slice.element, rows, columns) != Some(slice.length_bytes) {
            let what = format!("{} bytes are not {rows}×{columns} values of {}", slice.length_bytes, slice.element);
            return Err(self.bad(slice, what).into());
        }
        Ok(slice)
    }

    /// Returns the bytes of a matrix, quantised if the model is quantised on loading.
    pub(super) fn data<'t>(&'t self, slice: &'t TensorSlice) -> Result<TensorData<'t>, EngineError> {
        let bytes = self.reader.bytes(slice)?;
        let bytes = match slice.kept_as == slice.element {
            true => bytes,
            false => TensorBytes::Gathered(self.quantised(slice, &bytes)?),
        };
        let TensorSlice { rows, columns, .. } = *slice;
        Ok(TensorData { name: &slice.name, element: slice.kept_as, rows, columns, bytes })
    }

    fn quantised(&self, slice: &TensorSlice, bytes: &TensorBytes<'_>) -> Result<Vec<u8>, FormatError> {
        let types = (slice.element, slice.kept_as);
        quantise::rows(types, bytes, slice.columns).map_err(|error| {
            let what = match error {
                QuantiseError::Unreadable(error) => return error,
                QuantiseError::NotANumber { row } => format!("row {row} has a value that is not a finite number"),
                QuantiseError::Failed { what } => format!("it cannot be quantised: {what}"),
            };
            self.bad(slice, what)
        })
    }

    /// Returns the values of a vector, and the number of bytes that were read.
    pub(super) fn vector(&self, role: Role, length: usize) -> Result<(Vec<f32>, u64), EngineError> {
        let slice = self.slice(role, 1, length)?;
        let mut values = vec![0.0; length];
        dequantise_row(slice.element, &self.reader.bytes(slice)?.whole()?, &mut values);
        if values.iter().any(|value| !value.is_finite()) {
            return Err(self.bad(slice, "it has a value that is not a finite number".to_owned()).into());
        }
        Ok((values, slice.length_bytes))
    }

    /// Adds the path of the file to an error about one of `slices`.
    pub(super) fn with_path(&self, slices: &[&TensorSlice], error: EngineError) -> EngineError {
        match error {
            EngineError::Format(FormatError::BadTensor { tensor, what, path }) => {
                let slice = slices.iter().find(|slice| slice.name == tensor);
                FormatError::BadTensor { path: slice.map_or(path, |slice| self.reader.path(slice)), tensor, what }
                    .into()
            }
            other => other,
        }
    }

    fn bad(&self, slice: &TensorSlice, what: String) -> FormatError {
        FormatError::BadTensor { path: self.reader.path(slice), tensor: slice.name.clone(), what }
    }
}

fn expected_bytes(element: ElementType, rows: usize, columns: usize) -> Option<u64> {
    (element.row_bytes(columns)? as u64).checked_mul(rows as u64)
}
