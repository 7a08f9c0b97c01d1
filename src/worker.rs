//! This program as the process of an engine.
//!
//! A node starts its own program again for each engine that runs in a process of its own, with a variable in the
//! environment ([`VARIABLE`](crate::config::WORKER_VARIABLE)) that says so. A program that does not look for it would
//! start twice instead, so a node isolates its engines only if the program has looked.

use crate::config;
use crate::error::StartError;
use exo_engines::candle::CandleFactory;
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::{EngineFactory, ProcessNeed};
use exo_engines::opencl::OpenClFactory;
use exo_engines::worker::{self, WorkerCommand, WorkerFactory};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// Which of the built-in engines run in processes of their own. The node then survives a crash of an engine, and gets
/// the memory of a hung one back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Isolation {
    /// All but those of the native CPU engine, if this program can run as their process. Without that, the others run
    /// on threads, too, but for GPU engines, which are left out.
    #[default]
    Default,
    /// All.
    All,
    /// None but GPU engines.
    None,
}

/// When this program has called [`run_worker_if_asked`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Called {
    InTime,
    /// It had other threads already, so it could not have served.
    TooLate,
}

/// Set by the first call of [`run_worker_if_asked`].
static CALLED: OnceLock<Called> = OnceLock::new();

/// Serves an engine if a node has started this process for that, and then ends the process; else returns at once.
///
/// Call it first in `main`, before anything opens a file or starts a thread: `#[tokio::main]` starts threads before its
/// body runs, so an asynchronous `main` has to be a function that `main` calls. Without the call, a node of this
/// program has no GPU engine, and runs the others on threads, where one that crashes takes the program along.
pub fn run_worker_if_asked() {
    if let Some(threads) = config::worker_threads() {
        worker::serve(&factories(threads));
    }
    CALLED.get_or_init(|| if worker::has_other_threads() { Called::TooLate } else { Called::InTime });
}

/// The factories that are built in, best first. OpenCL comes last for now: its kernels are made to be right, not fast,
/// so a GPU computes only for those who name it.
pub(crate) fn factories(threads: usize) -> Vec<Arc<dyn EngineFactory>> {
    vec![
        Arc::new(CpuFactory::new(threads)),
        Arc::new(CandleFactory),
        Arc::new(OpenClFactory::intel()),
        Arc::new(OpenClFactory::other_gpus()),
        Arc::new(OpenClFactory::cpu_runtimes()),
    ]
}

/// The command that runs this program as a worker; `None` if the program does not call [`run_worker_if_asked`].
pub(crate) fn own_command(threads: usize) -> Option<WorkerCommand> {
    match CALLED.get()? {
        Called::InTime => {}
        Called::TooLate => {
            tracing::warn!(
                "`run_worker_if_asked` was called too late, after threads were started: see its documentation"
            );
            return None;
        }
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

/// Lets the engines of `factories` run in processes of `command`, as far as they need it or `isolation` wants it.
/// Without a command, engines stay on threads, and those that never run on a thread are left out.
pub(crate) fn isolate(
    factories: Vec<Arc<dyn EngineFactory>>,
    isolation: Isolation,
    command: Option<&WorkerCommand>,
) -> Vec<Arc<dyn EngineFactory>> {
    let isolated = |factory: Arc<dyn EngineFactory>| -> Option<Arc<dyn EngineFactory>> {
        let need = factory.process_need();
        let is_wanted = match isolation {
            Isolation::All => true,
            Isolation::Default => need != ProcessNeed::Optional,
            Isolation::None => need == ProcessNeed::Required,
        };
        match command {
            Some(command) if is_wanted => Some(Arc::new(WorkerFactory::new(factory, command.clone()))),
            None if need == ProcessNeed::Required => {
                let (engine, remedy) = (factory.name(), StartError::NoWorker.to_string());
                tracing::info!(engine, remedy, "an engine is left out that runs only in a process of its own");
                None
            }
            _ => Some(factory),
        }
    };
    factories.into_iter().filter_map(isolated).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use exo_engines::EngineError;
    use exo_engines::engine::{DeviceId, DeviceReport, Engine};

    #[derive(Debug)]
    struct Factory(ProcessNeed);

    impl EngineFactory for Factory {
        fn name(&self) -> &'static str {
            match self.0 {
                ProcessNeed::Optional => "cpu",
                ProcessNeed::Preferred => "candle",
                ProcessNeed::Required => "gpu",
            }
        }

        fn process_need(&self) -> ProcessNeed {
            self.0
        }

        fn probe(&self) -> Vec<DeviceReport> {
            Vec::new()
        }

        fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
            Err(EngineError::NoDevice { engine: self.name().to_owned(), device: device.to_string() })
        }
    }

    /// The engines that a node has, those in processes of their own in capitals.
    fn engines(isolation: Isolation, command: Option<&WorkerCommand>) -> Vec<String> {
        let needs = [ProcessNeed::Required, ProcessNeed::Optional, ProcessNeed::Preferred];
        let factories = needs.map(|need| -> Arc<dyn EngineFactory> { Arc::new(Factory(need)) });
        let isolated = isolate(factories.into(), isolation, command);
        let name = |factory: &Arc<dyn EngineFactory>| match format!("{factory:?}").starts_with("Worker") {
            true => factory.name().to_uppercase(),
            false => factory.name().to_owned(),
        };
        isolated.iter().map(name).collect()
    }

    /// R1.4, R3.1–R3.5: a GPU engine never runs in the node's process: without another one it is left out.
    #[test]
    fn engines_get_processes_as_they_need_them() {
        let command = command(PathBuf::from("exo-node"), 1);
        assert_eq!(engines(Isolation::Default, Some(&command)), ["GPU", "cpu", "CANDLE"]);
        assert_eq!(engines(Isolation::All, Some(&command)), ["GPU", "CPU", "CANDLE"]);
        assert_eq!(engines(Isolation::None, Some(&command)), ["GPU", "cpu", "candle"]);
        for isolation in [Isolation::Default, Isolation::None] {
            assert_eq!(engines(isolation, None), ["cpu", "candle"]);
        }
    }
}
