//! Keys and values of a shard's layers, in pages.
//!
//! A page holds [`PAGE_TOKENS`] tokens of all key heads of one layer. Keys are stored by dimension, then token, so that
//! one vector scores sixteen keys; values are stored by token, then dimension, so that one vector weights sixteen
//! dimensions. All memory is reserved at the start, and becomes resident as pages are used.

use super::lines::Lines;
use crate::arithmetic::cache;
use crate::engine::{KvElement, PAGE_TOKENS};
use crate::model::Attention;
use crate::simd::{LANES, Simd};

/// Tokens in a page, as an index.
pub(super) const TOKENS: usize = PAGE_TOKENS as usize;

/// The keys and values of all layers of a shard, in pages of [`PAGE_TOKENS`] tokens.
#[derive(Debug)]
pub struct KvCache {
    pub(super) layers: Vec<LayerCache>,
}

#[derive(Debug)]
pub(super) struct LayerCache {
    pub(super) element: KvElement,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    keys: Lines,
    values: Lines,
}

impl KvCache {
    /// Reserves `pages` pages for each layer; `None` if the operating system refuses the memory.
    pub(super) fn new(layers: &[&Attention], element: KvElement, pages: u32) -> Option<Self> {
        let layers = layers.iter().map(|spec| LayerCache::new(spec, element, pages));
        Some(Self { layers: layers.collect::<Option<_>>()? })
    }

    /// The memory of such a cache when all pages are used, in bytes.
    pub(super) fn bytes(layers: &[&Attention], element: KvElement, pages: u32) -> u64 {
        let page = |spec: &&Attention| {
            let layer = LayerCache::empty(spec, element);
            (layer.key_page_bytes() as u64).saturating_add(layer.value_page_bytes() as u64)
        };
        layers.iter().map(page).fold(0, u64::saturating_add).saturating_mul(u64::from(pages))
    }
}

/// Memory that becomes resident as it is written to; `None` if the operating system refuses it.
fn reserved(pages: u32, page_bytes: usize) -> Option<Lines> {
    Lines::reserved(page_bytes.checked_mul(pages as usize)?).ok()
}

impl LayerCache {
    fn empty(spec: &Attention, element: KvElement) -> Self {
        Self {
            element,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            keys: Lines::default(),
            values: Lines::default(),
        }
    }

    fn new(spec: &Attention, element: KvElement, pages: u32) -> Option<Self> {
        let mut cache = Self::empty(spec, element);
        cache.keys = reserved(pages, cache.key_page_bytes())?;
        cache.values = reserved(pages, cache.value_page_bytes())?;
        Some(cache)
    }

    /// The dimension of a head's values, padded to whole vectors.
    pub(super) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Bytes of the keys of a head in a page.
    fn head_key_bytes(&self) -> usize {
        self.element.vector_bytes(self.head_dim) * TOKENS
    }

    fn head_value_bytes(&self) -> usize {
        self.element.vector_bytes(self.padded_dim()) * TOKENS
    }

    fn key_page_bytes(&self) -> usize {
        self.kv_heads * self.head_key_bytes()
    }

    fn value_page_bytes(&self) -> usize {
        self.kv_heads * self.head_value_bytes()
    }

    /// The keys of `head` in `page`: \[dimension]\[token]; then, in q8_0, the scales: \[block]\[token].
    pub(super) fn keys(&self, page: u32, head: usize) -> &[u8] {
        let length = self.head_key_bytes();
        &self.keys.bytes()[page as usize * self.key_page_bytes() + head * length..][..length]
    }

    /// The values of `head` in `page`: \[token]\[padded dimension]; then, in q8_0, the scales: \[block]\[token].
    pub(super) fn values(&self, page: u32, head: usize) -> &[u8] {
        let length = self.head_value_bytes();
        &self.values.bytes()[page as usize * self.value_page_bytes() + head * length..][..length]
    }

    /// Copies page `from` over page `to`.
    pub(super) fn copy_page(&mut self, from: u32, to: u32) {
        let (keys, values) = (self.key_page_bytes(), self.value_page_bytes());
        self.keys.bytes_mut().copy_within(from as usize * keys..(from as usize + 1) * keys, to as usize * keys);
        let start = from as usize * values;
        self.values.bytes_mut().copy_within(start..start + values, to as usize * values);
    }

    /// Writes one token's keys and values, each \[head]\[dimension], to `slot` of `page`.
    #[inline(always)]
    pub(super) fn write<S: Simd>(&mut self, page: u32, slot: usize, keys: &[f32], values: &[f32]) {
        let (head_dim, padded) = (self.head_dim, self.padded_dim());
        let key_page = page as usize * self.key_page_bytes();
        let value_page = page as usize * self.value_page_bytes();
        let (key_bytes, value_bytes) = (self.head_key_bytes(), self.head_value_bytes());
        for head in 0..self.kv_heads {
            let of_head = head * head_dim..(head + 1) * head_dim;
            let to_keys = &mut self.keys.bytes_mut()[key_page + head * key_bytes..][..key_bytes];
            let to_values = &mut self.values.bytes_mut()[value_page + head * value_bytes..][..value_bytes];
            // The places of a token's first value, and the steps to its next.
            let key_place = Place { first: slot, step: TOKENS, scales: head_dim * TOKENS };
            let value_place = Place { first: slot * padded, step: 1, scales: padded * TOKENS };
            match self.element {
                KvElement::Q8_0 => {
                    put_bytes(&keys[of_head.clone()], to_keys, slot, &key_place);
                    put_bytes(&values[of_head], to_values, slot, &value_place);
                }
                element => {
                    put_floats::<S>(element, &keys[of_head.clone()], to_keys, &key_place);
                    put_floats::<S>(element, &values[of_head], to_values, &value_place);
                }
            }
        }
    }
}

/// Where the values of a token are in a page, counted in values.
struct Place {
    first: usize,
    step: usize,
    /// The end of all values, where scales begin.
    scales: usize,
}

#[inline(always)]
fn put_floats<S: Simd>(element: KvElement, values: &[f32], page: &mut [u8], place: &Place) {
    let size = element.vector_bytes(1);
    for (index, chunk) in values.chunks(LANES).enumerate() {
        let encoded = encode::<S>(element, chunk);
        let first = place.first + index * LANES * place.step;
        if place.step == 1 {
            page[first * size..][..chunk.len() * size].copy_from_slice(&encoded[..chunk.len() * size]);
        } else {
            for (i, bytes) in encoded.chunks(size).take(chunk.len()).enumerate() {
                page[(first + i * place.step) * size..][..size].copy_from_slice(bytes);
            }
        }
    }
}

#[inline(always)]
fn put_bytes(values: &[f32], page: &mut [u8], slot: usize, place: &Place) {
    for (index, block) in values.chunks(cache::BLOCK).enumerate() {
        let mut codes = [0; cache::BLOCK];
        let scale = cache::encode(block, &mut codes);
        for (i, code) in codes.into_iter().take(block.len()).enumerate() {
            page[place.first + (index * cache::BLOCK + i) * place.step] = code as u8;
        }
        page[place.scales + (index * TOKENS + slot) * 2..][..2].copy_from_slice(&scale.to_ne_bytes());
    }
}

/// Encodes up to sixteen values as floats of the cache's type.
#[inline(always)]
fn encode<S: Simd>(element: KvElement, chunk: &[f32]) -> [u8; LANES * 4] {
    let mut padded = [0.0; LANES];
    padded[..chunk.len()].copy_from_slice(chunk);
    let mut out = [0; LANES * 4];
    match element {
        // SAFETY: both buffers hold sixteen lanes, and loads and stores need no alignment.
        KvElement::F16 => unsafe {
            let mut halves = [0_u16; LANES];
            S::store_f16(halves.as_mut_ptr(), S::load(padded.as_ptr()));
            for (bytes, half) in out.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
                *bytes = half.to_ne_bytes();
            }
        },
        KvElement::F32 | KvElement::Q8_0 => {
            for (bytes, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(padded) {
                *bytes = value.to_ne_bytes();
            }
        }
    }
    out
}
