//! Device memory for activations, kept for later steps.

use super::queue::{Arg, Queue};
use crate::error::EngineError;
use opencl3::memory::Buffer;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Buffers that no rows use now. Queued kernels may still use them: the queue runs in order, so the next user waits.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: RefCell<Vec<(usize, Buffer<u8>)>>,
    /// The bytes of all buffers, in use or not.
    bytes: Cell<u64>,
}

/// Device memory from a pool. It returns there when it is dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    buffer: Option<(usize, Buffer<u8>)>,
    pool: Rc<Pool>,
}

impl Pool {
    /// The bytes of all buffers.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Returns memory of at least `bytes`, with arbitrary contents.
    pub(super) fn take(self: &Rc<Self>, queue: &Queue, bytes: usize) -> Result<Scratch, EngineError> {
        // Sizes are powers of two, so that steps of other sizes find them again.
        let largest = usize::try_from(queue.limits().buffer_max_bytes).unwrap_or(usize::MAX);
        let size = bytes.max(256).next_power_of_two().min(largest).max(bytes);
        let known = {
            let mut free = self.free.borrow_mut();
            let found = free.iter().position(|(known, _)| *known == size);
            found.map(|index| free.swap_remove(index).1)
        };
        let buffer = match known {
            Some(buffer) => buffer,
            None => {
                let buffer = queue.allocate(size, "activations")?;
                self.bytes.set(self.bytes.get() + size as u64);
                buffer
            }
        };
        Ok(Scratch { buffer: Some((size, buffer)), pool: Rc::clone(self) })
    }
}

impl Scratch {
    pub(super) fn arg(&self) -> Arg {
        self.buffer.as_ref().map_or_else(Arg::unused, |(_, buffer)| Arg::of(buffer))
    }

    /// Copies `values` to the beginning.
    pub(super) fn write<T: bytemuck::NoUninit>(&mut self, queue: &Queue, values: &[T]) -> Result<(), EngineError> {
        match &mut self.buffer {
            Some((_, buffer)) => queue.write(buffer, 0, values),
            None => Ok(()),
        }
    }

    /// Reads floats from byte `offset` on.
    pub(super) fn read(&self, queue: &Queue, offset: usize, values: &mut [f32]) -> Result<(), EngineError> {
        match &self.buffer {
            Some((_, buffer)) => queue.read(buffer, offset, values),
            None => Ok(()),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.pool.free.borrow_mut().extend(self.buffer.take());
    }
}
