//! A device that fails and recovers, and its shards: restarts, the fallback, probes and promotions.

use super::{Random, seeds};
use crate::core::device_policy::{Decision, DevicePolicy, Health, PAUSE_MAX, PROBE_AFTER, ShardNumber, Start};
use crate::core::restart_policy::{Fallback, Verdict};
use exo_engines::ErrorClass;
use std::collections::BTreeMap;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const CLASSES: [ErrorClass; 5] =
    [ErrorClass::Fatal, ErrorClass::Fatal, ErrorClass::DeviceLost, ErrorClass::Transient, ErrorClass::Hung];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Serving {
    Nothing,
    Device,
    Fallback,
}

#[derive(Debug)]
struct Shard {
    serving: Serving,
    /// When the shard is started again.
    restart: Option<Duration>,
    /// When the shard is loaded on the device, beside the fallback's.
    beside: Option<Duration>,
}

struct World {
    random: Random,
    now: Duration,
    policy: DevicePolicy,
    shards: BTreeMap<ShardNumber, Shard>,
    is_ill: bool,
    /// When the running probe ends.
    probe: Option<Duration>,
    last_probe: Option<Duration>,
    promotions: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: Random::of(seed),
            now: Duration::ZERO,
            policy: DevicePolicy::new(Fallback::Available, PROBE_AFTER),
            shards: BTreeMap::new(),
            is_ill: false,
            probe: None,
            last_probe: None,
            promotions: 0,
        }
    }

    fn place(&mut self, number: ShardNumber) {
        let shard = Shard { serving: Serving::Nothing, restart: Some(self.now), beside: None };
        self.shards.insert(number, shard);
    }

    fn step(&mut self, wait: Duration) {
        self.now += wait;
        if self.policy.poll_probe(self.now) {
            assert!(self.probe.is_none(), "one probe at a time");
            let since = self.last_probe.map(|last| self.now - last);
            assert!(since.is_none_or(|since| since >= PROBE_AFTER), "a probe only {since:?} after the last one");
            (self.probe, self.last_probe) = (Some(self.now + SECOND * self.random.below(4) as u32), Some(self.now));
        }
        if self.probe.is_some_and(|end| end <= self.now) {
            self.probe = None;
            self.end_probe();
        }
        for number in self.shards.keys().copied().collect::<Vec<_>>() {
            self.advance(number);
        }
        for shard in self.shards.values() {
            assert!(shard.beside.is_none() || shard.serving != Serving::Device, "loaded twice: {shard:?}");
            assert!(shard.serving != Serving::Nothing || shard.restart.is_some(), "forgotten: {shard:?}");
        }
    }

    fn end_probe(&mut self) {
        // A device that fails under load may pass a small test.
        if self.is_ill && self.random.below(4) > 0 {
            return self.policy.handle_probe_failed(self.now);
        }
        for number in self.policy.handle_probe_passed(self.now) {
            let load = SECOND * self.random.below(20) as u32;
            let shard = self.shards.get_mut(&number).expect("only living shards are promoted");
            assert_eq!((shard.serving, shard.beside), (Serving::Fallback, None));
            shard.beside = Some(self.now + load);
        }
    }

    fn advance(&mut self, number: ShardNumber) {
        let now = self.now;
        let Some(shard) = self.shards.get_mut(&number) else { return };
        if shard.restart.is_some_and(|due| due <= now) {
            shard.restart = None;
            shard.serving = match self.policy.handle_start(number) {
                Start::Here => Serving::Device,
                Start::OnFallback => Serving::Fallback,
            };
        }
        if shard.beside.is_some_and(|loaded| loaded <= now) {
            shard.beside = None;
            match self.is_ill && self.random.below(2) == 0 {
                true => {
                    let decision = self.policy.handle_failure(number, ErrorClass::DeviceLost, now);
                    assert_eq!(decision, Decision::StayFallen, "the fallback serves on");
                }
                false => {
                    assert!(self.policy.handle_promoted(number));
                    (shard.serving, self.promotions) = (Serving::Device, self.promotions + 1);
                }
            }
        }
        if self.is_ill && shard.serving == Serving::Device && self.random.below(3) == 0 {
            let class = CLASSES[self.random.below(CLASSES.len() as u64) as usize];
            match self.policy.handle_failure(number, class, now) {
                Decision::Serve(Verdict::Restart { after }) => {
                    (shard.serving, shard.restart) = (Serving::Nothing, Some(now + after));
                }
                Decision::Serve(Verdict::FallBack) => shard.serving = Serving::Fallback,
                other => panic!("{class:?}: a shard with a fallback is not given up: {other:?}"),
            }
        }
    }

    fn is_settled(&self) -> bool {
        self.policy.health() == Health::Well && self.shards.values().all(|shard| shard.serving == Serving::Device)
    }
}

/// R1.4, R7.1–R7.5, R8.1–R8.5: a shard always serves or is about to start, whatever the device does; probes keep their
/// distance; and every shard is back on a device that has become well for good.
#[test]
fn shards_fall_back_and_return() {
    let mut steps = 0;
    for seed in seeds(150) {
        println!("EXO_SIM_SEED={seed}");
        let mut world = World::new(seed);
        let mut next = 0;
        for _ in 0..2000 {
            steps += 1;
            if world.random.below(60) == 0 {
                world.is_ill = !world.is_ill;
            }
            if world.shards.len() < 4 && world.random.below(20) == 0 {
                next += 1;
                world.place(next);
            }
            if world.random.below(200) == 0
                && let Some((over, _)) = world.shards.pop_first()
            {
                world.policy.handle_over(over);
            }
            let wait = Duration::from_millis(50 << world.random.below(8));
            world.step(wait);
        }
        world.is_ill = false;
        let healed = world.now;
        while !world.is_settled() {
            assert!(world.now < healed + PAUSE_MAX + 60 * SECOND, "not settled: {:?}", world.shards);
            world.step(SECOND);
        }
    }
    assert!(steps >= 2000);
}

/// R8.1–R8.5: a device that passes its test and then fails under load is tried less and less often.
#[test]
fn a_device_that_fails_again_is_left_alone_for_longer() {
    let mut world = World::new(1);
    world.place(1);
    world.is_ill = true;
    for _ in 0..24 * 3600 {
        world.step(SECOND);
    }
    assert!(world.promotions <= 9 + 24, "{} promotions in a day", world.promotions);
    assert_eq!(world.shards[&1].serving, Serving::Fallback);
}
