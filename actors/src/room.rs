//! Memory of an instance, as a thing that is held.

use crate::core::spec::InstanceId;
use crate::outlet::Outlet;

/// Held by all that takes memory for an instance, its engines' threads to the last: when nobody holds it any more the
/// room is free again, and whoever gave it hears of that.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) instance: InstanceId,
    pub(crate) bytes: u64,
    /// Hears of it, with the bytes.
    pub(crate) vacated: Outlet<(InstanceId, u64)>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.vacated.tell((self.instance, self.bytes));
    }
}
