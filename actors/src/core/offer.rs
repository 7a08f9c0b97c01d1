//! What a device offers to shards, and the memory that devices share.

use crate::core::speed::Speed;
use exo_engines::engine::{DeviceId, DeviceMemory, DeviceReport};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};

/// A device that can host shards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The device's node.
    pub node: NodeId,
    /// The device.
    pub device: DeviceId,
    /// The memory that the device uses.
    pub pool: MemoryPool,
    /// Memory of that pool that shards may use. Offers of the same pool share it.
    pub free_bytes: u64,
    /// Bytes of work that the device computes per second while decoding: measured or guessed.
    pub speed: Speed,
}

/// The memory of a node that some of its devices use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum MemoryPool {
    /// The machine's: that of CPUs and integrated GPUs.
    Machine,
    /// A card's own memory. Its key is the card's PCI address, so it is one pool, whichever engines see the card; or
    /// the device's id where the address is unknown.
    Card(String),
}

impl MemoryPool {
    /// The pool of a device.
    pub fn of(device: &DeviceReport) -> Self {
        match device.memory {
            DeviceMemory::Shared => Self::Machine,
            DeviceMemory::Dedicated { .. } => {
                Self::Card(device.pci_address().map_or_else(|| device.id.to_string(), |address| address.to_string()))
            }
        }
    }
}

/// What is known of a pool's memory, in bytes. `None`: unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PoolMemory {
    pub(super) total: Option<u64>,
    pub(super) free: Option<u64>,
    /// What this node's processes use.
    pub(super) own: Option<u64>,
    /// What no shard may take.
    pub(super) reserve: u64,
}

impl PoolMemory {
    /// The memory for further shards, where `promised` bytes are promised to shards, and `freed` bytes of the memory in
    /// use count as free.
    pub(super) fn free_bytes(self, promised: u64, freed: u64) -> u64 {
        // Reserved cache pages take memory only as they fill: what is not touched yet is free now, and soon is not.
        let held = promised.saturating_add(freed);
        let untouched = self.own.map_or(0, |own| held.saturating_sub(own));
        let free = self.free.unwrap_or(u64::MAX).saturating_sub(untouched).saturating_add(freed);
        // Promised memory counts as used before a shard touches it.
        let total = self.total.unwrap_or(u64::MAX);
        free.min(total.saturating_sub(promised)).saturating_sub(self.reserve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages that are reserved and not touched yet are no free memory.
    #[test]
    fn reserved_memory_is_not_free() {
        let gigabytes = |bytes: u64| bytes << 30;
        let known = |bytes| Some(gigabytes(bytes));
        let memory = PoolMemory { total: known(16), free: known(7), own: known(2), reserve: 0 };
        let free = |promised, freed| memory.free_bytes(gigabytes(promised), gigabytes(freed));
        assert_eq!(free(6, 0), gigabytes(3), "four of the six promised are not touched yet");
        assert_eq!(free(0, 6), gigabytes(9), "stopping the instance gives back what it holds, and what it would touch");
        let unknown = PoolMemory { total: known(16), reserve: gigabytes(1), ..PoolMemory::default() };
        assert_eq!(unknown.free_bytes(gigabytes(6), 0), gigabytes(9), "all that is not promised or reserved");
    }
}
