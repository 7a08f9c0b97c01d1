//! The candle backend: the reference in tests, and the path to devices that candle supports.
//!
//! The code follows the formulas and is not tuned for speed: every product is in f32, of dequantised weights. Candle's
//! `gemm` computes dense products with a rounding that depends on the number of rows, so this backend does not
//! guarantee row independence. A panic inside candle's thread pool poisons a process-wide lock, so a candle engine that
//! panicked is not used again.

mod cache;
mod factory;

pub use cache::CandleCache;
pub use factory::CandleFactory;

use crate::arithmetic::functions::softcap;
use crate::backend::{
    Backend, Batch, FeedForwardWeights, LayerState, Linear, LinearData, MatrixShape, MixerWeights, Norm, Router,
    TensorData,
};
use crate::engine::{ActivationBits, KvElement, TopLogits, TopQuery};
use crate::error::{DeviceFault, EngineError};
use crate::expert_routing::{self, RoutedExpert};
use crate::format::ElementType;
use crate::format::blocks::dequantise_row;
use crate::logits;
use crate::model::{Activation, Attention, Pairing, QueryKeyNorm, Rope};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{D, DType, Device, Tensor};
use std::borrow::Cow;

/// A backend on a candle device.
#[derive(Debug)]
pub struct CandleBackend {
    device: Device,
}

/// A matrix, dense or quantised: \[rows]\[columns].
#[derive(Debug)]
pub struct Matrix {
    form: Form,
    element: ElementType,
    rows: usize,
    columns: usize,
}

/// Logits of a step: \[row]\[vocabulary].
#[derive(Debug)]
pub struct Logits {
    values: Vec<f32>,
    vocabulary: usize,
}

impl Logits {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.vocabulary..][..self.vocabulary]
    }
}

#[derive(Debug)]
enum Form {
    Dense(Tensor),
    Quantised(QTensor),
}

/// The rows of a step, with the cosines and sines of every rope, each \[rows, pairs].
#[derive(Debug)]
pub struct CandleBatch {
    pub(super) batch: Batch,
    rotations: Vec<(Pairing, Tensor, Tensor)>,
}

impl From<candle_core::Error> for EngineError {
    fn from(error: candle_core::Error) -> Self {
        Self::Device { device: "candle".to_owned(), fault: DeviceFault::Driver, what: error.to_string() }
    }
}

impl CandleBackend {
    /// Creates a backend on `device`.
    pub fn new(device: Device) -> Self {
        Self { device }
    }

    fn norm(norm: Option<&Norm<Self>>, x: &Tensor) -> candle_core::Result<Tensor> {
        let Some(norm) = norm else { return Ok(x.clone()) };
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + f64::from(norm.epsilon))?.sqrt()?;
        x.broadcast_div(&root)?.broadcast_mul(&norm.weight)
    }

    fn product(&self, matrix: &Matrix, x: &Tensor) -> candle_core::Result<Tensor> {
        let weight = match &matrix.form {
            Form::Dense(tensor) => tensor.to_dtype(DType::F32)?,
            Form::Quantised(tensor) => tensor.dequantize(&self.device)?,
        };
        x.matmul(&weight.t()?)
    }

    fn linear(&self, linear: &Linear<Self>, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.product(&linear.weight, x)?;
        match &linear.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// down(activation(gate x, up x)) of one expert.
    fn gated(&self, weights: &FeedForwardWeights<Self>, expert: usize, x: &Tensor) -> candle_core::Result<Tensor> {
        let gate = self.linear(&weights.gate_up[2 * expert], x)?;
        let up = self.linear(&weights.gate_up[2 * expert + 1], x)?;
        let inner = match weights.activation {
            Activation::Silu => (gate.silu()? * up)?,
            Activation::GeluTanh => (gate.gelu()? * up)?,
            Activation::ClampedSwish { slope, limit } => {
                let gate = gate.minimum(limit)?;
                let sigmoid = ((gate.affine(-f64::from(slope), 0.0)?.exp()? + 1.0)?).recip()?;
                ((up.clamp(-limit, limit)? + 1.0)? * (gate * sigmoid)?)?
            }
        };
        self.linear(&weights.down[expert], &inner)
    }

    /// Computes the rows of each expert together; a row's sum is in the order of expert numbers.
    fn mixture(
        &self,
        router: &Router<Self>,
        weights: &FeedForwardWeights<Self>,
        x: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let logits = self.linear(&router.linear[0], x)?.to_vec2::<f32>()?;
        let choices: Vec<Vec<RoutedExpert>> =
            logits.iter().map(|row| expert_routing::route(&router.spec, row)).collect();
        let mut out = x.zeros_like()?;
        for number in 0..router.spec.count {
            let mine = choices.iter().enumerate().flat_map(|(row, choices)| {
                choices.iter().filter(|choice| choice.expert == number).map(move |choice| (row as u32, choice.weight))
            });
            let (rows, shares): (Vec<u32>, Vec<f32>) = mine.unzip();
            if rows.is_empty() {
                continue;
            }
            let count = rows.len();
            let rows = Tensor::from_vec(rows, count, &self.device)?;
            let shares = Tensor::from_vec(shares, (count, 1), &self.device)?;
            let part = self.gated(weights, number, &x.index_select(&rows, 0)?)?;
            out = out.index_add(&rows, &part.broadcast_mul(&shares)?, 0)?;
        }
        Ok(out)
    }

    fn chosen(&self, hidden: &Tensor, rows: &[usize]) -> candle_core::Result<Tensor> {
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        hidden.index_select(&Tensor::from_slice(&rows, rows.len(), &self.device)?, 0)
    }

    /// Normalises (if the model does) and rotates queries or keys; returns \[rows, heads, head_dim].
    fn turn(
        x: &Tensor,
        spec: &Attention,
        norm: Option<&Norm<Self>>,
        (pairing, cosines, sines): &(Pairing, Tensor, Tensor),
    ) -> candle_core::Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let shape = (rows, width / spec.head_dim, spec.head_dim);
        let x = match spec.query_key_norm {
            Some(QueryKeyNorm::Projection) => Self::norm(norm, x)?.reshape(shape)?,
            _ => Self::norm(norm, &x.reshape(shape)?)?,
        };
        let pairs = cosines.dim(1)?;
        let (turned, rest) = (x.narrow(2, 0, pairs * 2)?, x.narrow(2, pairs * 2, spec.head_dim - pairs * 2)?);
        let paired = (rows, width / spec.head_dim, pairs, 2);
        let (a, b) = match pairing {
            Pairing::Halves => (turned.narrow(2, 0, pairs)?, turned.narrow(2, pairs, pairs)?),
            Pairing::Neighbours => {
                let turned = turned.contiguous()?.reshape(paired)?;
                (turned.narrow(3, 0, 1)?.squeeze(3)?, turned.narrow(3, 1, 1)?.squeeze(3)?)
            }
        };
        let (cosines, sines) = (cosines.unsqueeze(1)?, sines.unsqueeze(1)?);
        let left = (a.broadcast_mul(&cosines)? - b.broadcast_mul(&sines)?)?;
        let right = (b.broadcast_mul(&cosines)? + a.broadcast_mul(&sines)?)?;
        let turned = match pairing {
            Pairing::Halves => Tensor::cat(&[left, right], 2)?,
            Pairing::Neighbours => Tensor::stack(&[left, right], 3)?.flatten_from(2)?,
        };
        Tensor::cat(&[turned, rest], 2)?.contiguous()
    }
}

fn ggml_type(element: ElementType) -> Option<GgmlDType> {
    Some(match element {
        ElementType::F32 | ElementType::F16 | ElementType::BF16 => return None,
        // candle does not support these types: they are converted to f32.
        ElementType::IQ4_NL | ElementType::IQ4_XS | ElementType::MXFP4 => return None,
        ElementType::Q2_K => GgmlDType::Q2K,
        ElementType::Q3_K => GgmlDType::Q3K,
        ElementType::Q4_0 => GgmlDType::Q4_0,
        ElementType::Q4_1 => GgmlDType::Q4_1,
        ElementType::Q5_0 => GgmlDType::Q5_0,
        ElementType::Q5_1 => GgmlDType::Q5_1,
        ElementType::Q8_0 => GgmlDType::Q8_0,
        ElementType::Q4_K => GgmlDType::Q4K,
        ElementType::Q5_K => GgmlDType::Q5K,
        ElementType::Q6_K => GgmlDType::Q6K,
    })
}

fn dense_type(element: ElementType) -> DType {
    match element {
        ElementType::F16 => DType::F16,
        ElementType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

impl Backend for CandleBackend {
    type Matrix = Matrix;
    type Linears = Vec<Linear<Self>>;
    type Vector = Tensor;
    type Buffer = Tensor;
    type Logits = Logits;
    type Cache = CandleCache;
    type Batch = CandleBatch;

    fn fingerprint(&self) -> String {
        format!("candle/{}/{:?}", env!("CARGO_PKG_VERSION"), self.device.location())
    }

    fn matrix(&mut self, tensor: &TensorData<'_>) -> Result<Matrix, EngineError> {
        let shape = (tensor.rows, tensor.columns);
        let bytes = tensor.bytes.whole()?;
        let form = match ggml_type(tensor.element) {
            Some(kind) => {
                let storage = QStorage::from_data(Cow::Borrowed(&*bytes), &self.device, kind)?;
                Form::Quantised(QTensor::new(storage, shape)?)
            }
            None if tensor.element.is_quantised() => {
                let mut values = vec![0.0; shape.0 * shape.1];
                let rows = bytes.chunks(bytes.len() / shape.0.max(1));
                for (row, out) in rows.zip(values.chunks_mut(shape.1)) {
                    dequantise_row(tensor.element, row, out);
                }
                Form::Dense(Tensor::from_vec(values, shape, &self.device)?)
            }
            None => {
                let kind = dense_type(tensor.element);
                Form::Dense(Tensor::from_raw_buffer(&bytes, kind, &[shape.0, shape.1], &self.device)?)
            }
        };
        Ok(Matrix { form, element: tensor.element, rows: tensor.rows, columns: tensor.columns })
    }

    fn matrix_bytes(matrix: &Matrix) -> u64 {
        match &matrix.form {
            Form::Dense(tensor) => (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64,
            Form::Quantised(tensor) => tensor.storage_size_in_bytes() as u64,
        }
    }

    fn linears(
        &mut self,
        _: &[MatrixShape],
        parts: &mut dyn Iterator<Item = Result<LinearData<'_>, EngineError>>,
    ) -> Result<Vec<Linear<Self>>, EngineError> {
        Linear::each(self, parts)
    }

    fn linears_bytes(linears: &Vec<Linear<Self>>) -> u64 {
        Linear::bytes_of(linears)
    }

    /// candle frees each tensor when it is dropped.
    fn memory_bytes(&self) -> u64 {
        0
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<Tensor, EngineError> {
        let length = values.len();
        Ok(Tensor::from_vec(values, length, &self.device)?)
    }

    fn set_activations(&mut self, bits: ActivationBits) -> Result<(), EngineError> {
        match bits {
            ActivationBits::Sixteen => Ok(()),
            ActivationBits::Eight => {
                let what = format!("a choice of {} bits for activations", bits.name());
                Err(EngineError::Unsupported { engine: "candle".to_owned(), what })
            }
        }
    }

    fn cache(&mut self, layers: &[LayerState<'_>], element: KvElement, pages: u32) -> Result<CandleCache, EngineError> {
        let layers: Vec<_> = layers.iter().map(|&LayerState::KeysAndValues(spec)| spec).collect();
        let dtype = match element {
            KvElement::F16 => DType::F16,
            KvElement::F32 => DType::F32,
            KvElement::Q8_0 => {
                let what = format!("a cache of the type {}", element.name());
                return Err(EngineError::Unsupported { engine: "candle".to_owned(), what });
            }
        };
        Ok(CandleCache::new(&layers, dtype, pages, &self.device)?)
    }

    fn copy_pages(&mut self, cache: &mut CandleCache, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        Ok(cache.copy_pages(copies)?)
    }

    fn begin(&mut self, batch: Batch, ropes: &[Rope]) -> Result<CandleBatch, EngineError> {
        let mut positions = Vec::with_capacity(batch.rows);
        for span in &batch.spans {
            positions.extend((span.first_position..).take(span.rows.len()).map(|p| p as f32));
        }
        let positions = Tensor::from_vec(positions, (batch.rows, 1), &self.device)?;
        let mut rotations = Vec::new();
        for rope in ropes {
            let pairs = rope.frequencies.len();
            let frequencies = Tensor::from_slice(&rope.frequencies, (1, pairs), &self.device)?;
            let angles = positions.matmul(&frequencies)?;
            let by = f64::from(rope.magnitude);
            rotations.push((rope.pairing, (angles.cos()? * by)?, (angles.sin()? * by)?));
        }
        Ok(CandleBatch { batch, rotations })
    }

    fn embed(&mut self, table: &Matrix, tokens: &[u32], scale: f32) -> Result<Tensor, EngineError> {
        let rows = match &table.form {
            Form::Dense(tensor) => {
                let tokens = Tensor::from_slice(tokens, tokens.len(), &self.device)?;
                tensor.index_select(&tokens, 0)?.to_dtype(DType::F32)?
            }
            Form::Quantised(tensor) => {
                let bytes = tensor.data()?;
                let row_bytes = bytes.len() / table.rows;
                let mut values = vec![0.0; tokens.len() * table.columns];
                for (&token, row) in tokens.iter().zip(values.chunks_mut(table.columns)) {
                    dequantise_row(table.element, &bytes[token as usize * row_bytes..][..row_bytes], row);
                }
                Tensor::from_vec(values, (tokens.len(), table.columns), &self.device)?
            }
        };
        Ok((rows * f64::from(scale))?)
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Tensor, EngineError> {
        let rows = values.len() / width;
        Ok(Tensor::from_vec(values, (rows, width), &self.device)?)
    }

    fn download(&mut self, buffer: Tensor) -> Result<Vec<f32>, EngineError> {
        Ok(buffer.flatten_all()?.to_vec1()?)
    }

    fn mix(
        &mut self,
        weights: &MixerWeights<Self>,
        cache: &mut CandleCache,
        layer: usize,
        batch: &CandleBatch,
        hidden: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let MixerWeights::Attention(weights) = weights;
        let [query_weights, key_weights, value_weights] = weights.query_key_value.as_slice() else {
            return Err(EngineError::BadStep { what: "attention without its three projections".to_owned() });
        };
        let spec = &weights.spec;
        let x = Self::norm(weights.norm.as_ref(), hidden)?;
        let rotation = &batch.rotations[spec.rope];
        let queries = Self::turn(&self.linear(query_weights, &x)?, spec, weights.query_norm.as_ref(), rotation)?;
        let keys = Self::turn(&self.linear(key_weights, &x)?, spec, weights.key_norm.as_ref(), rotation)?;
        let values = self.linear(value_weights, &x)?;
        let values = values.reshape((values.dim(0)?, spec.kv_heads, spec.head_dim))?;
        let mut mixed = Vec::new();
        for span in &batch.batch.spans {
            cache.write(layer, span, &keys, &values)?;
            let rows = queries.narrow(0, span.rows.start, span.rows.len())?;
            mixed.push(cache.attend(layer, span, spec, weights.sinks.as_ref(), &rows)?);
        }
        let mixed = Tensor::cat(&mixed, 0)?;
        Ok(self.linear(&weights.output[0], &mixed)?)
    }

    fn feed_forward(&mut self, weights: &FeedForwardWeights<Self>, hidden: &Tensor) -> Result<Tensor, EngineError> {
        let x = Self::norm(weights.norm.as_ref(), hidden)?;
        match &weights.router {
            None => Ok(self.gated(weights, 0, &x)?),
            Some(router) => Ok(self.mixture(router, weights, &x)?),
        }
    }

    fn add(&mut self, hidden: &mut Tensor, delta: Tensor, norm: Option<&Norm<Self>>) -> Result<(), EngineError> {
        *hidden = (&*hidden + Self::norm(norm, &delta)?)?;
        Ok(())
    }

    fn final_rows(&mut self, norm: &Norm<Self>, hidden: &Tensor, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        Ok(Self::norm(Some(norm), &self.chosen(hidden, rows)?)?.flatten_all()?.to_vec1()?)
    }

    fn logits(
        &mut self,
        norm: &Norm<Self>,
        head: &Matrix,
        hidden: Tensor,
        rows: &[usize],
        cap: Option<f32>,
    ) -> Result<Logits, EngineError> {
        let logits = self.product(head, &Self::norm(Some(norm), &self.chosen(&hidden, rows)?)?)?;
        let mut values: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        if let Some(cap) = cap {
            values.iter_mut().for_each(|logit| *logit = softcap(*logit, cap));
        }
        Ok(Logits { values, vocabulary: head.rows })
    }

    fn top_logits(&mut self, logits: &Logits, queries: &[(usize, &TopQuery)]) -> Result<Vec<TopLogits>, EngineError> {
        Ok(queries.iter().map(|&(row, query)| logits::top(logits.row(row), query)).collect())
    }

    fn logit_rows(&mut self, logits: &Logits, rows: &[usize]) -> Result<Vec<f32>, EngineError> {
        Ok(rows.iter().flat_map(|&row| logits.row(row)).copied().collect())
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        Ok(self.device.synchronize()?)
    }
}
