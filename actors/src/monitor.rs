//! Monitor: telemetry of this machine.
//!
//! - owns: the sampler of the operating system's counters;
//! - receives: its own ticks, and finished measurements;
//! - emits: each measurement of machine and GPUs, as a fact and to the planner; an alarm where drivers leak;
//! - dies when: the node stops;
//! - supervised by: the node.

use crate::core::memory_watch::{MemoryChange, MemoryGrowth, MemoryWatch};
use crate::core::node_status::Fact;
use crate::core::status::Machine;
use crate::planner::{PlannerMsg, PlannerRef};
use crate::transport::callback::Facts;
use crate::worker::machine::{measure, own_processes};
use exo_engines::hardware::{Gpu, GpuMonitor, GpuSample, PciAddress, SystemRoot};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use sysinfo::System;

/// How often the machine is measured.
const EVERY: Duration = Duration::from_secs(1);
/// How long a measurement of the GPUs may take: a card that was asleep needs a second.
const GPUS_WITHIN: Duration = Duration::from_secs(15);
/// How much the memory of drivers may grow without an alarm, in bytes: a desktop's windows take less.
const DRIVER_SLACK: u64 = 1 << 30;

#[derive(Debug, RactorMessage)]
pub(crate) enum MonitorMsg {
    Tick,
    /// A measurement has finished, and gives the sampler back.
    Sampled(Box<System>, Machine),
    /// The sampler of the GPUs is ready.
    GpusReady(Box<GpuMonitor>),
    /// A measurement of the GPUs has finished, and gives the sampler back.
    GpusSampled(Box<GpuMonitor>, BTreeMap<PciAddress, GpuSample>),
}

#[derive(Debug)]
pub(crate) struct MonitorArgs {
    pub planner: PlannerRef,
    pub facts: Facts,
    /// The GPUs of this machine.
    pub gpus: Vec<Gpu>,
}

#[derive(Debug)]
pub(crate) struct MonitorState {
    args: MonitorArgs,
    /// The sampler; `None` while a measurement runs, and on a machine that cannot be measured.
    system: Option<Box<System>>,
    /// The sampler of the GPUs; `None` while it measures. A driver may take seconds to answer, or hang.
    gpus: Option<Box<GpuMonitor>>,
    addresses: Vec<PciAddress>,
    /// Since when the sampler of the GPUs has not come back.
    gpus_since: Option<Instant>,
    started: Instant,
    watch: MemoryWatch,
}

#[derive(Debug)]
pub(crate) struct Monitor;

impl Actor for Monitor {
    type Msg = MonitorMsg;
    type State = MonitorState;
    type Arguments = MonitorArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<MonitorMsg>,
        mut args: MonitorArgs,
    ) -> Result<MonitorState, ActorProcessingErr> {
        myself.send_interval(EVERY, || MonitorMsg::Tick);
        // A machine that cannot be measured is shown as unknown.
        let system = System::new().map(Box::new).map_err(|error| tracing::warn!(%error, "cannot measure this machine"));
        let found = std::mem::take(&mut args.gpus);
        let addresses = found.iter().map(|gpu| gpu.address).collect();
        if !found.is_empty() {
            // Loading a vendor's library takes a while, and a broken driver may never return.
            let myself = myself.clone();
            tokio::task::spawn_blocking(move || {
                let gpus = Box::new(GpuMonitor::new(SystemRoot::default(), found));
                let _ = myself.send_message(MonitorMsg::GpusReady(gpus));
            });
        }
        Ok(MonitorState {
            args,
            system: system.ok(),
            gpus: None,
            addresses,
            gpus_since: None,
            started: Instant::now(),
            watch: MemoryWatch::default(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<MonitorMsg>,
        message: MonitorMsg,
        state: &mut MonitorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            MonitorMsg::Tick => {
                state.sample_gpus(&myself);
                // No second measurement starts while one still runs.
                if let Some(mut system) = state.system.take() {
                    tokio::task::spawn_blocking(move || {
                        let machine = measure(&mut system);
                        let _ = myself.send_message(MonitorMsg::Sampled(system, machine));
                    });
                }
            }
            MonitorMsg::Sampled(system, machine) => {
                state.system = Some(system);
                state.check_memory(&machine);
                let _ = state.args.planner.send_message(PlannerMsg::MachineMeasured(machine.clone()));
                state.args.facts.tell(Fact::MachineMeasured(machine));
            }
            MonitorMsg::GpusReady(gpus) => state.gpus = Some(gpus),
            MonitorMsg::GpusSampled(gpus, samples) => {
                (state.gpus, state.gpus_since) = (Some(gpus), None);
                state.tell_gpus(samples);
            }
        }
        Ok(())
    }
}

impl MonitorState {
    /// Starts a measurement of the GPUs. While one still runs, none starts; one that does not end leaves all unknown.
    fn sample_gpus(&mut self, myself: &ActorRef<MonitorMsg>) {
        if let Some(since) = self.gpus_since
            && since.elapsed() > GPUS_WITHIN
        {
            self.gpus_since = None;
            tracing::warn!("a driver does not answer: the GPUs are not measured any more, until it does");
            self.tell_gpus(self.addresses.iter().map(|&address| (address, GpuSample::default())).collect());
        }
        let Some(mut gpus) = self.gpus.take() else { return };
        self.gpus_since = Some(Instant::now());
        let (myself, elapsed) = (myself.clone(), self.started.elapsed());
        tokio::task::spawn_blocking(move || {
            let samples = gpus.sample(elapsed, &own_processes());
            let _ = myself.send_message(MonitorMsg::GpusSampled(gpus, samples));
        });
    }

    fn tell_gpus(&self, samples: BTreeMap<PciAddress, GpuSample>) {
        let _ = self.args.planner.send_message(PlannerMsg::GpusMeasured(samples.clone()));
        self.args.facts.tell(Fact::GpusMeasured(samples));
    }

    /// Reports memory that no process has, if it grows or returns.
    fn check_memory(&mut self, machine: &Machine) {
        let Some(bytes) = machine.unaccounted_bytes else { return };
        let Some(change) = self.watch.check(bytes.cast_signed(), DRIVER_SLACK, self.started.elapsed()) else { return };
        match change {
            MemoryChange::Grown(MemoryGrowth { grown_bytes }) => {
                tracing::warn!(grown_bytes, "memory grows that no process has: a driver may leak");
            }
            MemoryChange::Returned => tracing::info!("the memory that no process has is about what it was before"),
        }
        self.args.facts.tell(Fact::MachineLeaks(change.growth()));
    }
}
