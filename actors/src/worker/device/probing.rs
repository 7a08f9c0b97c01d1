//! Probes of a device that has failed, and the return of its shards.

use super::{DeviceMsg, DeviceRef, DeviceState, RETIRED_FOR};
use crate::core::device_policy::Health;
use crate::core::node_status::Fact;
use crate::worker::probe;
use exo_engines::EngineError;
use exo_engines::engine::SelfTestReport;
use std::sync::Arc;

impl DeviceState {
    pub(super) fn tick(&mut self, myself: &DeviceRef) {
        self.retired.retain(|_, since| since.elapsed() < RETIRED_FOR);
        let limit = self.args.hang_timeouts.load;
        let overdue = self.probe.as_mut().filter(|probe| !probe.is_given_up && probe.started.elapsed() > limit);
        // The end of a killed process is the result of the probe. A hang in this process counts as a failure.
        if let Some(probe) = overdue
            && !probe.killer.kill()
        {
            probe.is_given_up = true;
            self.fail_probe(&EngineError::Hung { from: "a self-test".to_owned(), seconds: limit.as_secs() });
        }
        if self.probe.is_none() && self.policy.poll_probe(self.started.elapsed()) {
            self.start_probe(myself);
        }
    }

    fn start_probe(&mut self, myself: &DeviceRef) {
        self.ending.retain(|ending| !ending.end.has_ended());
        let device = self.args.report.id.clone();
        if !self.ending.is_empty() {
            return self.fail_probe(&EngineError::StillHung { device: device.to_string() });
        }
        let to = myself.clone();
        let probe = probe::start(Arc::clone(&self.args.factory), device.clone(), move |outcome| {
            // Sending fails only if the device has stopped; the node stops, too.
            let _ = to.send_message(DeviceMsg::Probed(outcome));
        });
        match probe {
            Ok(probe) => self.probe = Some(probe),
            Err(error) => {
                let error = self.system_error(&error);
                self.fail_probe(&error);
            }
        }
    }

    fn fail_probe(&mut self, error: &EngineError) {
        self.policy.handle_probe_failed(self.started.elapsed());
        tracing::info!(device = %self.args.report.id, %error, remedy = error.remedy(), "a device failed its probe");
        self.tell_trouble(error);
    }

    pub(super) fn on_probed(&mut self, myself: &DeviceRef, outcome: Result<SelfTestReport, EngineError>) {
        // The result of a probe that was given up comes too late.
        if self.probe.take().is_none_or(|probe| probe.is_given_up) {
            return;
        }
        let report = match outcome {
            Ok(report) => report,
            Err(error) => return self.fail_probe(&error),
        };
        let promoted = self.policy.handle_probe_passed(self.started.elapsed());
        if self.policy.health() != Health::Well {
            return;
        }
        let device = self.args.report.id.clone();
        tracing::info!(%device, step_us = report.step.as_micros(), "a device passed its probe");
        self.args.facts.tell(Fact::DeviceRecovered(device));
        for shard in promoted {
            match self.tasks.get(&shard) {
                // Sending fails only if this device has stopped; the node stops, too.
                Some(task) => drop(myself.send_message(DeviceMsg::Start(Box::new(task.clone())))),
                None => self.policy.handle_over(shard),
            }
        }
    }
}
