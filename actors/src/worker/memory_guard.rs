//! A guard of an instance's memory.

use crate::core::spec::InstanceId;
use crate::transport::callback::EventCallback;

/// Claims memory for an instance. Everything that uses the memory holds the guard, up to the engine's thread; when the last
/// holder drops it, the memory is free again and the creator is told.
#[derive(Debug)]
pub(crate) struct MemoryGuard {
    pub(crate) instance: InstanceId,
    pub(crate) bytes: u64,
    /// Receives the instance and the bytes.
    pub(crate) on_release: EventCallback<(InstanceId, u64)>,
}

impl Drop for MemoryGuard {
    fn drop(&mut self) {
        self.on_release.tell((self.instance, self.bytes));
    }
}
