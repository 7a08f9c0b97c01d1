//! A factory whose engines run in processes of their own.

use super::channel::Channel;
use super::process::WorkerCommand;
use super::proxy::WorkerEngine;
use super::shared_memory::SharedMemory;
use crate::engine::{DeviceId, DeviceReport, Engine, EngineFactory, ProcessNeed, Runtime};
use crate::error::EngineError;
use crate::hardware::PciAddress;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// How long the thread that lists devices may take: 30 s until its process greets, 60 s for the list, 2 s for the end.
const LIST_THREAD_WITHIN: Duration = Duration::from_secs(100);

/// Opens another factory's engines in processes of their own.
#[derive(Debug, Clone)]
pub struct WorkerFactory {
    factory: Arc<dyn EngineFactory>,
    command: WorkerCommand,
    /// The PCI addresses of the devices that were listed.
    addresses: Arc<Mutex<HashMap<DeviceId, PciAddress>>>,
}

impl WorkerFactory {
    /// Creates a factory of the engines of `factory`. `command` runs a program that calls
    /// [`serve`](super::serve()) with an equal factory.
    pub fn new(factory: Arc<dyn EngineFactory>, command: WorkerCommand) -> Self {
        Self { factory, command, addresses: Arc::default() }
    }

    /// Starts a process, and asks it something before an engine is open.
    fn ask<T: Send + 'static>(&self, ask: fn(&mut WorkerEngine) -> Result<T, EngineError>) -> Result<T, String> {
        let (factory, (answered, answer)) = (self.clone(), sync_channel(1));
        // A process that the kernel does not release is waited for there, not here.
        let thread = std::thread::Builder::new().name("device-list".to_owned()).spawn(move || {
            let started = factory.open_worker(&DeviceId(String::new()));
            // Sending fails if the receiver has given up.
            let _ = answered.send(started.and_then(|mut worker| ask(&mut worker)));
        });
        thread.map_err(|error| error.to_string())?;
        let answer = answer.recv_timeout(LIST_THREAD_WITHIN).map_err(|_| "the process does not end".to_owned())?;
        answer.map_err(|error| format!("{error}; {}", error.remedy()))
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
        let address = self.addresses.lock().get(device).copied();
        let device = (device.clone(), address);
        Ok(WorkerEngine::new(self.name(), device, Channel::new(socket, memory), process, stderr))
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
        let listed = self.ask(WorkerEngine::devices).unwrap_or_else(|what| {
            tracing::warn!(engine = self.name(), what, "devices cannot be listed");
            Vec::new()
        });
        let addresses = listed.iter().filter_map(|report| Some((report.id.clone(), report.pci_address()?)));
        *self.addresses.lock() = addresses.collect();
        listed
    }

    fn runtime(&self) -> Runtime {
        if self.factory.process_need() != ProcessNeed::Required {
            return self.factory.runtime();
        }
        self.ask(WorkerEngine::runtime).unwrap_or_else(|what| Runtime::Failed { what })
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(self.open_worker(device)?))
    }
}
