//! Which engines a node's shards have, which of them serves, and what follows when one fails.
//!
//! ```text
//! engine fails ─► restart on its device ─(too many)─► fallback device, the own device rests ─probe passed─┐
//!      ▲                                                                                                  │
//!      └──── the engine on the own device takes over ◄──── it loads there, beside the one that serves ◄────┘
//! ```
//! One state machine for all devices of the node, without I/O: the worker tells it what engines and probes report, and
//! passes its orders on to the devices. It alone decides, so reports that cross its orders do no harm: what a stopped
//! engine reports is ignored. Times count from any fixed start.
//!
//! A shard has at most two engines: the one that serves, and one that is to take over. The second one loads the shard
//! on its own device again, after the fallback, or replaces an engine whose process leaks memory.

use crate::core::device_health::{DeviceHealth, Health};
use crate::core::restart_policy::{FailureHistory, Fallback, Verdict};
use exo_engines::ErrorClass;
use exo_engines::engine::DeviceId;
use std::collections::BTreeMap;
use std::time::Duration;

/// The least time between two replacements of a leaking process.
const RENEWED_EVERY: Duration = Duration::from_secs(600);

/// The number of a shard on this node.
pub(crate) type ShardNumber = u64;

/// The number of an engine on this node. Each start has a number of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct EngineNumber(pub u64);

/// An order to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
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
    /// The shard serves no more, or still loads.
    Down,
    /// The serving engine has failed, and another one serves.
    Replaced,
    /// The shard is given up on this node.
    Lost,
}

/// The consequences of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub change: Change,
    pub orders: Vec<Order>,
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
    /// Whether a load on the own device fails whatever the device's health is.
    is_barred: bool,
    histories: BTreeMap<DeviceId, FailureHistory>,
    serving: Option<(Engine, T)>,
    other: Option<Other<T>>,
    /// When an engine was last replaced because of a leak.
    renewed: Option<Duration>,
}

/// An engine that does not serve: it loads, or is loaded and waits to take over. Where no engine serves, it loads.
#[derive(Debug)]
struct Other<T> {
    engine: Engine,
    loaded: Option<T>,
}

/// The engines of a node's shards, with what the worker keeps of each loaded one.
#[derive(Debug)]
pub(crate) struct Failover<T> {
    devices: BTreeMap<DeviceId, Device>,
    shards: BTreeMap<ShardNumber, Shard<T>>,
    /// The number of engines that were started.
    started: u64,
}

impl<T> Shard<T> {
    fn is_serving(&self, engine: EngineNumber) -> bool {
        self.serving.as_ref().is_some_and(|(serving, _)| serving.number == engine)
    }

    fn is_other(&self, engine: EngineNumber) -> bool {
        self.other.as_ref().is_some_and(|other| other.engine.number == engine)
    }

    fn engines(&self) -> impl Iterator<Item = &Engine> {
        let serving = self.serving.iter().map(|(engine, _)| engine);
        serving.chain(self.other.iter().map(|other| &other.engine))
    }

    /// Lets the other engine serve, if it is loaded. Returns the one that served before.
    fn take_over(&mut self) -> Option<Engine> {
        let Other { engine, loaded } = self.other.take()?;
        let Some(loaded) = loaded else {
            self.other = Some(Other { engine, loaded });
            return None;
        };
        self.serving.replace((engine, loaded)).map(|(before, _)| before)
    }
}

fn stop(engine: &Engine) -> Order {
    Order::Stop { engine: engine.number, device: engine.device.clone() }
}

impl<T> Failover<T> {
    /// Creates the state of a node without shards. `devices` are its devices with their fallbacks, `probe_after` the
    /// first pause before a device that has failed is probed.
    pub(crate) fn new(devices: impl IntoIterator<Item = (DeviceId, Option<DeviceId>)>, probe_after: Duration) -> Self {
        let devices = devices.into_iter().map(|(id, fallback)| {
            let health = DeviceHealth::new(probe_after);
            (id, Device { fallback, health })
        });
        Self { devices: devices.collect(), shards: BTreeMap::new(), started: 0 }
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

    /// The engine that was loaded last, with its device: it serves, or is to take over.
    pub(crate) fn newest(&self, shard: ShardNumber) -> Option<(&DeviceId, &T)> {
        let shard = self.shards.get(&shard)?;
        let other = shard.other.as_ref().and_then(|other| Some((&other.engine.device, other.loaded.as_ref()?)));
        other.or(shard.serving.as_ref().map(|(engine, loaded)| (&engine.device, loaded)))
    }

    /// Whether users wait for this engine, or are served by it.
    pub(crate) fn concerns_users(&self, shard: ShardNumber, engine: EngineNumber) -> bool {
        self.shards.get(&shard).is_some_and(|shard| shard.serving.is_none() || shard.is_serving(engine))
    }

    /// Adds a shard that was placed on the device `own`.
    pub(crate) fn place(&mut self, number: ShardNumber, own: DeviceId) -> Vec<Order> {
        let device = self.device_for_start(&own);
        let shard =
            Shard { own, is_barred: false, histories: BTreeMap::new(), serving: None, other: None, renewed: None };
        self.shards.insert(number, shard);
        self.start(number, device, Duration::ZERO).into_iter().collect()
    }

    /// Removes a shard.
    pub(crate) fn remove(&mut self, shard: ShardNumber) -> Vec<Order> {
        self.shards.remove(&shard).map(|shard| shard.engines().map(stop).collect()).unwrap_or_default()
    }

    /// Notes that an engine has loaded its shard.
    pub(crate) fn handle_loaded(&mut self, number: ShardNumber, engine: EngineNumber, loaded: T) -> Outcome {
        let nothing = Outcome { change: Change::Nothing, orders: Vec::new() };
        let Some(shard) = self.shards.get_mut(&number).filter(|shard| shard.is_other(engine)) else { return nothing };
        if let Some(other) = &mut shard.other {
            other.loaded = Some(loaded);
        }
        if shard.serving.is_none() {
            shard.take_over();
        }
        Outcome { change: Change::Up, orders: self.go_home(number).into_iter().collect() }
    }

    /// Lets the engine serve that waits to take over.
    pub(crate) fn take_over(&mut self, number: ShardNumber) -> Vec<Order> {
        let Some(shard) = self.shards.get_mut(&number) else { return Vec::new() };
        let before = shard.take_over();
        before.iter().map(stop).chain(self.go_home(number)).collect()
    }

    /// Loads the shard into another engine, because the serving one leaks memory, unless that was done lately.
    pub(crate) fn handle_leak(&mut self, number: ShardNumber, engine: EngineNumber, now: Duration) -> Option<Order> {
        let shard = self.shards.get_mut(&number).filter(|shard| shard.is_serving(engine) && shard.other.is_none())?;
        if shard.renewed.is_some_and(|renewed| now.saturating_sub(renewed) < RENEWED_EVERY) {
            return None;
        }
        shard.renewed = Some(now);
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
        } else if self.shards.get(&number).is_some_and(|shard| shard.is_other(engine)) {
            self.handle_other_failed(number, class, now, &mut orders)
        } else {
            Change::Nothing
        };
        orders.extend(self.go_home(number));
        Outcome { change, orders }
    }

    fn handle_serving_failed(
        &mut self,
        number: ShardNumber,
        class: ErrorClass,
        now: Duration,
        orders: &mut Vec<Order>,
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

    fn handle_other_failed(
        &mut self,
        number: ShardNumber,
        class: ErrorClass,
        now: Duration,
        orders: &mut Vec<Order>,
    ) -> Change {
        let Some(shard) = self.shards.get_mut(&number) else { return Change::Nothing };
        let Some(Other { engine: failed, loaded }) = shard.other.take() else { return Change::Nothing };
        let Some((serving, _)) = &shard.serving else {
            let verdict = self.decide(number, &failed.device, class, now, orders);
            return self.replace(number, &failed.device, verdict, orders);
        };
        // The load of a renewal beside the leaking engine says little about the device.
        let comes_home = failed.device == shard.own && serving.device != shard.own;
        if comes_home && class == ErrorClass::Caller {
            shard.is_barred = true;
        } else if comes_home {
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
        orders: &mut Vec<Order>,
    ) -> Verdict {
        let fallback = match self.fallback_of(device) {
            Some(_) => Fallback::Available,
            None => Fallback::None,
        };
        let Some(shard) = self.shards.get_mut(&number) else { return Verdict::Stop };
        let verdict = shard.histories.entry(device.clone()).or_default().decide(now, class, fallback);
        if verdict == Verdict::FallBack {
            self.rest(device, now, orders);
        }
        verdict
    }

    /// Starts another engine for a shard that does not serve, unless one starts already where the verdict wants it.
    fn replace(&mut self, number: ShardNumber, failed: &DeviceId, verdict: Verdict, orders: &mut Vec<Order>) -> Change {
        let target = match verdict {
            Verdict::Restart { after } => Some((self.device_for_start(failed), after)),
            Verdict::FallBack => self.fallback_of(failed).cloned().map(|device| (device, Duration::ZERO)),
            Verdict::Replan | Verdict::Stop => None,
        };
        let Some(shard) = self.shards.get_mut(&number) else { return Change::Nothing };
        let starting = shard.other.as_ref().map(|other| &other.engine);
        match (target, starting) {
            // The engine that starts is the last chance.
            (None, Some(_)) => Change::Down,
            (None, None) => Change::Lost,
            (Some((device, _)), Some(starting)) if starting.device == device => Change::Down,
            (Some((device, after)), starting) => {
                orders.extend(starting.map(stop));
                shard.other = None;
                orders.extend(self.start(number, device, after));
                Change::Down
            }
        }
    }

    /// Returns the devices whose probes are to start now.
    pub(crate) fn poll_probes(&mut self, now: Duration) -> Vec<DeviceId> {
        let due = self.devices.iter_mut().filter_map(|(id, device)| device.health.poll_probe(now).then(|| id.clone()));
        due.collect()
    }

    /// Notes that the probe of a device has passed. Its shards that serve elsewhere load on it again.
    pub(crate) fn handle_probe_passed(&mut self, device: &DeviceId, now: Duration) -> Vec<Order> {
        if let Some(device) = self.devices.get_mut(device) {
            device.health.handle_probe_passed(now);
        }
        let shards = self.shards.keys().copied().collect::<Vec<_>>();
        shards.into_iter().filter_map(|shard| self.go_home(shard)).collect()
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

    fn start(&mut self, number: ShardNumber, device: DeviceId, after: Duration) -> Option<Order> {
        let shard = self.shards.get_mut(&number)?;
        self.started += 1;
        let engine = EngineNumber(self.started);
        shard.other = Some(Other { engine: Engine { number: engine, device: device.clone() }, loaded: None });
        Some(Order::Start { shard: number, engine, device, after })
    }

    /// Loads a shard that serves elsewhere on its own device again, if that is well.
    fn go_home(&mut self, number: ShardNumber) -> Option<Order> {
        let shard = self.shards.get(&number)?;
        let (serving, _) = shard.serving.as_ref()?;
        let is_away = serving.device != shard.own && shard.other.is_none();
        if !is_away || shard.is_barred || !self.is_well(&shard.own) {
            return None;
        }
        self.start(number, shard.own.clone(), Duration::ZERO)
    }

    /// Leaves a device alone that has failed, and stops what loads there beside a serving engine.
    fn rest(&mut self, device: &DeviceId, now: Duration, orders: &mut Vec<Order>) {
        if let Some(device) = self.devices.get_mut(device) {
            device.health.handle_failure(now);
        }
        for shard in self.shards.values_mut() {
            let serves = shard.serving.as_ref().is_some_and(|(serving, _)| serving.device != *device);
            let starting =
                shard.other.take_if(|other| serves && other.engine.device == *device && other.loaded.is_none());
            orders.extend(starting.map(|other| stop(&other.engine)));
        }
    }
}

#[cfg(test)]
mod tests;
