//! The half-layer of attention: projections, rotation, cache, scores.

use super::cache::{Cache, Vectors};
use super::device::WORK_GROUP_SIZE;
use super::fault::unsupported;
use super::programs::KernelSet;
use super::queue::{Arg, integer};
use super::rows::{OpenClBackend, Rows};
use super::scratch::Scratch;
use crate::arithmetic::attention::CHUNK;
use crate::arithmetic::rotary;
use crate::backend::{AttentionWeights, Batch, LayerState, Norm};
use crate::engine::{KvElement, PAGE_TOKENS};
use crate::error::EngineError;
use crate::kv_element::BLOCK;
use crate::model::{Attention, Pairing, QueryKeyNorm, Rope};

/// The rows of a step on the device.
#[derive(Debug)]
pub struct DeviceBatch {
    rows: usize,
    /// The most positions that a row sees.
    visible_max: usize,
    /// The position of each row in its sequence: \[row].
    positions: Scratch,
    /// The pages of all spans.
    pages: Scratch,
    /// Where each row's pages begin in `pages`: \[row].
    first_pages: Scratch,
    /// The slot of each row in the cache, page · 32 + slot in the page: \[row].
    slots: Scratch,
    rotations: Vec<Rotation>,
}

/// The rotation of each row by one of the model's ropes: \[row]\[pair].
#[derive(Debug)]
struct Rotation {
    pairing: Pairing,
    pairs: usize,
    cosines: Scratch,
    sines: Scratch,
}

impl OpenClBackend {
    pub(super) fn batch(&mut self, batch: &Batch, ropes: &[Rope]) -> Result<DeviceBatch, EngineError> {
        let (mut positions, mut pages, mut first_pages, mut slots) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for span in &batch.spans {
            let first = integer(pages.len());
            pages.extend(span.pages.iter().map(|&page| integer(page as usize)));
            for position in (span.first_position..).take(span.rows.len()) {
                let page = span.pages[position / PAGE_TOKENS as usize] as usize;
                positions.push(integer(position));
                first_pages.push(first);
                slots.push(integer(page * PAGE_TOKENS as usize + position % PAGE_TOKENS as usize));
            }
        }
        let rotations = ropes.iter().map(|rope| {
            let table = positions.iter().flat_map(|&position| rotary::table(rope, position as usize));
            let (cosines, sines): (Vec<f32>, Vec<f32>) = table.unzip();
            let (cosines, sines) = (self.uploaded(&cosines)?, self.uploaded(&sines)?);
            Ok(Rotation { pairing: rope.pairing, pairs: rope.frequencies.len(), cosines, sines })
        });
        let rotations = rotations.collect::<Result<_, EngineError>>()?;
        let visible_max = positions.iter().max().map_or(0, |&position| position as usize + 1);
        Ok(DeviceBatch {
            rows: batch.rows,
            visible_max,
            positions: self.uploaded(&positions)?,
            pages: self.uploaded(&pages)?,
            first_pages: self.uploaded(&first_pages)?,
            slots: self.uploaded(&slots)?,
            rotations,
        })
    }

    /// Checks that the device can attend with the heads of `layers`.
    pub(super) fn check_heads(&self, layers: &[LayerState<'_>]) -> Result<(), EngineError> {
        for LayerState::KeysAndValues(Attention { head_dim, .. }) in layers {
            // A query and a mix, the weights of a chunk, and a number for each work-item.
            let needed = (2 * head_dim + CHUNK + WORK_GROUP_SIZE) * size_of::<f32>();
            if needed as u64 > self.queue.limits().local_bytes {
                let what = format!("heads of {head_dim} values, which need {needed} bytes of local memory,");
                return Err(unsupported(what));
            }
        }
        Ok(())
    }

    pub(super) fn attention(
        &mut self,
        weights: &AttentionWeights<Self>,
        cache: &Cache,
        layer: usize,
        batch: &DeviceBatch,
        hidden: &Rows,
    ) -> Result<Rows, EngineError> {
        let spec = &weights.spec;
        let normed = self.normed(hidden, weights.norm.as_ref())?;
        let codes = self.encode(normed.as_ref().unwrap_or(hidden))?;
        let mut queries = self.product(&weights.query_key_value, 0, &codes)?;
        let mut keys = self.product(&weights.query_key_value, 1, &codes)?;
        let values = self.product(&weights.query_key_value, 2, &codes)?;
        for (rows, norm) in [(&mut queries, &weights.query_norm), (&mut keys, &weights.key_norm)] {
            self.norm_and_rotate(spec, norm.as_ref(), &batch.rotations[spec.rope], rows)?;
        }
        let cached = &cache.layers[layer];
        self.write_cache(spec, cache.element, batch, &keys, &cached.keys)?;
        self.write_cache(spec, cache.element, batch, &values, &cached.values)?;
        let mixed = self.allocate_rows(batch.rows, spec.query_width())?;
        let ([keys, key_scales], [values, value_scales]) = (cached.keys.args(), cached.values.args());
        let arguments = [
            queries.arg(),
            keys,
            key_scales,
            values,
            value_scales,
            batch.pages.arg(),
            batch.first_pages.arg(),
            batch.positions.arg(),
            weights.sinks.as_ref().map_or_else(Arg::unused, Arg::of),
            Arg::flag(weights.sinks.is_some()),
            Arg::int(spec.heads),
            Arg::int(spec.kv_heads),
            Arg::int(spec.head_dim),
            Arg::Float(spec.scale),
            Arg::Float(spec.softcap.unwrap_or(0.0)),
            Arg::flag(spec.softcap.is_some()),
            Arg::int(spec.window.unwrap_or(usize::MAX)),
            mixed.arg(),
            Arg::Local(spec.head_dim * size_of::<f32>()),
            Arg::Local(spec.head_dim * size_of::<f32>()),
        ];
        let set = KernelSet::Attention(cache.element);
        let visible = batch.visible_max.min(spec.window.unwrap_or(usize::MAX));
        let work = (2 * spec.query_width()).saturating_mul(visible) as u64;
        self.queue.run_in_parts(set, "attend", &arguments, ((spec.heads, batch.rows), WORK_GROUP_SIZE), work)?;
        let codes = self.encode(&mixed)?;
        self.product(&weights.output, 0, &codes)
    }

    /// Norms (if the model does) and rotates the heads of rows of queries or keys.
    fn norm_and_rotate(
        &mut self,
        spec: &Attention,
        norm: Option<&Norm<Self>>,
        rotation: &Rotation,
        rows: &mut Rows,
    ) -> Result<(), EngineError> {
        let per_head = spec.query_key_norm == Some(QueryKeyNorm::PerHead);
        let width = if per_head { spec.head_dim } else { rows.width };
        if let Some(norm) = norm {
            *rows = self.normed_parts(rows, norm, width)?;
        }
        let heads = rows.width / spec.head_dim;
        let count = rows.count * heads * rotation.pairs;
        let arguments = [
            rows.arg(),
            rotation.cosines.arg(),
            rotation.sines.arg(),
            Arg::int(rotation.pairs),
            Arg::int(heads),
            Arg::int(spec.head_dim),
            Arg::flag(rotation.pairing == Pairing::Neighbours),
            Arg::int(count),
        ];
        self.each(KernelSet::Rows, "rotate_heads", count, &arguments)
    }

    fn write_cache(
        &mut self,
        spec: &Attention,
        element: KvElement,
        batch: &DeviceBatch,
        rows: &Rows,
        to: &Vectors,
    ) -> Result<(), EngineError> {
        let count = batch.rows * spec.kv_heads * spec.head_dim.div_ceil(BLOCK);
        let [values, scales] = to.args();
        let arguments = [
            rows.arg(),
            batch.slots.arg(),
            Arg::int(spec.kv_heads),
            Arg::int(spec.head_dim),
            Arg::int(count),
            values,
            scales,
        ];
        self.each(KernelSet::Attention(element), "write_cache", count, &arguments)
    }
}
