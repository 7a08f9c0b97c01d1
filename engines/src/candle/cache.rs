//! The KV cache as tensors of slots, and attention over it.

use crate::backend::Span;
use crate::engine::PAGE_TOKENS;
use crate::model::Attention;
use candle_core::{D, DType, Device, Result, Tensor};

/// Keys that are scored at once; bounds the size of the score matrix.
const BLOCK_KEYS: usize = 512;
const TOKENS: usize = PAGE_TOKENS as usize;

/// Keys and values of each layer, each \[slots, key heads, head_dim]. A slot holds one token of a page.
#[derive(Debug)]
pub struct CandleCache {
    layers: Vec<(Tensor, Tensor)>,
}

impl CandleCache {
    pub(super) fn new(layers: &[&Attention], dtype: DType, pages: u32, device: &Device) -> Result<Self> {
        let slots = pages as usize * TOKENS;
        let tensor = |spec: &Attention| Tensor::zeros((slots, spec.kv_heads, spec.head_dim), dtype, device);
        let layers = layers.iter().map(|spec| Ok((tensor(spec)?, tensor(spec)?)));
        Ok(Self { layers: layers.collect::<Result<_>>()? })
    }

    pub(super) fn copy_pages(&mut self, copies: &[(u32, u32)]) -> Result<()> {
        for (keys, values) in &self.layers {
            for &(from, to) in copies {
                for tensor in [keys, values] {
                    let page = tensor.narrow(0, from as usize * TOKENS, TOKENS)?.copy()?;
                    tensor.slice_set(&page, 0, to as usize * TOKENS)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the keys and values of `span`'s rows.
    pub(super) fn write(&mut self, layer: usize, span: &Span, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (to_keys, to_values) = &self.layers[layer];
        for (source, target) in [(keys, to_keys), (values, to_values)] {
            let rows = source.narrow(0, span.rows.start, span.rows.len())?.to_dtype(target.dtype())?;
            for offset in 0..span.rows.len() {
                let position = span.first_position + offset;
                let slot = span.pages[position / TOKENS] as usize * TOKENS + position % TOKENS;
                target.slice_set(&rows.narrow(0, offset, 1)?.contiguous()?, 0, slot)?;
            }
        }
        Ok(())
    }

    /// Returns the attention of `queries`, \[rows, heads, head_dim], over their sequence's keys: \[rows, query width].
    pub(super) fn attend(
        &self,
        layer: usize,
        span: &Span,
        spec: &Attention,
        sinks: Option<&Tensor>,
        queries: &Tensor,
    ) -> Result<Tensor> {
        let (keys, values) = &self.layers[layer];
        let rows = queries.dim(0)?;
        let end = span.first_position + rows;
        // [kv heads, group · rows, head_dim]: query heads that share keys are adjacent.
        let shape = (spec.kv_heads, spec.group() * rows, spec.head_dim);
        let queries = queries.transpose(0, 1)?.contiguous()?.reshape(shape)?;
        let mut running: Option<(Tensor, Tensor, Tensor)> = match sinks {
            None => None,
            // A sink counts as a key before all others.
            Some(sinks) => {
                let sinks = sinks.reshape((spec.kv_heads, spec.group(), 1))?.repeat((1, 1, rows))?;
                let largest = sinks.reshape((spec.kv_heads, spec.group() * rows, 1))?;
                let sum = largest.ones_like()?;
                Some((largest, sum, queries.zeros_like()?))
            }
        };
        for start in (0..end).step_by(BLOCK_KEYS) {
            let block_end = (start + BLOCK_KEYS).min(end);
            let slots = slots(span, start, block_end, queries.device())?;
            let gather =
                |from: &Tensor| from.index_select(&slots, 0)?.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous();
            let (keys, values) = (gather(keys)?, gather(values)?);
            let scores =
                scores(&queries, &keys, spec)?.broadcast_add(&mask(span, spec, start..block_end, queries.device())?)?;
            let block_largest = scores.max_keepdim(D::Minus1)?;
            running = Some(match running {
                None => {
                    let weights = scores.broadcast_sub(&block_largest)?.exp()?;
                    (block_largest, weights.sum_keepdim(D::Minus1)?, weights.matmul(&values)?)
                }
                Some((largest, sum, mixed)) => {
                    let new = largest.maximum(&block_largest)?;
                    let weights = scores.broadcast_sub(&new)?.exp()?;
                    let rescale = (largest - &new)?.exp()?;
                    let sum = ((sum * &rescale)? + weights.sum_keepdim(D::Minus1)?)?;
                    (new, sum, (mixed.broadcast_mul(&rescale)? + weights.matmul(&values)?)?)
                }
            });
        }
        let Some((_, sum, mixed)) = running else {
            return Tensor::zeros((rows, spec.query_width()), DType::F32, queries.device());
        };
        let mixed = mixed.broadcast_div(&sum)?.reshape((spec.heads, rows, spec.head_dim))?;
        mixed.transpose(0, 1)?.contiguous()?.reshape((rows, spec.query_width()))
    }
}

fn slots(span: &Span, start: usize, end: usize, device: &Device) -> Result<Tensor> {
    let slot = |position: usize| span.pages[position / TOKENS] * PAGE_TOKENS + (position % TOKENS) as u32;
    Tensor::from_vec((start..end).map(slot).collect(), end - start, device)
}

fn scores(queries: &Tensor, keys: &Tensor, spec: &Attention) -> Result<Tensor> {
    let scores = (queries.matmul(&keys.transpose(1, 2)?.contiguous()?)? * f64::from(spec.scale))?;
    match spec.softcap {
        Some(cap) => (scores / f64::from(cap))?.tanh()? * f64::from(cap),
        None => Ok(scores),
    }
}

/// Returns a mask: 0 for a key that a row sees, else a number below all scores (−∞ would give NaN for a block without
/// visible keys).
fn mask(span: &Span, spec: &Attention, keys: std::ops::Range<usize>, device: &Device) -> Result<Tensor> {
    const UNSEEN: f32 = -1e30;
    let rows = span.rows.len();
    let window = spec.window.unwrap_or(usize::MAX);
    let mut mask = Vec::with_capacity(spec.group() * rows * keys.len());
    for _ in 0..spec.group() {
        for position in span.first_position..span.first_position + rows {
            let first = (position + 1).saturating_sub(window);
            mask.extend(keys.clone().map(|key| if key >= first && key <= position { 0.0 } else { UNSEEN }));
        }
    }
    Tensor::from_vec(mask, (1, spec.group() * rows, keys.len()), device)
}
