//! Which engines a node's shards have, which of them serves, and what follows when one fails.
//!
//! ```text
//! engine fails ─► restart on its device ─(too many failures, a hang, a lost device)─► fallback; the own device rests
//!      ▲                                                                                               │ probe passed
//!      └────────── the standby takes over ◄── a standby loads on the own device, beside the one that serves ◄─┘
//! ```
//! One state machine for all devices of the node, without I/O: the worker tells it what engines and probes report, and
//! passes its orders on to the devices. It alone decides, so reports that cross its orders do no harm: what a stopped
//! engine reports is ignored. Times count from any fixed start.
//!
//! A shard has at most two engines: the one that serves, and a standby that is to take over. A standby loads the shard
//! on its own device again, after the fallback, or replaces an engine whose process leaks memory.

use crate::core::device_health::{DeviceHealth, Health};
use crate::core::restart_policy::{FailureHistory, Fallback, Verdict};
use exo_engines::ErrorClass;
use exo_engines::engine::DeviceId;
use std::collections::BTreeMap;
use std::time::Duration;

/// The least time between two replacements of a leaking process: each costs a load and a replay, and an engine that
/// leaks at once would be replaced for ever.
const LEAK_REPLACED_EVERY: Duration = Duration::from_secs(600);

/// The number of a shard on this node.
pub(crate) type ShardNumber = u64;

/// The number of an engine on this node. Each start has a number of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct EngineNumber(pub u64);

impl EngineNumber {
    /// No engine's number: the first has 1.
    pub(crate) const UNSET: Self = Self(0);
}

/// An order to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EngineOrder {
    /// Loads a shard into a new engine, after a wait.
    Start { shard: ShardNumber, engine: EngineNumber, device: DeviceId, after: Duration },
    /// Ends an engine, or a start that waits.
    Stop { engine: EngineNumber, device: DeviceId },
}

/// What changes for the users of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Nothing,
    /// Another engine is the newest: it serves, or is to take over.
    Up,
    /// No engine serves; one loads.
    Down,
    /// The serving engine has failed, and another one serves.
    Replaced,
    /// The shard is given up on this node, and is to be removed.
    Lost,
}

/// The consequences of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub change: Change,
    pub orders: Vec<EngineOrder>,
}

#[derive(Debug)]
struct Device {
    /// The device that serves the shards which cannot run on this one.
    fallback: Option<DeviceId>,
    health: DeviceHealth,
}

#[derive(Debug, Clone)]
struct Engine {
    number: EngineNumber,
    device: DeviceId,
}

#[derive(Debug)]
struct Shard<T> {
    /// The device of the shard's placement.
    own: DeviceId,
    /// Whether a load on the own device failed for a reason that its health does not change.
    cannot_fail_back: bool,
    histories: BTreeMap<DeviceId, FailureHistory>,
    serving: Option<(Engine, T)>,
    standby: Option<Standby<T>>,
    /// When the last replacement of a leaking engine began.
    leak_replaced: Option<Duration>,
}

/// An engine that does not serve yet: it loads, or is loaded and waits to take over. If no engine serves, it takes over
/// as soon as it is loaded.
#[derive(Debug)]
struct Standby<T> {
    engine: Engine,
    loaded: Option<T>,
}

/// The engines of a node's shards, with what the worker keeps of each loaded one.
#[derive(Debug)]
pub(crate) struct Failover<T> {
    devices: BTreeMap<DeviceId, Device>,
    shards: BTreeMap<ShardNumber, Shard<T>>,
    /// The number of engines so far.
    engines: u64,
}

impl<T> Shard<T> {
    fn is_serving(&self, engine: EngineNumber) -> bool {
        self.serving.as_ref().is_some_and(|(serving, _)| serving.number == engine)
    }

    fn is_standby(&self, engine: EngineNumber) -> bool {
        self.standby.as_ref().is_some_and(|standby| standby.engine.number == engine)
    }

    fn engines(&self) -> impl Iterator<Item = &Engine> {
        let serving = self.serving.iter().map(|(engine, _)| engine);
        serving.chain(self.standby.iter().map(|standby| &standby.engine))
    }

    /// Lets the standby engine serve, if it is loaded. Returns the one that served before.
    fn take_over(&mut self) -> Option<Engine> {
        let standby = self.standby.take_if(|standby| standby.loaded.is_some())?;
        let Standby { engine, loaded: Some(loaded) } = standby else { return None };
        self.serving.replace((engine, loaded)).map(|(before, _)| before)
    }
}

fn stop(engine: &Engine) -> EngineOrder {
    EngineOrder::Stop { engine: engine.number, device: engine.device.clone() }
}

impl<T> Failover<T> {
    /// Creates the state of a node without shards. `devices` are its devices with their fallbacks, `probe_after` the
    /// first pause before a device that has failed is probed.
    pub(crate) fn new(devices: impl IntoIterator<Item = (DeviceId, Option<DeviceId>)>, probe_after: Duration) -> Self {
        let devices = devices.into_iter().map(|(id, fallback)| {
            let health = DeviceHealth::new(probe_after);
            (id, Device { fallback, health })
        });
        Self { devices: devices.collect(), shards: BTreeMap::new(), engines: 0 }
    }

    /// The health of a device of this node.
    pub(crate) fn health(&self, device: &DeviceId) -> Option<Health> {
        self.devices.get(device).map(|device| device.health.health())
    }

    /// The device of an engine; `None` if the engine is not the shard's, or was stopped.
    pub(crate) fn device_of(&self, shard: ShardNumber, engine: EngineNumber) -> Option<&DeviceId> {
        self.shards.get(&shard)?.engines().find(|known| known.number == engine).map(|engine| &engine.device)
    }

    /// The engine that serves.
    pub(crate) fn serving(&self, shard: ShardNumber) -> Option<&T> {
        self.shards.get(&shard)?.serving.as_ref().map(|(_, loaded)| loaded)
    }

    /// The engine that was loaded last, and its device: it serves, or is to take over.
    pub(crate) fn newest(&self, shard: ShardNumber) -> Option<(EngineNumber, &DeviceId)> {
        let shard = self.shards.get(&shard)?;
        let standby = shard.standby.as_ref().filter(|standby| standby.loaded.is_some()).map(|standby| &standby.engine);
        let newest = standby.or(shard.serving.as_ref().map(|(engine, _)| engine))?;
        Some((newest.number, &newest.device))
    }

    /// Whether users wait for this engine, or are served by it.
    pub(crate) fn concerns_users(&self, shard: ShardNumber, engine: EngineNumber) -> bool {
        self.shards.get(&shard).is_some_and(|shard| shard.serving.is_none() || shard.is_serving(engine))
    }

    /// Adds a shard that was placed on the device `own`.
    pub(crate) fn place(&mut self, number: ShardNumber, own: DeviceId) -> Vec<EngineOrder> {
        let device = self.device_for_start(&own);
        let shard = Shard {
            own,
            cannot_fail_back: false,
            histories: BTreeMap::new(),
            serving: None,
            standby: None,
            leak_replaced: None,
        };
        self.shards.insert(number, shard);
        self.start(number, device, Duration::ZERO).into_iter().collect()
    }

    /// Removes a shard.
    pub(crate) fn remove(&mut self, shard: ShardNumber) -> Vec<EngineOrder> {
        self.shards.remove(&shard).map(|shard| shard.engines().map(stop).collect()).unwrap_or_default()
    }

    /// Notes that an engine has loaded its shard.
    pub(crate) fn handle_loaded(&mut self, number: ShardNumber, engine: EngineNumber, loaded: T) -> Outcome {
        let nothing = Outcome { change: Change::Nothing, orders: Vec::new() };
        let Some(shard) = self.shards.get_mut(&number).filter(|shard| shard.is_standby(engine)) else { return nothing };
        if let Some(standby) = &mut shard.standby {
            standby.loaded = Some(loaded);
        }
        if shard.serving.is_none() {
            shard.take_over();
        }
        Outcome { change: Change::Up, orders: self.fail_back(number).into_iter().collect() }
    }

    /// Lets the standby serve, if it is loaded.
    pub(crate) fn take_over(&mut self, number: ShardNumber) -> Vec<EngineOrder> {
        let Some(shard) = self.shards.get_mut(&number) else { return Vec::new() };
        let before = shard.take_over();
        before.iter().map(stop).chain(self.fail_back(number)).collect()
    }

    /// Loads the shard into another engine, because the serving one leaks memory, unless that was done lately.
    pub(crate) fn handle_leak(
        &mut self,
        number: ShardNumber,
        engine: EngineNumber,
        now: Duration,
    ) -> Option<EngineOrder> {
        let shard = self.shards.get_mut(&number).filter(|shard| shard.is_serving(engine) && shard.standby.is_none())?;
        if shard.leak_replaced.is_some_and(|leak_replaced| now.saturating_sub(leak_replaced) < LEAK_REPLACED_EVERY) {
            return None;
        }
        shard.leak_replaced = Some(now);
        let device = shard.serving.as_ref().map(|(serving, _)| serving.device.clone())?;
        self.start(number, device, Duration::ZERO)
    }

    /// Notes that an engine has failed.
    pub(crate) fn handle_failed(
        &mut self,
        number: ShardNumber,
        engine: EngineNumber,
        class: ErrorClass,
        now: Duration,
    ) -> Outcome {
        let mut orders = Vec::new();
        let change = if self.shards.get(&number).is_some_and(|shard| shard.is_serving(engine)) {
            self.handle_serving_failed(number, class, now, &mut orders)
        } else if self.shards.get(&number).is_some_and(|shard| shard.is_standby(engine)) {
            self.handle_standby_failed(number, class, now, &mut orders)
        } else {
            Change::Nothing
        };
        orders.extend(self.fail_back(number));
        Outcome { change, orders }
    }

    fn handle_serving_failed(
        &mut self,
        number: ShardNumber,
        class: ErrorClass,
        now: Duration,
        orders: &mut Vec<EngineOrder>,
    ) -> Change {
        let Some(shard) = self.shards.get_mut(&number) else { return Change::Nothing };
        let Some((failed, _)) = shard.serving.take() else { return Change::Nothing };
        shard.take_over();
        let is_replaced = shard.serving.is_some();
        let verdict = self.decide(number, &failed.device, class, now, orders);
        if is_replaced {
            return Change::Replaced;
        }
        self.replace(number, &failed.device, verdict, orders)
    }

    fn handle_standby_failed(
        &mut self,
        number: ShardNumber,
        class: ErrorClass,
        now: Duration,
        orders: &mut Vec<EngineOrder>,
    ) -> Change {
        let Some(shard) = self.shards.get_mut(&number) else { return Change::Nothing };
        let Some(Standby { engine: failed, loaded }) = shard.standby.take() else { return Change::Nothing };
        let Some((serving, _)) = &shard.serving else {
            let verdict = self.decide(number, &failed.device, class, now, orders);
            return self.replace(number, &failed.device, verdict, orders);
        };
        // The load of a renewal beside the leaking engine says little about the device.
        let fails_back = failed.device == shard.own && serving.device != shard.own;
        if fails_back && class == ErrorClass::Caller {
            shard.cannot_fail_back = true;
        } else if fails_back {
            // A device that is out of memory gets time to free it, too.
            self.rest(&failed.device, now, orders);
        }
        if loaded.is_some() { Change::Up } else { Change::Nothing }
    }

    /// Counts a failure of a shard on a device, and decides by the restart policy.
    fn decide(
        &mut self,
        number: ShardNumber,
        device: &DeviceId,
        class: ErrorClass,
        now: Duration,
        orders: &mut Vec<EngineOrder>,
    ) -> Verdict {
        let fallback = match self.fallback_of(device) {
            Some(_) => Fallback::Available,
            None => Fallback::None,
        };
        let Some(shard) = self.shards.get_mut(&number) else { return Verdict::GiveUp };
        let verdict = shard.histories.entry(device.clone()).or_default().decide(now, class, fallback);
        if verdict == Verdict::FallBack {
            self.rest(device, now, orders);
        }
        verdict
    }

    /// Starts another engine for a shard that does not serve. A standby is waited for instead if it loads
    /// elsewhere than on the failed device, or if the verdict is to restart there.
    fn replace(
        &mut self,
        number: ShardNumber,
        failed: &DeviceId,
        verdict: Verdict,
        orders: &mut Vec<EngineOrder>,
    ) -> Change {
        let target = match verdict {
            Verdict::Restart { after } => Some((self.device_for_start(failed), after)),
            Verdict::FallBack => self.fallback_of(failed).cloned().map(|device| (device, Duration::ZERO)),
            Verdict::GiveUp => self.last_resort(number, failed).map(|device| (device, Duration::ZERO)),
        };
        let Some(shard) = self.shards.get_mut(&number) else { return Change::Nothing };
        let starting = shard.standby.as_ref().map(|standby| &standby.engine);
        match (target, starting) {
            (None, Some(_)) => Change::Down,
            (None, None) => Change::Lost,
            (Some((device, _)), Some(starting)) if starting.device != *failed || device == *failed => Change::Down,
            (Some((device, after)), starting) => {
                orders.extend(starting.map(stop));
                shard.standby = None;
                orders.extend(self.start(number, device, after));
                Change::Down
            }
        }
    }

    /// The own device of a shard that cannot run on the fallback any more.
    fn last_resort(&self, number: ShardNumber, failed: &DeviceId) -> Option<DeviceId> {
        let shard = self.shards.get(&number)?;
        let can_try = shard.own != *failed && !shard.cannot_fail_back && self.is_well(&shard.own);
        can_try.then(|| shard.own.clone())
    }

    /// Returns the devices whose probes are to start now.
    pub(crate) fn poll_probes(&mut self, now: Duration) -> Vec<DeviceId> {
        let due = self.devices.iter_mut().filter_map(|(id, device)| device.health.poll_probe(now).then(|| id.clone()));
        due.collect()
    }

    /// Notes that the probe of a device has passed. Its shards that serve elsewhere load on it again.
    pub(crate) fn handle_probe_passed(&mut self, device: &DeviceId, now: Duration) -> Vec<EngineOrder> {
        if let Some(device) = self.devices.get_mut(device) {
            device.health.handle_probe_passed(now);
        }
        let shards = self.shards.keys().copied().collect::<Vec<_>>();
        shards.into_iter().filter_map(|shard| self.fail_back(shard)).collect()
    }

    /// Notes that the probe of a device has failed.
    pub(crate) fn handle_probe_failed(&mut self, device: &DeviceId, now: Duration) {
        if let Some(device) = self.devices.get_mut(device) {
            device.health.handle_probe_failed(now);
        }
    }

    fn fallback_of(&self, device: &DeviceId) -> Option<&DeviceId> {
        self.devices.get(device)?.fallback.as_ref()
    }

    fn is_well(&self, device: &DeviceId) -> bool {
        self.devices.get(device).is_some_and(|device| device.health.is_well())
    }

    /// The device on which a shard starts: `wanted`, or its fallback while `wanted` is not well.
    fn device_for_start(&self, wanted: &DeviceId) -> DeviceId {
        let fallback = self.fallback_of(wanted).filter(|_| !self.is_well(wanted));
        fallback.unwrap_or(wanted).clone()
    }

    fn start(&mut self, number: ShardNumber, device: DeviceId, after: Duration) -> Option<EngineOrder> {
        let shard = self.shards.get_mut(&number)?;
        self.engines += 1;
        let engine = EngineNumber(self.engines);
        shard.standby = Some(Standby { engine: Engine { number: engine, device: device.clone() }, loaded: None });
        Some(EngineOrder::Start { shard: number, engine, device, after })
    }

    /// Loads a shard that serves elsewhere on its own device again, if that is well.
    fn fail_back(&mut self, number: ShardNumber) -> Option<EngineOrder> {
        let shard = self.shards.get(&number)?;
        let (serving, _) = shard.serving.as_ref()?;
        let is_away = serving.device != shard.own && shard.standby.is_none();
        if !is_away || shard.cannot_fail_back || !self.is_well(&shard.own) {
            return None;
        }
        self.start(number, shard.own.clone(), Duration::ZERO)
    }

    /// Leaves a device alone that has failed, and stops what loads there beside a serving engine.
    fn rest(&mut self, device: &DeviceId, now: Duration, orders: &mut Vec<EngineOrder>) {
        if let Some(device) = self.devices.get_mut(device) {
            device.health.handle_failure(now);
        }
        for shard in self.shards.values_mut() {
            let serves = shard.serving.as_ref().is_some_and(|(serving, _)| serving.device != *device);
            let starting =
                shard.standby.take_if(|standby| serves && standby.engine.device == *device && standby.loaded.is_none());
            orders.extend(starting.map(|standby| stop(&standby.engine)));
        }
    }
}

#[cfg(test)]
mod tests;
