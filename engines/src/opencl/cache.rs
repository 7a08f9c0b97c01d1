//! Keys and values of a shard on the device.

use super::queue::{Arg, Queue};
use crate::backend::LayerState;
use crate::engine::{KvElement, PAGE_TOKENS};
use crate::error::EngineError;
use crate::kv_element::BLOCK;
use crate::model::Attention;
use opencl3::memory::Buffer;

/// The keys and values of all layers.
#[derive(Debug)]
pub struct Cache {
    pub(super) element: KvElement,
    pub(super) layers: Vec<CachedLayer>,
}

/// The keys and values of a layer: `kernels/attention.cl` describes their order.
#[derive(Debug)]
pub(super) struct CachedLayer {
    pub(super) keys: Vectors,
    pub(super) values: Vectors,
}

/// Keys or values.
#[derive(Debug)]
pub(super) struct Vectors {
    values: Buffer<u8>,
    /// Scales of bytes; a byte that nobody reads for other types.
    scales: Buffer<u8>,
    /// Bytes of the values of a page.
    page_bytes: usize,
    /// Bytes of the scales of a page.
    page_scale_bytes: usize,
}

impl Cache {
    pub(super) fn new(
        queue: &Queue,
        layers: &[LayerState<'_>],
        element: KvElement,
        pages: u32,
    ) -> Result<Self, EngineError> {
        let layer = |&LayerState::KeysAndValues(spec): &LayerState<'_>| {
            let vectors = || Vectors::new(queue, spec, element, pages);
            Ok(CachedLayer { keys: vectors()?, values: vectors()? })
        };
        Ok(Self { element, layers: layers.iter().map(layer).collect::<Result<_, EngineError>>()? })
    }

    pub(super) fn copy_page(&self, queue: &mut Queue, from: u32, to: u32) -> Result<(), EngineError> {
        for layer in &self.layers {
            layer.keys.copy_page(queue, from, to)?;
            layer.values.copy_page(queue, from, to)?;
        }
        Ok(())
    }
}

impl Vectors {
    fn new(queue: &Queue, spec: &Attention, element: KvElement, pages: u32) -> Result<Self, EngineError> {
        let page_heads = PAGE_TOKENS as usize * spec.kv_heads;
        let (value_bytes, scales) = match element {
            KvElement::F16 => (2, 0),
            KvElement::F32 => (4, 0),
            KvElement::Q8_0 => (1, spec.head_dim.div_ceil(BLOCK)),
        };
        let (page_bytes, page_scale_bytes) = (page_heads * spec.head_dim * value_bytes, page_heads * scales * 2);
        let allocate = |page: usize| queue.allocate(page.saturating_mul(pages as usize), "the cache");
        let (values, scales) = (allocate(page_bytes)?, allocate(page_scale_bytes)?);
        Ok(Self { values, scales, page_bytes, page_scale_bytes })
    }

    pub(super) fn args(&self) -> [Arg; 2] {
        [Arg::of(&self.values), Arg::of(&self.scales)]
    }

    fn copy_page(&self, queue: &mut Queue, from: u32, to: u32) -> Result<(), EngineError> {
        let (from, to) = (from as usize, to as usize);
        queue.copy(&self.values, from * self.page_bytes, to * self.page_bytes, self.page_bytes)?;
        if self.page_scale_bytes > 0 {
            let bytes = self.page_scale_bytes;
            queue.copy(&self.scales, from * bytes, to * bytes, bytes)?;
        }
        Ok(())
    }
}
