//! Keys and values of a shard's layers, in pages.
//!
//! A page holds [`PAGE_TOKENS`] tokens of all key heads of one layer. Keys are stored by dimension, then token, so that
//! one vector scores sixteen keys; values are stored by token, then dimension, so that one vector weights sixteen
//! dimensions. All memory is reserved at the start, and becomes resident as pages are used.

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
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl KvCache {
    /// Reserves `pages` pages for each layer; `None` if the operating system refuses the memory.
    pub(super) fn new(layers: &[Attention], element: KvElement, pages: u32) -> Option<Self> {
        let layers = layers.iter().map(|spec| LayerCache::new(spec, element, pages));
        Some(Self { layers: layers.collect::<Option<_>>()? })
    }

    /// The memory of such a cache when all pages are used, in bytes.
    pub(super) fn bytes(layers: &[Attention], element: KvElement, pages: u32) -> u64 {
        let page = |spec: &Attention| {
            let layer = LayerCache::empty(spec, element);
            (layer.key_page_bytes() as u64).saturating_add(layer.value_page_bytes() as u64)
        };
        layers.iter().map(page).fold(0, u64::saturating_add).saturating_mul(u64::from(pages))
    }
}

/// Memory that becomes resident as it is written to; `None` if the operating system refuses it.
fn reserved(pages: u32, page_bytes: usize) -> Option<Vec<u8>> {
    let bytes = page_bytes.checked_mul(pages as usize)?;
    // `vec!` ends the process where memory is refused.
    Vec::<u8>::new().try_reserve_exact(bytes).ok()?;
    Some(vec![0; bytes])
}

impl LayerCache {
    fn empty(spec: &Attention, element: KvElement) -> Self {
        Self { element, kv_heads: spec.kv_heads, head_dim: spec.head_dim, keys: Vec::new(), values: Vec::new() }
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

    fn key_page_bytes(&self) -> usize {
        self.kv_heads * self.head_dim * TOKENS * self.element.bytes()
    }

    fn value_page_bytes(&self) -> usize {
        self.kv_heads * self.padded_dim() * TOKENS * self.element.bytes()
    }

    /// The keys of `head` in `page`: \[dimension]\[token].
    pub(super) fn keys(&self, page: u32, head: usize) -> &[u8] {
        let length = self.head_dim * TOKENS * self.element.bytes();
        &self.keys[page as usize * self.key_page_bytes() + head * length..][..length]
    }

    /// The values of `head` in `page`: \[token]\[padded dimension].
    pub(super) fn values(&self, page: u32, head: usize) -> &[u8] {
        let length = self.padded_dim() * TOKENS * self.element.bytes();
        &self.values[page as usize * self.value_page_bytes() + head * length..][..length]
    }

    /// Copies page `from` over page `to`.
    pub(super) fn copy_page(&mut self, from: u32, to: u32) {
        let (keys, values) = (self.key_page_bytes(), self.value_page_bytes());
        self.keys.copy_within(from as usize * keys..(from as usize + 1) * keys, to as usize * keys);
        let start = from as usize * values;
        self.values.copy_within(start..start + values, to as usize * values);
    }

    /// Writes one token's keys and values, each \[head]\[dimension], to `slot` of `page`.
    #[inline(always)]
    pub(super) fn write<S: Simd>(&mut self, page: u32, slot: usize, keys: &[f32], values: &[f32]) {
        let (head_dim, padded, size) = (self.head_dim, self.padded_dim(), self.element.bytes());
        let key_page = page as usize * self.key_page_bytes();
        let value_page = page as usize * self.value_page_bytes();
        for head in 0..self.kv_heads {
            let key = &keys[head * head_dim..][..head_dim];
            let key_start = key_page + head * head_dim * TOKENS * size;
            for (chunk_index, chunk) in key.chunks(LANES).enumerate() {
                let encoded = encode::<S>(self.element, chunk);
                for i in 0..chunk.len() {
                    let at = key_start + ((chunk_index * LANES + i) * TOKENS + slot) * size;
                    self.keys[at..at + size].copy_from_slice(&encoded[i * size..][..size]);
                }
            }
            let value = &values[head * head_dim..][..head_dim];
            let value_start = value_page + (head * TOKENS + slot) * padded * size;
            for (chunk_index, chunk) in value.chunks(LANES).enumerate() {
                let encoded = encode::<S>(self.element, chunk);
                let at = value_start + chunk_index * LANES * size;
                self.values[at..at + chunk.len() * size].copy_from_slice(&encoded[..chunk.len() * size]);
            }
        }
    }
}

/// Encodes up to sixteen values in the cache's element type.
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
        KvElement::F32 => {
            for (bytes, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(padded) {
                *bytes = value.to_ne_bytes();
            }
        }
    }
    out
}
