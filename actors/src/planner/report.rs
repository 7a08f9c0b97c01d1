//! This node's report to the other members.

use super::{PlannerMsg, PlannerRef, PlannerState};
use crate::core::members::{DeviceOffer, MemberReport};
use crate::core::spec::InstanceId;
use crate::core::speed::{Estimate, Speed};
use crate::transport::protocol::ControlMessage;
use crate::worker::machine::measure_machine;
use exo_engines::engine::DeviceReport;

/// Measures free memory at once: shards released some, and the leader may wait for it.
pub(super) fn measure_again(planner: &PlannerRef) {
    let planner = planner.clone();
    tokio::task::spawn_blocking(move || {
        // The planner may have stopped.
        let _ = planner.send_message(PlannerMsg::MachineMeasured(measure_machine()));
    });
}

impl PlannerState {
    /// Renews this node's own report among those of the members.
    pub(super) fn renew_report(&mut self) {
        let device = |report: &DeviceReport| DeviceOffer {
            report: report.clone(),
            speed: self.speeds.get(&report.id).and_then(Estimate::median).map(Speed::from),
        };
        let owned = self.owned.iter().filter(|(_, head)| !head.is_retired()).map(|(&id, head)| (id, head.report()));
        let report = MemberReport {
            name: self.args.name.clone(),
            addresses: self.args.addresses.clone(),
            devices: self.args.devices.iter().map(device).collect(),
            gpus: self.args.gpus.clone(),
            machine: self.args.machine.clone(),
            memory_limit_bytes: self.args.limits.memory_bytes,
            releasing_bytes: self.releasing_bytes(),
            is_draining: self.draining.is_some(),
            owned: owned.collect(),
            in_use: self.used_here(),
            list: self.desired.digest(),
            links: self.links.clone(),
            peers: self.peers.clone(),
            outside: self.clique.announced(),
            cuts: self.clique.cuts(),
            clashes: self.clashes.clone(),
        };
        self.members.0.insert(self.args.node, report);
    }

    /// Bytes that shards hold here beyond what is deployed here: those of stopped instances and of earlier placements.
    fn releasing_bytes(&self) -> u64 {
        let deployed_bytes = |id: InstanceId| -> u64 {
            let deployment = self.desired.get(id).and_then(|entry| entry.deployment());
            let stages = deployment.into_iter().flat_map(|deployment| &deployment.placement.stages);
            let here = stages.filter(|stage| stage.node == self.args.node);
            here.fold(0, |sum, stage| sum.saturating_add(stage.memory_bytes))
        };
        let releasing = self.held.iter().map(|(&id, bytes)| bytes.saturating_sub(deployed_bytes(id)));
        releasing.fold(0, u64::saturating_add)
    }

    /// Sends this node's last renewed report to all peers.
    pub(super) fn tell_report(&self) {
        if let Some(report) = self.members.0.get(&self.args.node) {
            self.args.router.tell_others(&ControlMessage::Report(Box::new(report.clone())));
        }
    }
}
