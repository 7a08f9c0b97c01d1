//! A factory whose engines run in processes of their own.

use super::channel::Channel;
use super::process::WorkerCommand;
use super::proxy::WorkerEngine;
use super::shared_memory::SharedMemory;
use crate::engine::{DeviceId, DeviceReport, Engine, EngineFactory, ProcessNeed};
use crate::error::EngineError;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Opens another factory's engines in processes of their own.
#[derive(Debug, Clone)]
pub struct WorkerFactory {
    factory: Arc<dyn EngineFactory>,
    command: WorkerCommand,
}

impl WorkerFactory {
    /// Creates a factory of the engines of `factory`. `command` runs a program that calls
    /// [`serve`](super::serve()) with an equal factory.
    pub fn new(factory: Arc<dyn EngineFactory>, command: WorkerCommand) -> Self {
        Self { factory, command }
    }

    fn open_worker(&self, device: &DeviceId) -> Result<WorkerEngine, EngineError> {
        self.start(device).map_err(|error| EngineError::WorkerNotStarted {
            program: self.command.program.display().to_string(),
            what: error.to_string(),
        })
    }

    fn start(&self, device: &DeviceId) -> io::Result<WorkerEngine> {
        let (socket, of_worker) = UnixStream::pair()?;
        let memory = SharedMemory::create();
        let descriptor = memory.as_ref().map(SharedMemory::descriptor).transpose()?;
        let (process, stderr) = self.command.start(of_worker.into(), descriptor)?;
        Ok(WorkerEngine::new(self.name(), device.clone(), Channel::new(socket, memory), process, stderr))
    }
}

impl EngineFactory for WorkerFactory {
    fn name(&self) -> &'static str {
        self.factory.name()
    }

    /// Devices of engines that never run on a thread are listed in a process, too: the list loads the driver.
    fn probe(&self) -> Vec<DeviceReport> {
        if self.factory.process_need() != ProcessNeed::Required {
            return self.factory.probe();
        }
        let started = self.open_worker(&DeviceId(String::new()));
        started.and_then(|mut worker| worker.devices()).unwrap_or_else(|error| {
            tracing::warn!(engine = self.name(), %error, remedy = error.remedy(), "devices cannot be listed");
            Vec::new()
        })
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(self.open_worker(device)?))
    }
}
