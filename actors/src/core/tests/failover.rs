//! A node whose devices fail and recover, and its shards: restarts, fallbacks, probes, returns and renewals. Orders and
//! reports cross: an engine's reports arrive late, even after its stop was ordered.

use super::{Random, seeds};
use crate::core::device_health::{PAUSE_MAX, PROBE_AFTER};
use crate::core::failover::{Change, EngineNumber, EngineOrder, Failover, Outcome, ShardNumber};
use exo_engines::ErrorClass;
use exo_engines::engine::DeviceId;
use std::collections::BTreeMap;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
/// All but those of the caller, after which a shard does not return.
const CLASSES: [ErrorClass; 6] = [
    ErrorClass::Fatal,
    ErrorClass::Fatal,
    ErrorClass::DeviceLost,
    ErrorClass::Transient,
    ErrorClass::Hung,
    ErrorClass::Overload,
];
const DEVICES: [&str; 3] = ["gpu-0", "gpu-1", "cpu"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Loading,
    Loaded,
    /// It has ended by itself, and its report is on the way.
    Failed,
}

#[derive(Debug, Clone)]
struct Engine {
    shard: ShardNumber,
    device: DeviceId,
    life: Life,
    /// When its load ends.
    ready: Duration,
}

#[derive(Debug, Clone, Copy)]
enum Report {
    Loaded,
    Failed(ErrorClass),
    Leaks,
}

struct World {
    random: Random,
    now: Duration,
    failover: Failover<EngineNumber>,
    /// The shards with their own devices.
    shards: BTreeMap<ShardNumber, DeviceId>,
    /// The engines that were not stopped, and whose failures were not reported.
    engines: BTreeMap<EngineNumber, Engine>,
    /// Reports on their way, in the order of their arrival.
    reports: BTreeMap<(Duration, u64), (ShardNumber, EngineNumber, Report)>,
    sent: u64,
    ill: BTreeMap<DeviceId, bool>,
    /// Whether nothing fails any more.
    is_calm: bool,
    /// When the running probes end.
    probes: BTreeMap<DeviceId, Duration>,
    last_probes: BTreeMap<DeviceId, Duration>,
    /// How often shards returned to their own devices.
    returns: u32,
    lost: u32,
}

fn device(name: &str) -> DeviceId {
    DeviceId(name.to_owned())
}

impl World {
    fn new(seed: u64) -> Self {
        let fallback = |name| (name != "cpu").then(|| device("cpu"));
        Self {
            random: Random::of(seed),
            now: Duration::ZERO,
            failover: Failover::new(DEVICES.map(|name| (device(name), fallback(name))), PROBE_AFTER),
            shards: BTreeMap::new(),
            engines: BTreeMap::new(),
            reports: BTreeMap::new(),
            sent: 0,
            ill: DEVICES.map(|name| (device(name), false)).into(),
            is_calm: false,
            probes: BTreeMap::new(),
            last_probes: BTreeMap::new(),
            returns: 0,
            lost: 0,
        }
    }

    fn happens(&mut self, once_in: u64) -> bool {
        self.random.below(once_in) == 0
    }

    fn place(&mut self, number: ShardNumber, own: &str) {
        self.shards.insert(number, device(own));
        let orders = self.failover.place(number, device(own));
        self.carry_out(orders);
    }

    fn remove(&mut self, number: ShardNumber) {
        self.shards.remove(&number);
        let orders = self.failover.remove(number);
        self.carry_out(orders);
        assert!(self.engines.values().all(|engine| engine.shard != number), "an engine of a removed shard runs on");
    }

    fn carry_out(&mut self, orders: Vec<EngineOrder>) {
        for order in orders {
            match order {
                EngineOrder::Start { shard, engine, device, after } => {
                    let ready = self.now + after + SECOND * self.random.below(20) as u32;
                    let started = Engine { shard, device, life: Life::Loading, ready };
                    assert!(self.engines.insert(engine, started).is_none(), "a number is used twice");
                }
                EngineOrder::Stop { engine, .. } => {
                    assert!(self.engines.remove(&engine).is_some(), "{engine:?} is stopped, but does not run");
                }
            }
        }
    }

    fn report(&mut self, engine: EngineNumber, report: Report) {
        let shard = self.engines[&engine].shard;
        let latest = self.reports.iter().rev().find(|(_, (_, of, _))| *of == engine).map(|((due, _), _)| *due);
        let due = self.now + Duration::from_millis(self.random.below(1500));
        self.sent += 1;
        self.reports.insert((due.max(latest.unwrap_or_default()), self.sent), (shard, engine, report));
    }

    fn step(&mut self, wait: Duration) {
        self.now += wait;
        self.run_probes();
        for number in self.engines.keys().copied().collect::<Vec<_>>() {
            self.run(number);
        }
        while let Some(entry) = self.reports.first_entry()
            && entry.key().0 <= self.now
        {
            let (shard, engine, report) = entry.remove();
            self.arrive(shard, engine, report);
        }
        // The owner connects the shards again.
        for shard in self.shards.keys().copied().collect::<Vec<_>>() {
            if self.happens(3) {
                let was_away = self.is_away(shard);
                let orders = self.failover.take_over(shard);
                self.returns += u32::from(was_away && !self.is_away(shard));
                self.carry_out(orders);
            }
        }
        for shard in self.shards.keys() {
            let engines = self.engines.values().filter(|engine| engine.shard == *shard).count();
            assert!((1..=2).contains(&engines), "shard {shard} has {engines} engines");
        }
    }

    /// Whether another device than its own serves the shard.
    fn is_away(&self, shard: ShardNumber) -> bool {
        let serving = self.failover.serving(shard).and_then(|engine| self.failover.device_of(shard, *engine));
        serving.is_some_and(|device| *device != self.shards[&shard])
    }

    fn run_probes(&mut self) {
        for id in self.failover.poll_probes(self.now) {
            let since = self.last_probes.insert(id.clone(), self.now).map(|last| self.now - last);
            assert!(since.is_none_or(|since| since >= PROBE_AFTER), "a probe only {since:?} after the last one");
            let end = self.now + SECOND * self.random.below(4) as u32;
            assert_eq!(self.probes.insert(id, end), None, "one probe at a time");
        }
        let ended = self.probes.extract_if(.., |_, end| *end <= self.now).map(|(id, _)| id);
        for id in ended.collect::<Vec<_>>() {
            // A device that fails under load may pass a small test.
            if self.ill[&id] && !self.happens(4) {
                self.failover.handle_probe_failed(&id, self.now);
            } else {
                let orders = self.failover.handle_probe_passed(&id, self.now);
                self.carry_out(orders);
            }
        }
    }

    /// Lets an engine load, serve, leak or fail.
    fn run(&mut self, number: EngineNumber) {
        let engine = self.engines[&number].clone();
        let is_ill = self.ill[&engine.device];
        let becomes = match engine.life {
            Life::Failed => return,
            Life::Loading if engine.ready > self.now => return,
            Life::Loading if is_ill && self.happens(2) => Life::Failed,
            Life::Loading => Life::Loaded,
            Life::Loaded if is_ill && self.happens(3) => Life::Failed,
            // An engine may fail on a device that is well.
            Life::Loaded if !self.is_calm && self.happens(2000) => Life::Failed,
            Life::Loaded => {
                if !self.is_calm && self.happens(50) {
                    self.report(number, Report::Leaks);
                }
                return;
            }
        };
        let class = CLASSES[self.random.below(CLASSES.len() as u64) as usize];
        self.report(number, if becomes == Life::Failed { Report::Failed(class) } else { Report::Loaded });
        if let Some(engine) = self.engines.get_mut(&number) {
            engine.life = becomes;
        }
    }

    fn arrive(&mut self, shard: ShardNumber, engine: EngineNumber, report: Report) {
        let is_known = self.engines.contains_key(&engine);
        assert_eq!(self.failover.device_of(shard, engine).is_some(), is_known);
        let outcome = match report {
            Report::Loaded => self.failover.handle_loaded(shard, engine, engine),
            Report::Leaks => {
                let order = self.failover.handle_leak(shard, engine, self.now);
                Outcome { change: Change::Nothing, orders: order.into_iter().collect() }
            }
            Report::Failed(class) => {
                self.engines.remove(&engine);
                self.failover.handle_failed(shard, engine, class, self.now)
            }
        };
        assert!(is_known || outcome == Outcome { change: Change::Nothing, orders: Vec::new() }, "{outcome:?}");
        self.carry_out(outcome.orders);
        if outcome.change == Change::Lost {
            self.lost += 1;
            let own = self.shards[&shard].0.clone();
            self.remove(shard);
            self.place(shard, &own);
        }
    }

    fn is_settled(&self) -> bool {
        self.shards.iter().all(|(shard, own)| {
            let mut engines = self.engines.values().filter(|engine| engine.shard == *shard);
            let serving = self.failover.serving(*shard).and_then(|engine| self.engines.get(engine));
            engines.next().is_some()
                && engines.next().is_none()
                && serving.is_some_and(|engine| engine.device == *own && engine.life == Life::Loaded)
        })
    }

    fn calm(&mut self) {
        self.ill.values_mut().for_each(|is_ill| *is_ill = false);
        self.is_calm = true;
    }
}

/// R1.4, R7.1–R7.5, R8.1–R8.5: whatever the devices do, a shard has one or two engines that serve or load, and no
/// engine is forgotten; probes keep their distance; and every shard is back on its device once all devices are well.
#[test]
fn shards_fall_back_and_return() {
    let (mut returns, mut lost) = (0, 0);
    let seeds = seeds(150);
    let seeds_count = seeds.len();
    for seed in seeds {
        println!("EXO_SIM_SEED={seed}");
        let mut world = World::new(seed);
        let mut next = 0;
        for _ in 0..2000 {
            let name = DEVICES[world.random.below(3) as usize];
            // The fallback is ill less often, and not for long.
            let (falls_ill, heals) = if name == "cpu" { (400, 8) } else { (40, 40) };
            let is_ill = world.ill[&device(name)];
            if world.happens(if is_ill { heals } else { falls_ill }) {
                world.ill.insert(device(name), !is_ill);
            }
            if world.shards.len() < 4 && world.happens(20) {
                next += 1;
                world.place(next, name);
            }
            if world.happens(200)
                && let Some(&over) = world.shards.keys().next()
            {
                world.remove(over);
            }
            let wait = Duration::from_millis(50 << world.random.below(8));
            world.step(wait);
        }
        world.calm();
        let healed = world.now;
        while !world.is_settled() {
            assert!(world.now < healed + PAUSE_MAX + 60 * SECOND, "not settled: {:?}", world.engines);
            world.step(SECOND);
        }
        (returns, lost) = (returns + world.returns, lost + world.lost);
    }
    println!("{returns} returns to a device, {lost} shards given up");
    assert!(seeds_count < 100 || returns > 1000 && lost > 10, "{returns} returns, {lost} shards given up");
}

/// R8.1–R8.5: a device that passes its test and then fails under load is tried less and less often.
#[test]
fn a_device_that_fails_again_is_left_alone_for_longer() {
    let mut world = World::new(1);
    world.place(1, "gpu-0");
    world.ill.insert(device("gpu-0"), true);
    for _ in 0..24 * 3600 {
        world.step(SECOND);
    }
    // The pause doubles from ten seconds to an hour nine times; then there is one probe an hour, of which one in four
    // passes.
    assert!((1..=9 + 24).contains(&world.returns), "{} returns in a day", world.returns);
    assert_eq!(world.failover.newest(1).map(|(_, on)| on), Some(&device("cpu")));
}
