//! This program as the process of an engine.
//!
//! A node starts its own program again for each engine that runs in a process of its own, with a variable in the
//! environment ([`VARIABLE`](crate::config::WORKER_VARIABLE)) that says so. A program that does not look for it would
//! start twice instead, so a node isolates its engines only if the program has looked.

use crate::config;
use exo_engines::candle::CandleFactory;
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::EngineFactory;
use exo_engines::worker::{self, WorkerCommand};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this program has looked if it is to be a worker, while it still had one thread.
static HAS_LOOKED: AtomicBool = AtomicBool::new(false);

/// Serves an engine if a node has started this process for that, and then ends the process; else returns at once.
///
/// Call it first in `main`, before anything opens a file or starts a thread: `#[tokio::main]` starts threads before its
/// body runs, so an asynchronous `main` has to be a function that `main` calls. Without the call, a node of this
/// program runs its engines on threads, where one that crashes takes the program along.
pub fn run_worker_if_asked() {
    if let Some(threads) = config::worker_threads() {
        worker::serve(&factories(threads));
    }
    if worker::has_other_threads() {
        tracing::warn!(
            "engines stay on threads: `run_worker_if_asked` has to come before anything that starts a thread"
        );
    } else {
        HAS_LOOKED.store(true, Ordering::Relaxed);
    }
}

/// The factories that are built in, best first.
pub(crate) fn factories(threads: usize) -> Vec<Arc<dyn EngineFactory>> {
    vec![Arc::new(CpuFactory::new(threads)), Arc::new(CandleFactory)]
}

/// The command that runs this program as a worker; `None` if the program does not call [`run_worker_if_asked`].
pub(crate) fn own_command(threads: usize) -> Option<WorkerCommand> {
    if !HAS_LOOKED.load(Ordering::Relaxed) {
        return None;
    }
    // On Linux this is the running program even after an update has replaced its file.
    let running = PathBuf::from("/proc/self/exe");
    let program = if running.exists() { running } else { std::env::current_exe().ok()? };
    Some(command(program, threads))
}

/// The command that runs `program` as a worker. The argument tells people what the process is for.
pub(crate) fn command(program: PathBuf, threads: usize) -> WorkerCommand {
    WorkerCommand {
        program,
        arguments: vec!["engine-worker".into()],
        environment: vec![(config::WORKER_VARIABLE.into(), threads.to_string().into())],
    }
}
