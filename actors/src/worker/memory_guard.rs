//! The guard of a shard's memory.

use crate::core::spec::InstanceId;
use crate::transport::callback::EventCallback;

/// A claim of memory for a shard of an instance. Each user of the memory holds the guard, the engine's thread included.
/// When the last holder drops the guard, the memory is free again, and the guard calls `on_release`.
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
