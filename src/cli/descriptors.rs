//! The limit on the process's descriptors.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit on descriptors to the hard one: the soft one is low for the sake of programs that use
/// `select`, which this one does not. Returns the limit that holds.
pub(super) fn raise_limit() -> u64 {
    let limits = getrlimit(Resource::Nofile);
    // A system may refuse, as macOS does above its own limit: the old limit holds then.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, maximum: limits.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
