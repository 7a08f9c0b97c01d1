//! What happens on a node and in its cluster, one line for each event, in the user's words. `up` prints these lines.

use crate::{Fact, InstanceId, NodeHandle, NodeId, NodeStatus};
use exo_actors::core::plan::Placement;
use exo_actors::core::status::{GpuStatus, Unused};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::time::Instant;

/// Prints a line for each event, until the node stops.
pub(super) async fn print_events(node: NodeHandle) {
    let mut narrator = None;
    while let Ok(mut facts) = node.subscribe().await {
        let narrator = narrator.get_or_insert_with(|| {
            let mut narrator = Narrator::new(facts.status());
            narrator.catch_up(facts.status()).iter().for_each(|line| print(line));
            narrator
        });
        // A reader that was too slow subscribes anew.
        while let Ok(next) = facts.next().await {
            let Some(fact) = next else { return };
            if let Some(line) = narrator.tell(&fact, Instant::now()) {
                print(&line);
            }
        }
    }
}

/// Prints a line on stderr. Whoever reads it may have gone.
fn print(line: &str) {
    let _ = writeln!(std::io::stderr(), "{}", printable(line));
}

/// A text without the control characters that a terminal would obey, but with its lines: parts of it come from other
/// nodes.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
}

/// The line for a GPU that no engine uses.
fn unused_gpu(status: &GpuStatus) -> Option<String> {
    let Unused { error, remedy } = status.unused.as_ref()?;
    let (name, address) = (status.gpu.shown_name(), status.gpu.address);
    Some(format!("warning: no engine uses {name} ({address}): {error}\n  remedy: {remedy}"))
}

/// Turns facts into lines. Holds what a line needs of earlier facts.
#[derive(Debug)]
struct Narrator {
    names: BTreeMap<NodeId, String>,
    connected: BTreeSet<NodeId>,
    models: BTreeMap<InstanceId, Told>,
}

/// What was told of an instance.
#[derive(Debug)]
struct Told {
    name: String,
    placement: Placement,
    is_ready: bool,
    /// Since when its answers wait for a failed shard.
    broken: Option<Instant>,
}

impl Narrator {
    fn new(status: &NodeStatus) -> Self {
        let names = BTreeMap::from([(status.node, status.name.clone())]);
        Self { names, connected: BTreeSet::new(), models: BTreeMap::new() }
    }

    /// The lines for what happened before this subscription began.
    fn catch_up(&mut self, status: &NodeStatus) -> Vec<String> {
        let joined = status.members.iter().map(|(&node, report)| {
            let report = Box::new(report.clone());
            Fact::MemberReported { node, report }
        });
        let tried = status.unreached.iter().map(|(&address, failure)| {
            let failure = Some(failure.clone());
            Fact::AddressTried { address, failure }
        });
        let gpus = status.gpus.values().cloned().map(|status| Fact::GpuFound(Box::new(status)));
        let facts = gpus.chain(joined).chain(tried).chain(status.same_key.values().copied().map(Fact::SameKey));
        facts.filter_map(|fact| self.tell(&fact, Instant::now())).collect()
    }

    /// The line for a fact; `None` for facts that are no news for people.
    fn tell(&mut self, fact: &Fact, now: Instant) -> Option<String> {
        match fact {
            Fact::MemberReported { node, report } => {
                self.names.insert(*node, report.name.clone());
                self.connected.insert(*node).then(|| format!("{} joined", self.name(*node)))
            }
            Fact::MemberLost { node, reason, .. } => {
                self.connected.remove(node).then(|| format!("{} has gone: {reason}", self.name(*node)))
            }
            Fact::PeerOutside { node, outside } => {
                self.connected.remove(node);
                let between = outside.between.map(|(one, other)| {
                    format!(
                        "{} and {} do not reach each other: open UDP port 52416, or the port of --listen, between them",
                        self.name(one),
                        self.name(other)
                    )
                });
                Some(format!(
                    "{} works without this node: {}",
                    outside.name,
                    between.unwrap_or("two nodes do not reach each other".to_owned())
                ))
            }
            Fact::AddressTried { address, failure: Some(failure) } => Some(format!("warning: {address} {failure}")),
            Fact::AddressTried { address, failure: None } => Some(format!("{address} answers")),
            Fact::SameKey(clash) => Some(format!(
                "error: {} and {} have the same key, so one data folder is a copy of the other; {} goes on\n  remedy: \
                 delete node.key in the copy, and start it again",
                clash.first, clash.second, clash.first
            )),
            Fact::AddressesChanged(addresses) => {
                let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                Some(format!("this machine has other addresses now: {}", addresses.join(", ")))
            }
            Fact::InstancePlaced { instance, model, placement } => self.placed(*instance, &model.name, placement),
            Fact::InstanceReady { instance, .. } => self.ready(*instance, now),
            Fact::ShardFailed { instance, stage, error } => self.failed(*instance, *stage, error, now),
            Fact::InstanceStopped { instance, error } => {
                let told = self.models.remove(instance)?;
                Some(match error {
                    Some(error) => format!("error: {} has stopped: {error}", told.name),
                    None => format!("{} is unloaded", told.name),
                })
            }
            Fact::DeviceFailed { device, trouble } => Some(format!(
                "warning: {device} failed, and its shards run on the fallback: {}\n  remedy: {}",
                trouble.error, trouble.remedy
            )),
            Fact::ShardSpeed { instance, stage, slow_down: Some(slow) } => {
                let told = self.models.get(instance)?;
                let (name, best, latest) = (&told.name, slow.best.as_secs_f64(), slow.latest.as_secs_f64());
                Some(format!(
                    "warning: {name}: stage {stage} has become slow: steps of {} rows take {latest:.3} s, not \
                     {best:.3} s",
                    slow.rows
                ))
            }
            Fact::ShardSpeed { instance, stage, slow_down: None } => {
                let told = self.models.get(instance)?;
                Some(format!("{}: stage {stage} is as fast as before again", told.name))
            }
            Fact::ShardLeaks { instance, stage, growth: Some(growth) } => {
                let told = self.models.get(instance)?;
                Some(format!(
                    "warning: {}: the process of stage {stage} leaks memory, {} MB so far: another one takes over if \
                     the memory suffices for both",
                    told.name,
                    growth.grown_bytes / 1_000_000
                ))
            }
            Fact::ShardLeaks { instance, stage, growth: None } => {
                let told = self.models.get(instance)?;
                Some(format!("{}: the process of stage {stage} has given its memory back", told.name))
            }
            Fact::MachineLeaks(None) => Some("the memory that no process has is about what it was before".to_owned()),
            Fact::MachineLeaks(Some(growth)) => Some(format!(
                "warning: memory that no process has grew by {} MB: a driver may leak\n  remedy: restart this machine \
                 when it suits, and update its drivers",
                growth.grown_bytes / 1_000_000
            )),
            Fact::DeviceRecovered(device) => Some(format!("{device} has passed its test, and takes its shards back")),
            Fact::GpuFound(status) => unused_gpu(status),
            Fact::DeviceFound(_)
            | Fact::GpusMeasured(_)
            | Fact::EvictionsChanged(_)
            | Fact::SameKeyOver(_)
            | Fact::MachineMeasured(_)
            | Fact::ShardFetching { .. }
            | Fact::ShardLoading { .. }
            | Fact::ShardLoaded { .. }
            | Fact::RequestsChanged { .. } => None,
        }
    }

    fn name(&self, node: NodeId) -> String {
        self.names.get(&node).map_or_else(|| node.short(), Clone::clone)
    }

    fn placed(&mut self, instance: InstanceId, model: &str, placement: &Placement) -> Option<String> {
        let places = self.places(placement);
        match self.models.get_mut(&instance) {
            Some(told) if told.placement == *placement => None,
            Some(told) => {
                told.placement = placement.clone();
                Some(format!("{model} moves: {places}"))
            }
            None => {
                let told = Told { name: model.to_owned(), placement: placement.clone(), is_ready: false, broken: None };
                self.models.insert(instance, told);
                Some(format!("loading {model}: {places}"))
            }
        }
    }

    fn places(&self, placement: &Placement) -> String {
        let place = |stage: &exo_actors::core::plan::Stage| {
            let (first, last) = (stage.layers.start, stage.layers.end.saturating_sub(1));
            format!("layers {first}–{last} on {} of {}", stage.device, self.name(stage.node))
        };
        placement.stages.iter().map(place).collect::<Vec<_>>().join(", ")
    }

    fn ready(&mut self, instance: InstanceId, now: Instant) -> Option<String> {
        let told = self.models.get_mut(&instance)?;
        let (was_ready, broken) = (std::mem::replace(&mut told.is_ready, true), told.broken.take());
        match broken {
            Some(since) => Some(format!("{} answers again after {:.1} s", told.name, (now - since).as_secs_f64())),
            None if was_ready => None,
            None => Some(format!("{} is ready", told.name)),
        }
    }

    /// Tells the first failure of a row of them: the others follow from it.
    fn failed(&mut self, instance: InstanceId, stage: usize, error: &str, now: Instant) -> Option<String> {
        let at = self.models.get(&instance)?.placement.stages.get(stage).map(|stage| self.name(stage.node));
        let told = self.models.get_mut(&instance).filter(|told| told.broken.is_none())?;
        told.broken = Some(now);
        let at = at.map_or(String::new(), |name| format!(" on {name}"));
        Some(format!("{}: a shard{at} failed, and answers wait until it runs again: {error}", told.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::gpu::tests::card;
    use crate::cli::status::tests::status;
    use std::time::Duration;

    /// The lines of a model's life on two machines.
    #[test]
    fn events_are_told_in_words() {
        let status = status();
        let (instance, known) = status.everywhere().next().expect("an instance");
        let (member, report) = status.members.iter().next().expect("a member");
        let placed = |placement: &Placement| Fact::InstancePlaced {
            instance,
            model: known.model.clone(),
            placement: placement.clone(),
        };
        let failed = || Fact::ShardFailed { instance, stage: 0, error: "the device is lost".to_owned() };
        let reported = || Fact::MemberReported { node: *member, report: Box::new(report.clone()) };
        let address = "10.0.0.2:52416".parse().expect("an address");
        let facts = [
            Fact::GpuFound(Box::new(card())),
            Fact::GpuFound(Box::new(GpuStatus { unused: None, ..card() })),
            reported(),
            reported(),
            placed(&known.placement),
            placed(&known.placement),
            Fact::InstanceReady { instance, epoch: 1 },
            failed(),
            failed(),
            Fact::InstanceReady { instance, epoch: 2 },
            Fact::InstanceReady { instance, epoch: 3 },
            Fact::MemberLost { node: *member, reason: "it does not answer any more".to_owned(), at_s: 0 },
            Fact::AddressTried { address, failure: Some("does not answer: check the address".to_owned()) },
            Fact::AddressTried { address, failure: None },
            Fact::InstanceStopped { instance, error: None },
        ];
        let (mut narrator, begun) = (Narrator::new(&status), Instant::now());
        let lines = facts
            .iter()
            .enumerate()
            .filter_map(|(second, fact)| narrator.tell(fact, begun + Duration::from_millis(second as u64 * 500)));
        insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"));
    }
}
