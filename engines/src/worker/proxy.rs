//! The node's side of an engine in a worker.

use super::RELEASE_WITHIN;
use super::channel::{Channel, ChannelError, VALUES_MAX};
use super::check::Shape;
use super::message::{Hello, LogLevel, Reply, Request};
use super::process::Process;
use super::shorten::{self, TEXT_MAX};
use super::stderr::Stderr;
use crate::engine::{
    DeviceId, DeviceRates, DeviceReport, Engine, EngineProcess, Input, LoadProgress, LoadReport, Output, OutputRows,
    RowQuery, Runtime, Scores, SelfTestReport, ShardSpec, Step, WarmUpReport,
};
use crate::error::EngineError;
use crate::hardware::PciAddress;
use crate::model::WeightSource;
use crate::profile::Profile;
use std::borrow::Cow;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

/// How long a started program may take to say that it is a worker.
const GREETS_WITHIN: Duration = Duration::from_secs(30);
/// How long drivers may take to list their devices. Those of many GPUs that sleep take long.
const LISTS_WITHIN: Duration = Duration::from_secs(60);

/// An engine in a worker.
#[derive(Debug)]
pub(super) struct WorkerEngine {
    engine: &'static str,
    device: DeviceId,
    /// The PCI address of the device when it was listed.
    address: Option<PciAddress>,
    /// `None`: the worker was killed, or has ended.
    channel: Option<Channel>,
    process: Arc<Process>,
    stderr: Stderr,
    /// Whether the worker has opened its engine.
    is_open: bool,
    shape: Shape,
}

impl WorkerEngine {
    pub(super) fn new(
        engine: &'static str,
        (device, address): (DeviceId, Option<PciAddress>),
        channel: Channel,
        process: Process,
        stderr: Stderr,
    ) -> Self {
        let (channel, process) = (Some(channel), Arc::new(process));
        Self { engine, device, address, channel, process, stderr, is_open: false, shape: Shape::default() }
    }

    /// Lists the devices of the engine.
    pub(super) fn devices(&mut self) -> Result<Vec<DeviceReport>, EngineError> {
        let (engine, log) = (Cow::Borrowed(self.engine), LogLevel::of_this_process());
        match self.list(&Request::Probe { engine, log }, "a list of devices")? {
            Reply::Devices(mut devices) => {
                shorten::devices(&mut devices);
                Ok(devices)
            }
            _ => Err(self.broken("a reply to another request than one for devices")),
        }
    }

    /// Tells what the engine needs at run time.
    pub(super) fn runtime(&mut self) -> Result<Runtime, EngineError> {
        let (engine, log) = (Cow::Borrowed(self.engine), LogLevel::of_this_process());
        match self.list(&Request::Runtime { engine, log }, "a list of runtimes")? {
            Reply::Runtime(mut runtime) => {
                shorten::runtime(&mut runtime);
                Ok(runtime)
            }
            _ => Err(self.broken("a reply to another request than one for runtimes")),
        }
    }

    /// Asks something before an engine is open.
    fn list(&mut self, request: &Request<'_>, what: &str) -> Result<Reply, EngineError> {
        self.greet()?;
        self.request(request, &[])?;
        let channel = self.channel.as_mut().ok_or(EngineError::NotLoaded)?;
        let received = channel.set_patience(Some(LISTS_WITHIN)).map_err(ChannelError::from);
        match received.and_then(|()| channel.receive(0)) {
            Ok((Reply::Failed(error), _)) => Err(error.shortened(TEXT_MAX)),
            Ok((reply, _)) => Ok(reply),
            Err(error) => Err(self.silent(what, LISTS_WITHIN, error)),
        }
    }

    /// Ends a worker that has not answered.
    fn silent(&mut self, from: &str, waited: Duration, error: ChannelError) -> EngineError {
        match error {
            ChannelError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.kill();
                EngineError::Killed { from: from.to_owned(), seconds: waited.as_secs() }
            }
            error => self.ended(&error),
        }
    }

    fn request(&mut self, request: &Request<'_>, values: &[f32]) -> Result<(), EngineError> {
        let sent = self.channel.as_mut().ok_or(EngineError::NotLoaded)?.send(request, values);
        sent.map_err(|error| self.ended(&error))
    }

    /// Waits for a reply with at most `values_max` values.
    fn reply(&mut self, values_max: usize) -> Result<(Reply, Vec<f32>), EngineError> {
        let received = self.channel.as_mut().ok_or(EngineError::NotLoaded)?.receive(values_max);
        match received {
            // The node itself interrupts loads.
            Ok((Reply::Failed(EngineError::Interrupted), _)) => Err(self.broken("an interruption")),
            Ok((Reply::Failed(error), _)) => {
                self.channel = None;
                Err(error.shortened(TEXT_MAX))
            }
            Ok(reply) => Ok(reply),
            Err(error) => Err(self.ended(&error)),
        }
    }

    /// Sends a request, and waits for its reply with at most `values_max` values.
    fn ask(
        &mut self,
        request: &Request<'_>,
        values: &[f32],
        values_max: usize,
    ) -> Result<(Reply, Vec<f32>), EngineError> {
        self.request(request, values)?;
        self.reply(values_max)
    }

    /// Ends the worker without waiting for that.
    fn kill(&mut self) {
        self.process.kill();
        self.channel = None;
    }

    /// Waits for the worker's start, and opens its engine, unless that is done.
    fn open(&mut self) -> Result<(), EngineError> {
        if self.is_open {
            return Ok(());
        }
        self.greet()?;
        let (engine, device) = (Cow::Borrowed(self.engine), Cow::Owned(self.device.clone()));
        let (address, log) = (self.address, LogLevel::of_this_process());
        match self.ask(&Request::Open { engine, device, address, log }, &[], 0)?.0 {
            Reply::Opened => {
                self.is_open = true;
                Ok(())
            }
            _ => Err(self.broken("a reply to another request than an opening")),
        }
    }

    /// Checks that the worker is a program of this version.
    fn greet(&mut self) -> Result<(), EngineError> {
        let channel = self.channel.as_mut().ok_or(EngineError::NotLoaded)?;
        let received = channel.set_patience(Some(GREETS_WITHIN)).map_err(ChannelError::from);
        let received = received.and_then(|()| channel.receive::<Hello>(0));
        let received = received.and_then(|hello| Ok(channel.set_patience(None).map(|()| hello)?));
        match received {
            Ok((hello, _)) if hello == Hello::own() => Ok(()),
            Ok((hello, _)) => Err(self.give_up(hello.to_string())),
            Err(ChannelError::Io(error)) => Err(self.silent("its start", GREETS_WITHIN, ChannelError::Io(error))),
            Err(_) => Err(self.give_up("another program".to_owned())),
        }
    }

    fn give_up(&mut self, found: String) -> EngineError {
        self.kill();
        EngineError::WorkerVersion { found, expected: Hello::own().to_string() }.shortened(TEXT_MAX)
    }

    /// Ends a worker that has broken off, and says why.
    fn ended(&mut self, error: &ChannelError) -> EngineError {
        self.channel = None;
        if let ChannelError::Io(_) = error {
            // Its end says more than the broken channel. A worker that still runs has closed the channel itself.
            self.process.wait_at_most(RELEASE_WITHIN);
        }
        self.process.kill();
        let end = self.process.wait();
        let what = match error {
            ChannelError::Io(_) => end,
            error => format!("{error} ({end})"),
        };
        EngineError::WorkerEnded { what, last_lines: self.stderr.last_lines() }
    }

    /// Ends a worker whose numbers are wrong.
    fn wrong(&mut self, what: String) -> EngineError {
        self.kill();
        EngineError::Numerics { device: self.device.to_string(), what }
    }

    fn broken(&mut self, what: &str) -> EngineError {
        self.ended(&ChannelError::Message(super::message::MessageError::Decode(what.to_owned())))
    }
}

impl Engine for WorkerEngine {
    fn self_test(&mut self) -> Result<SelfTestReport, EngineError> {
        self.open()?;
        match self.ask(&Request::SelfTest, &[], 0)?.0 {
            Reply::Tested(report) => Ok(report),
            _ => Err(self.broken("a reply to another request than a self-test")),
        }
    }

    fn measure(&mut self) -> Result<DeviceRates, EngineError> {
        self.open()?;
        match self.ask(&Request::Measure, &[], 0)?.0 {
            Reply::Measured(rates) => Ok(rates),
            _ => Err(self.broken("a reply to another request than a measurement")),
        }
    }

    fn load(
        &mut self,
        shard: &ShardSpec,
        weights: &WeightSource,
        on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError> {
        self.open()?;
        self.shape = Shape { hidden: shard.architecture.hidden, vocabulary: shard.architecture.vocabulary };
        self.request(&Request::Load { shard: Cow::Borrowed(shard), weights: Cow::Borrowed(weights) }, &[])?;
        loop {
            match self.reply(0)?.0 {
                Reply::Progress(progress) => {
                    if on(progress).is_break() {
                        self.kill();
                        return Err(EngineError::Interrupted);
                    }
                }
                Reply::Loaded(report) => return Ok(report),
                _ => return Err(self.broken("a reply to another request than a load")),
            }
        }
    }

    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError> {
        match self.ask(&Request::WarmUp, &[], 0)?.0 {
            Reply::WarmedUp(report) => Ok(report),
            _ => Err(self.broken("a reply to another request than a warm-up")),
        }
    }

    fn forward(&mut self, step: &Step, input: Input, queries: &[RowQuery]) -> Result<Output, EngineError> {
        let (tokens, hidden) = match &input {
            Input::Tokens(tokens) => (Some(Cow::Borrowed(tokens.as_slice())), [].as_slice()),
            Input::Hidden(values) => (None, values.as_slice()),
        };
        let request = Request::Forward { step: Cow::Borrowed(step), tokens, queries: Cow::Borrowed(queries) };
        let widest = self.shape.hidden.max(self.shape.vocabulary);
        let values_max = step.rows.len().saturating_mul(widest).min(VALUES_MAX);
        let (reply, values) = self.ask(&request, hidden, values_max)?;
        let Reply::Output { scores, memory_bytes, pages_used } = reply else {
            return Err(self.broken("a reply to another request than a step"));
        };
        if let Err(what) = self.shape.check(step.rows.len(), queries, scores.as_deref(), &values) {
            return Err(self.wrong(what));
        }
        let rows = match scores {
            None => OutputRows::Hidden(values),
            Some(rows) => OutputRows::Scores(Scores { rows, values }),
        };
        Ok(Output { rows, memory_bytes, pages_used })
    }

    fn logits(&mut self, row: usize) -> Result<Vec<f32>, EngineError> {
        let (reply, values) = self.ask(&Request::Logits { row }, &[], self.shape.vocabulary)?;
        let Reply::Logits = reply else {
            return Err(self.broken("a reply to another request than one for logits"));
        };
        match self.shape.check_logits(&values) {
            Ok(()) => Ok(values),
            Err(what) => Err(self.wrong(what)),
        }
    }

    fn take_profile(&mut self) -> Profile {
        match self.ask(&Request::TakeProfile, &[], 0) {
            Ok((Reply::Profile(profile), _)) => *profile,
            // The next step reports a broken worker.
            _ => Profile::default(),
        }
    }

    fn process(&self) -> Option<EngineProcess> {
        let process = Arc::clone(&self.process);
        Some(EngineProcess::new(process.id(), move || process.kill()))
    }
}

impl Drop for WorkerEngine {
    /// Closes the channel, so that the worker releases its device, and waits for its end on the engine's thread.
    fn drop(&mut self) {
        if self.channel.take().is_none() || !self.process.wait_at_most(RELEASE_WITHIN) {
            self.process.kill();
        }
        self.process.wait();
    }
}
