//! Which of a shard's engines serves, while others are loaded beside it or have failed.
//!
//! A shard has one engine, as a rule. It has more while it goes back from the fallback to its own device, and while an
//! engine that leaks memory is replaced. The devices report loads and failures late and in any order; this state
//! machine takes their reports, and returns orders to the devices. It has no I/O.

use exo_engines::engine::DeviceId;

/// One engine of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct EngineRun {
    pub device: DeviceId,
    /// Counts the engines that the device has started.
    pub run: u64,
}

/// An order to the device of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EngineOrder {
    /// The engine serves now: a load beside another device's has succeeded.
    Promoted(EngineRun),
    /// The engine, and a restart of it that may be due, is to end.
    Retire(EngineRun),
    /// The engine has failed while it served, though its device takes it for one beside: the shard serves nowhere.
    Unserved(EngineRun),
}

/// What a failure means for the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The shard serves no more, or still loads.
    Down,
    /// Another engine takes over: the shard is up with that one's load.
    Replaced,
    /// The engine beside the serving one is gone: the shard is up with the serving one's load.
    BesideGone,
    /// The engine did not serve.
    Nothing,
}

/// The loaded engines of a shard, with what the worker keeps of each.
#[derive(Debug)]
pub(crate) struct ShardEngines<T> {
    /// The device of the shard's placement.
    own: DeviceId,
    serving: Option<(EngineRun, T)>,
    beside: Option<(EngineRun, T)>,
    /// Whether the serving engine is to be replaced by another one on its device.
    is_renewing: bool,
}

impl<T> ShardEngines<T> {
    pub(crate) fn new(own: DeviceId) -> Self {
        Self { own, serving: None, beside: None, is_renewing: false }
    }

    /// The engine that serves.
    pub(crate) fn serving(&self) -> Option<&T> {
        self.serving.as_ref().map(|(_, engine)| engine)
    }

    /// The engine that was loaded last: the one that takes over, or that serves.
    pub(crate) fn newest(&self) -> Option<(&EngineRun, &T)> {
        self.beside.as_ref().or(self.serving.as_ref()).map(|(run, engine)| (run, engine))
    }

    /// Whether users wait for this engine, or are served by it.
    pub(crate) fn concerns_users(&self, run: &EngineRun) -> bool {
        self.serving.as_ref().is_none_or(|(serving, _)| serving == run)
    }

    /// Whether an engine waits to take over.
    pub(crate) fn has_beside(&self) -> bool {
        self.beside.is_some()
    }

    /// Notes that the serving engine is to be replaced by another one on its device.
    pub(crate) fn handle_renewal(&mut self) {
        self.is_renewing = true;
    }

    /// Notes that an engine is loaded. Returns whether the shard is up with it, and orders to devices.
    pub(crate) fn handle_up(&mut self, run: EngineRun, engine: T) -> (bool, Vec<EngineOrder>) {
        let Some((serving, _)) = &self.serving else {
            let promoted = (run.device == self.own).then(|| EngineOrder::Promoted(run.clone()));
            self.serving = Some((run, engine));
            return (true, promoted.into_iter().collect());
        };
        let comes_home = run.device == self.own && serving.device != self.own;
        let renews = self.is_renewing && run.device == serving.device && run.run > serving.run;
        let is_home = |beside: &(EngineRun, T)| beside.0.device == self.own;
        if !comes_home && (!renews || self.beside.as_ref().is_some_and(is_home)) {
            return (false, vec![EngineOrder::Retire(run)]);
        }
        let replaced = self.beside.replace((run, engine));
        (true, replaced.map(|(run, _)| EngineOrder::Retire(run)).into_iter().collect())
    }

    /// Lets the engine take over that waits to.
    pub(crate) fn take_over(&mut self) -> Vec<EngineOrder> {
        let Some(next) = self.beside.take() else { return Vec::new() };
        self.is_renewing = false;
        let promoted = EngineOrder::Promoted(next.0.clone());
        let retired = self.serving.replace(next).map(|(run, _)| EngineOrder::Retire(run));
        [Some(promoted), retired].into_iter().flatten().collect()
    }

    /// Notes that an engine has failed, which its device restarts or passes on.
    pub(crate) fn handle_down(&mut self, run: &EngineRun) -> (Failure, Vec<EngineOrder>) {
        if self.serving.as_ref().is_some_and(|(serving, _)| serving == run) {
            self.serving = None;
            if !self.has_beside() {
                self.is_renewing = false;
                return (Failure::Down, Vec::new());
            }
            let mut orders = self.take_over();
            orders.push(EngineOrder::Retire(run.clone()));
            return (Failure::Replaced, orders);
        }
        if self.beside.as_ref().is_some_and(|(beside, _)| beside == run) {
            self.beside = None;
            return (Failure::BesideGone, Vec::new());
        }
        let failure = if self.serving.is_none() { Failure::Down } else { Failure::Nothing };
        (failure, Vec::new())
    }

    /// Notes that an engine has failed which its device takes for one beside.
    pub(crate) fn handle_not_promoted(&mut self, run: &EngineRun) -> (Failure, Vec<EngineOrder>) {
        if self.serving.is_none() {
            return (Failure::Nothing, Vec::new());
        }
        let (failure, mut orders) = self.handle_down(run);
        if failure == Failure::Down {
            orders.push(EngineOrder::Unserved(run.clone()));
        }
        (failure, orders)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(device: &str, run: u64) -> EngineRun {
        EngineRun { device: DeviceId(device.to_owned()), run }
    }

    fn engines() -> ShardEngines<u32> {
        ShardEngines::new(DeviceId("gpu".to_owned()))
    }

    #[test]
    fn a_late_fallback_does_not_replace_the_own_device() {
        let mut shard = engines();
        assert_eq!(shard.handle_up(run("gpu", 2), 2), (true, vec![EngineOrder::Promoted(run("gpu", 2))]));
        assert_eq!(shard.handle_up(run("cpu", 1), 1), (false, vec![EngineOrder::Retire(run("cpu", 1))]));
        assert_eq!(shard.serving(), Some(&2));
    }

    #[test]
    fn the_own_device_takes_over_from_the_fallback() {
        let mut shard = engines();
        assert!(shard.handle_up(run("cpu", 1), 1).0);
        assert_eq!(shard.handle_up(run("gpu", 2), 2), (true, Vec::new()));
        assert_eq!((shard.serving(), shard.newest()), (Some(&1), Some((&run("gpu", 2), &2))));
        let orders = [EngineOrder::Promoted(run("gpu", 2)), EngineOrder::Retire(run("cpu", 1))];
        assert_eq!(shard.take_over(), orders);
        assert_eq!(shard.handle_down(&run("cpu", 1)), (Failure::Nothing, Vec::new()), "a late report");
        assert_eq!(shard.handle_down(&run("gpu", 2)), (Failure::Down, Vec::new()));
    }

    #[test]
    fn a_failed_engine_is_replaced_by_the_one_beside_and_not_restarted() {
        let mut shard = engines();
        shard.handle_up(run("cpu", 1), 1);
        shard.handle_up(run("gpu", 2), 2);
        let orders = vec![EngineOrder::Promoted(run("gpu", 2)), EngineOrder::Retire(run("cpu", 1))];
        assert_eq!(shard.handle_down(&run("cpu", 1)), (Failure::Replaced, orders));
        assert_eq!(shard.handle_up(run("cpu", 3), 3), (false, vec![EngineOrder::Retire(run("cpu", 3))]));
        assert_eq!(shard.serving(), Some(&2));
    }

    #[test]
    fn an_engine_is_renewed_only_if_that_is_wanted() {
        let mut shard = engines();
        shard.handle_up(run("gpu", 1), 1);
        assert_eq!(shard.handle_up(run("gpu", 2), 2), (false, vec![EngineOrder::Retire(run("gpu", 2))]));
        shard.handle_renewal();
        assert_eq!(shard.handle_up(run("gpu", 3), 3), (true, Vec::new()));
        shard.take_over();
        assert_eq!(shard.serving(), Some(&3));
    }

    #[test]
    fn the_own_device_goes_before_a_renewal_of_the_fallback() {
        let mut shard = engines();
        shard.handle_up(run("cpu", 1), 1);
        shard.handle_renewal();
        assert!(shard.handle_up(run("cpu", 2), 2).0);
        assert_eq!(shard.handle_up(run("gpu", 3), 3), (true, vec![EngineOrder::Retire(run("cpu", 2))]));
        assert_eq!(shard.handle_up(run("cpu", 4), 4), (false, vec![EngineOrder::Retire(run("cpu", 4))]));
        shard.take_over();
        assert_eq!(shard.serving(), Some(&3));
    }

    #[test]
    fn an_engine_that_fails_right_after_its_promotion_leaves_the_shard_unserved() {
        let mut shard = engines();
        shard.handle_up(run("cpu", 1), 1);
        shard.handle_up(run("gpu", 2), 2);
        shard.take_over();
        let expected = (Failure::Down, vec![EngineOrder::Unserved(run("gpu", 2))]);
        assert_eq!(shard.handle_not_promoted(&run("gpu", 2)), expected);
        assert_eq!(shard.handle_not_promoted(&run("gpu", 3)), (Failure::Nothing, Vec::new()), "a load beside nothing");
    }
}
