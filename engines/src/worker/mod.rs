//! Engines in child processes: a driver that crashes, hangs or corrupts memory takes its process along, not the node.
//!
//! ```text
//! node                                                                              child
//! WorkerFactory::open ─► WorkerEngine ─Request─► channel ═ socket, shared memory ═ channel ─► serve ─► Engine
//!        (process: spawn, kill, wait)  ◄─Reply──                                             ◄─
//!        (stderr: log, last lines)     ◄────────────────── stderr ─────────────────── log
//! ```
//! One child computes one shard. Node and child take turns: a request, then its reply. The child can be killed at any
//! moment from any thread ([`EngineProcess`](crate::engine::EngineProcess)); killing does not wait. The engine's own
//! thread waits until the process is gone, because a process that the kernel does not release still holds its memory.
//!
//! A child inherits no file but its own, and ends with its node: on Linux by a signal, elsewhere when its socket
//! closes. It is not reachable from outside.

mod channel;
mod check;
mod factory;
mod log;
mod message;
mod process;
mod proxy;
mod serve;
mod shared_memory;
mod shorten;
mod stderr;

use std::time::Duration;

pub use factory::WorkerFactory;
pub use process::{WorkerCommand, live_processes};
pub use serve::{has_other_threads, serve};

/// How long a worker may take to release its device, once its node has closed the channel. Then it is killed.
const RELEASE_WITHIN: Duration = Duration::from_secs(2);
