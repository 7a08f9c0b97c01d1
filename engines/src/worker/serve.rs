//! The worker's side: computes what its node asks for, until the node closes the channel.

use super::channel::{Channel, ChannelError, VALUES_MAX};
use super::message::{Hello, Reply, Request};
use super::shared_memory::SharedMemory;
use super::{RELEASE_WITHIN, log};
use crate::engine::{DeviceId, DeviceReport, Engine, EngineFactory, Input, Output, OutputRows, Runtime, Scores};
use crate::error::{DeviceFault, EngineError};
use crate::hardware::PciAddress;
use rustix::process::{Signal, getpid, kill_process};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Serves one engine of `factories` to the node that has started this process with a
/// [`WorkerCommand`](super::WorkerCommand), then ends the process. Call it before anything opens a file or starts a
/// thread.
pub fn serve(factories: &[Arc<dyn EngineFactory>]) -> ! {
    match start() {
        Ok(channel) => {
            let mut worker = Worker { factories, engine: None, channel };
            match worker.run() {
                End::Closed => drop(worker),
                End::Failed => kill_this_process(),
            }
        }
        Err(error) => {
            eprintln!("the worker cannot start: {error}");
            std::process::exit(1)
        }
    }
    std::process::exit(0)
}

/// Ends the process without releasing anything: a device that has failed may not return from a release.
fn kill_this_process() -> ! {
    let _ = kill_process(getpid(), Signal::KILL);
    std::process::abort()
}

/// Takes the node's descriptors, and makes the process end with its node.
fn start() -> io::Result<Channel> {
    if has_other_threads() {
        return Err(io::Error::other(
            "the program has threads already: `main` has to serve before it starts a runtime",
        ));
    }
    close_inherited();
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let memory = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    // What a library prints must not reach the channel.
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    log::start();
    let socket = UnixStream::from(socket);
    end_with(socket.try_clone()?.into())?;
    let mut channel = Channel::new(socket, SharedMemory::received(memory));
    channel.send(&Hello::own(), &[]).map_err(io::Error::other)?;
    Ok(channel)
}

/// Returns whether the program has other threads, on Linux; elsewhere false. [`serve`] closes inherited files, which
/// they may use, so it refuses then.
pub fn has_other_threads() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() > 1)
}

/// Closes the files that the node had open for its own children.
fn close_inherited() {
    let Ok(entries) = std::fs::read_dir("/dev/fd") else { return };
    let open = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    // The folder's own descriptor is among them, so the list is read first.
    let open: Vec<i32> = open.filter(|&descriptor| descriptor > 2).collect();
    for descriptor in open {
        // The folder's descriptor is closed already.
        if rustix::io::fcntl_getfd(borrowed(descriptor)).is_ok() {
            // SAFETY: the process has just started and has one thread, so nothing in it uses the descriptor.
            unsafe { rustix::io::close(descriptor) };
        }
    }
}

fn borrowed<'a>(descriptor: i32) -> std::os::fd::BorrowedFd<'a> {
    // SAFETY: it is used for one call, which reports a descriptor that is not open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) }
}

/// Starts a thread that ends the process some time after the node has gone, whatever the engine does.
fn end_with(socket: OwnedFd) -> io::Result<()> {
    std::thread::Builder::new().name("node-watch".to_owned()).spawn(move || {
        wait_for_end(&socket);
        std::thread::sleep(RELEASE_WITHIN);
        kill_this_process();
    })?;
    Ok(())
}

/// Waits until the node has closed the socket. No event is asked for: Linux reports a closed socket anyway.
#[cfg(target_os = "linux")]
fn wait_for_end(socket: &OwnedFd) {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        let mut watched = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())];
        let is_closed = poll(&mut watched, None).is_ok() && !watched[0].revents().is_empty();
        if is_closed {
            return;
        }
    }
}

/// Waits until the node has ended. Not every system reports a closed socket to those who ask for no event.
#[cfg(not(target_os = "linux"))]
fn wait_for_end(_: &OwnedFd) {
    let node = rustix::process::getppid();
    while rustix::process::getppid() == node {
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
}

struct Worker<'a> {
    factories: &'a [Arc<dyn EngineFactory>],
    engine: Option<Box<dyn Engine>>,
    channel: Channel,
}

/// Why a worker stops serving.
enum End {
    /// The node has closed the channel.
    Closed,
    /// The engine or the channel has failed.
    Failed,
}

impl Worker<'_> {
    fn run(&mut self) -> End {
        loop {
            let (request, values) = match self.channel.receive::<Request<'static>>(VALUES_MAX) {
                Ok(received) => received,
                Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return End::Closed,
                Err(error) => {
                    eprintln!("{error}");
                    return End::Failed;
                }
            };
            let answered = catch_unwind(AssertUnwindSafe(|| self.answer(request, values)));
            let answered = answered.unwrap_or_else(|panic| Err(EngineError::of_panic(&*panic)));
            let is_failed = answered.is_err();
            let (reply, values) = answered.unwrap_or_else(|error| (Reply::Failed(error), Vec::new()));
            if let Err(error) = self.channel.send(&reply, &values) {
                eprintln!("{error}");
                return End::Failed;
            }
            if is_failed {
                return End::Failed;
            }
        }
    }

    fn factory(&self, engine: &str) -> Option<&Arc<dyn EngineFactory>> {
        self.factories.iter().find(|factory| factory.name() == engine)
    }

    fn answer(&mut self, request: Request<'static>, values: Vec<f32>) -> Result<(Reply, Vec<f32>), EngineError> {
        if let Request::Probe { engine, log } = request {
            log::set_level(log);
            let devices = self.factory(&engine).map(|factory| factory.probe()).unwrap_or_default();
            return Ok((Reply::Devices(devices), Vec::new()));
        }
        if let Request::Runtime { engine, log } = request {
            log::set_level(log);
            let runtime = self.factory(&engine).map_or(Runtime::BuiltIn, |factory| factory.runtime());
            return Ok((Reply::Runtime(runtime), Vec::new()));
        }
        if let Request::Open { engine, device, address, log } = request {
            log::set_level(log);
            let factory = self
                .factory(&engine)
                .ok_or_else(|| EngineError::NoDevice { engine: engine.into_owned(), device: device.to_string() })?;
            check_address(&**factory, &device, address)?;
            self.engine = Some(factory.open(&device)?);
            return Ok((Reply::Opened, Vec::new()));
        }
        let engine = self.engine.as_mut().ok_or(EngineError::NotLoaded)?;
        match request {
            Request::SelfTest => Ok((Reply::Tested(engine.self_test()?), Vec::new())),
            Request::Measure => Ok((Reply::Measured(engine.measure()?), Vec::new())),
            Request::Load { shard, weights } => {
                let channel = &mut self.channel;
                let report = engine.load(&shard, &weights, &mut |progress| match channel
                    .send(&Reply::Progress(progress), &[])
                {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                });
                Ok((Reply::Loaded(report?), Vec::new()))
            }
            Request::Forward { step, tokens, queries } => {
                let input = tokens.map_or(Input::Hidden(values), |tokens| Input::Tokens(tokens.into_owned()));
                let Output { rows, memory_bytes, pages_used } = engine.forward(&step, input, &queries)?;
                let (scores, values) = match rows {
                    OutputRows::Hidden(values) => (None, values),
                    OutputRows::Scores(Scores { rows, values }) => (Some(rows), values),
                };
                Ok((Reply::Output { scores, memory_bytes, pages_used }, values))
            }
            Request::Logits { row } => Ok((Reply::Logits, engine.logits(row)?)),
            Request::WarmUp => Ok((Reply::WarmedUp(engine.warm_up()?), Vec::new())),
            Request::TakeProfile => Ok((Reply::Profile(Box::new(engine.take_profile())), Vec::new())),
            Request::Open { .. } | Request::Probe { .. } | Request::Runtime { .. } => {
                Err(EngineError::BadStep { what: "a second engine".to_owned() })
            }
        }
    }
}

/// Checks that a device is the one that was listed: without a card that has fallen off the bus, others take its number.
fn check_address(
    factory: &dyn EngineFactory,
    device: &DeviceId,
    address: Option<PciAddress>,
) -> Result<(), EngineError> {
    let is_it = |report: &DeviceReport| report.id == *device && report.pci_address() == address;
    if address.is_none() || factory.probe().iter().any(is_it) {
        return Ok(());
    }
    let what = "another device has its number".to_owned();
    Err(EngineError::Device { device: device.to_string(), fault: DeviceFault::Lost, what })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::GpuReport;

    /// A machine with one card, as `gpu:0`.
    #[derive(Debug)]
    struct OneCard(PciAddress);

    impl EngineFactory for OneCard {
        fn name(&self) -> &'static str {
            "gpu"
        }

        fn probe(&self) -> Vec<DeviceReport> {
            let gpu = GpuReport { pci_address: Some(self.0), ..GpuReport::default() };
            vec![DeviceReport { gpu: Some(Box::new(gpu)), ..DeviceReport::of_cpu("gpu:0", "gpu", "") }]
        }

        fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
            Err(EngineError::NoDevice { engine: "gpu".to_owned(), device: device.to_string() })
        }
    }

    /// R1.4, R1.5: where the first of two cards is lost, the second has its number, and is not taken for it.
    #[test]
    fn another_card_with_the_same_number_is_not_opened() {
        let address = |bus: u8| PciAddress { domain: 0, bus, device: 0, function: 0 };
        let check = |wanted| check_address(&OneCard(address(4)), &DeviceId("gpu:0".to_owned()), wanted);
        assert_eq!(check(Some(address(4))), Ok(()));
        assert_eq!(check(None), Ok(()));
        assert!(matches!(check(Some(address(3))), Err(EngineError::Device { fault: DeviceFault::Lost, .. })));
    }
}
