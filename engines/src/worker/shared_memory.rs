//! Memory that a node and its worker share, for rows that are too long for the socket.
//!
//! It has a fixed size that neither side can change, so that no access fails; pages are taken as they are written.
//! Both sides read and write with calls, and map nothing: an engine takes rows that it owns, so a mapping would save no
//! copy.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// The size, in bytes: 128 rows of a vocabulary of 128k. Longer rows go through the socket.
const BYTES: u64 = 64 << 20;

#[derive(Debug)]
pub(super) struct SharedMemory(File);

impl SharedMemory {
    /// Reserves memory; `None` if the system has no sealed anonymous files, or refuses one.
    #[cfg(target_os = "linux")]
    pub(super) fn create() -> Option<Self> {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Older kernels do not know the flag, and hardened ones demand it.
        let file = memfd_create("exo-rows", flags | MemfdFlags::NOEXEC_SEAL);
        let file = file.or_else(|_| memfd_create("exo-rows", flags)).ok()?;
        ftruncate(&file, BYTES).ok()?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL).ok()?;
        Some(Self(File::from(file)))
    }

    /// Reserves memory; `None` if the system has no sealed anonymous files, or refuses one.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn create() -> Option<Self> {
        None
    }

    /// Returns the memory behind a descriptor that the node created; `None` if it is another kind of file.
    pub(super) fn received(descriptor: OwnedFd) -> Option<Self> {
        let file = File::from(descriptor);
        let is_shared = file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == BYTES);
        is_shared.then_some(Self(file))
    }

    /// Returns a descriptor for the worker.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    pub(super) fn has_room(&self, bytes: usize) -> bool {
        bytes as u64 <= BYTES
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, 0)
    }

    pub(super) fn read(&self, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, 0)
    }
}
