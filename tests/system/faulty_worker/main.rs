//! The process of an engine that fails as a variable says, for the tests of faults.
//!
//! `EXO_FAULT` is `PHASE KIND NUMBER PATH`: at the call of this number of the phase, the fault happens if the file is
//! there, and removes it. So each file is one fault, whichever of several processes meets it first. Each start of a
//! process adds a line to the file `PATH.starts`. `EXO_FAULT_OPENCL` lets an OpenCL runtime compute.

#![allow(clippy::expect_used)] // A test that cannot continue panics with the reason.

mod gpu;

use exo_engines::engine::*;
use exo_engines::model::WeightSource;
use exo_engines::{DeviceFault, EngineError};
use gpu::{Computes, GpuFactory};
use rustix::process::{Signal, getpid, kill_process};
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The memory that a leaking engine loses in each step, and the number of such steps.
const LEAK_BYTES: usize = 48 << 20;
const LEAKS_MAX: usize = 8;
/// How much longer a load takes that replaces a leaking process.
const REPLACED_AFTER: Duration = Duration::from_secs(1);

fn main() {
    let plan = Plan::of_this_process().expect("EXO_FAULT is PHASE KIND NUMBER PATH");
    let plan = Arc::new(plan);
    plan.note_start().expect("written");
    if plan.is_due("spawn", 1) {
        plan.fail_at_spawn();
    }
    let computes = if std::env::var_os("EXO_FAULT_OPENCL").is_some() { Computes::OpenCl } else { Computes::NativeCpu };
    exo_engines::worker::serve(&[Arc::new(FaultyFactory { gpu: GpuFactory::new(computes), plan })]);
}

#[derive(Debug)]
struct Plan {
    phase: String,
    kind: String,
    number: u64,
    path: PathBuf,
}

impl Plan {
    fn of_this_process() -> Option<Self> {
        let text = std::env::var("EXO_FAULT").ok()?;
        let mut words = text.splitn(4, ' ').map(str::to_owned);
        let (phase, kind, number) = (words.next()?, words.next()?, words.next()?.parse().ok()?);
        Some(Self { phase, kind, number, path: words.next()?.into() })
    }

    fn note_start(&self) -> std::io::Result<()> {
        let starts = self.path.with_extension("starts");
        writeln!(std::fs::OpenOptions::new().create(true).append(true).open(starts)?, "{}", std::process::id())
    }

    /// Whether the fault happens now. It happens once.
    fn is_due(&self, phase: &str, number: u64) -> bool {
        self.phase == phase && number >= self.number && std::fs::remove_file(&self.path).is_ok()
    }

    fn fail_at_spawn(&self) {
        let mut socket = std::fs::File::from(std::io::stdin().as_fd().try_clone_to_owned().expect("a socket"));
        // A greeting: the message's length, where the values are, their number, the version, and five letters.
        let greeting = |version: u8| [&7_u32.to_ne_bytes()[..], &[0; 9], &[version, 5], b"9.9.9"].concat();
        match self.kind.as_str() {
            "version" => drop(socket.write_all(&greeting(1))),
            "garbage" => drop(socket.write_all(&[0xff; 100])),
            "cut" => {
                let _ = socket.write_all(&greeting(1)[..5]);
                std::process::exit(3);
            }
            _ => self.end(),
        }
    }

    /// Ends or stops the process.
    fn end(&self) {
        match self.kind.as_str() {
            "abort" => {
                eprintln!("planned: the driver has given up");
                std::process::abort()
            }
            "kill" => drop(kill_process(getpid(), Signal::KILL)),
            "stop" => drop(kill_process(getpid(), Signal::STOP)),
            "exit" => std::process::exit(3),
            "loop" => loop {
                std::hint::spin_loop();
            },
            "cut" => {
                // Half a header, on the socket that the worker has taken as its third file or the next.
                for descriptor in 3..8 {
                    let link = std::fs::read_link(format!("/proc/self/fd/{descriptor}")).unwrap_or_default();
                    if link.to_string_lossy().starts_with("socket:") {
                        // SAFETY: the process ends before anything else uses the descriptor.
                        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
                        let _ = std::fs::File::from(socket).write_all(&[1, 0, 0, 0, 0]);
                        break;
                    }
                }
                std::process::exit(3)
            }
            other => panic!("planned: {other}"),
        }
    }

    fn error(&self) -> Option<EngineError> {
        match self.kind.as_str() {
            "error" => Some(EngineError::Device {
                device: GpuFactory::DEVICE.to_owned(),
                fault: DeviceFault::Lost,
                what: "planned".to_owned(),
            }),
            "memory" => Some(EngineError::OutOfMemory { what: "planned".to_owned(), needed_bytes: 2, free_bytes: 1 }),
            _ => None,
        }
    }

    /// Fails, if it is time.
    fn meet(&self, phase: &str, number: u64) -> Result<(), EngineError> {
        if !self.is_due(phase, number) {
            return Ok(());
        }
        match self.error() {
            Some(error) => Err(error),
            None => {
                self.end();
                Ok(())
            }
        }
    }
}

#[derive(Debug)]
struct FaultyFactory {
    gpu: GpuFactory,
    plan: Arc<Plan>,
}

impl EngineFactory for FaultyFactory {
    fn name(&self) -> &'static str {
        self.gpu.name()
    }

    fn probe(&self) -> Vec<DeviceReport> {
        self.gpu.probe()
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        let engine = self.gpu.open(device)?;
        Ok(Box::new(FaultyEngine {
            engine,
            plan: Arc::clone(&self.plan),
            prefills: 0,
            decodes: 0,
            has_failed: false,
            leaked: Vec::new(),
        }))
    }
}

struct FaultyEngine {
    engine: Box<dyn Engine>,
    plan: Arc<Plan>,
    prefills: u64,
    decodes: u64,
    /// Whether the engine is slow, or leaks, from now on.
    has_failed: bool,
    leaked: Vec<Vec<u8>>,
}

impl Engine for FaultyEngine {
    fn self_test(&mut self) -> Result<SelfTestReport, EngineError> {
        self.plan.meet("self-test", 1)?;
        self.engine.self_test()
    }

    fn load(
        &mut self,
        shard: &ShardSpec,
        weights: &WeightSource,
        on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError> {
        // The process that replaces a leaking one loads until the test has seen the alarm.
        if self.plan.kind == "leak" && !self.plan.path.exists() {
            std::thread::sleep(REPLACED_AFTER);
        }
        let mut failed = None;
        let mut tensors = 0;
        let report = self.engine.load(shard, weights, &mut |progress| {
            tensors += 1;
            failed = failed.take().or(self.plan.meet("load", tensors).err());
            if failed.is_some() { ControlFlow::Break(()) } else { on(progress) }
        });
        failed.map_or(report, Err)
    }

    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError> {
        self.engine.warm_up()
    }

    fn forward(&mut self, step: &Step, input: Input, queries: &[RowQuery]) -> Result<Output, EngineError> {
        if step.rows.is_empty() {
            return self.engine.forward(step, input, queries);
        }
        let is_decode = step.rows.iter().all(|row| row.wants_logits);
        let (phase, number) = if is_decode { ("decode", &mut self.decodes) } else { ("prefill", &mut self.prefills) };
        *number += 1;
        let number = *number;
        match self.plan.kind.as_str() {
            "slow" | "leak" => {
                self.has_failed = self.has_failed || self.plan.is_due(phase, number);
                if self.has_failed {
                    std::thread::sleep(Duration::from_millis(100));
                }
                if self.has_failed && self.plan.kind == "leak" && self.leaked.len() < LEAKS_MAX {
                    self.leaked.push(vec![1; LEAK_BYTES]);
                }
                self.engine.forward(step, input, queries)
            }
            "garbage" => {
                let mut output = self.engine.forward(step, input, queries)?;
                if self.plan.is_due(phase, number) {
                    spoil(&mut output);
                }
                Ok(output)
            }
            // The process ends while the node reads or writes.
            "exit" if self.plan.is_due(phase, number) => {
                std::thread::spawn(|| std::process::exit(3));
                self.engine.forward(step, input, queries)
            }
            "exit" => self.engine.forward(step, input, queries),
            _ => {
                self.plan.meet(phase, number)?;
                self.engine.forward(step, input, queries)
            }
        }
    }

    fn logits(&mut self, row: usize) -> Result<Vec<f32>, EngineError> {
        self.engine.logits(row)
    }
}

impl Drop for FaultyEngine {
    fn drop(&mut self) {
        let _ = self.plan.meet("release", 1);
    }
}

/// Makes all numbers of an output wrong.
fn spoil(output: &mut Output) {
    match &mut output.rows {
        OutputRows::Hidden(values) => values.fill(f32::NAN),
        OutputRows::Scores(scores) => {
            scores.values.fill(f32::NAN);
            for row in &mut scores.rows {
                if let RowScores::Top(top) = row {
                    top.best.iter_mut().for_each(|(_, logit)| *logit = f32::NAN);
                }
            }
        }
    }
}
