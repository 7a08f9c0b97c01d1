//! Single events, one after the other; `core/tests/failover.rs` simulates whole nodes.

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const PROBE_AFTER: Duration = Duration::from_secs(10);

fn device(name: &str) -> DeviceId {
    DeviceId(name.to_owned())
}

/// A node with a GPU that falls back to the CPU, and one shard on the GPU: engine 1 serves it.
fn node() -> Failover<u64> {
    let devices = [(device("gpu"), Some(device("cpu"))), (device("cpu"), None)];
    let mut node = Failover::new(devices, PROBE_AFTER);
    assert_eq!(node.place(7, device("gpu")), [start(1, "gpu")]);
    assert_eq!(node.handle_loaded(7, EngineNumber(1), 1), outcome(Change::Up, []));
    node
}

fn start(engine: u64, on: &str) -> EngineOrder {
    EngineOrder::Start { shard: 7, engine: EngineNumber(engine), device: device(on), after: Duration::ZERO }
}

fn stop(engine: u64, on: &str) -> EngineOrder {
    EngineOrder::Stop { engine: EngineNumber(engine), device: device(on) }
}

fn outcome<const N: usize>(change: Change, orders: [EngineOrder; N]) -> Outcome {
    Outcome { change, orders: orders.to_vec() }
}

fn fail(node: &mut Failover<u64>, engine: u64, class: ErrorClass, second: u32) -> Outcome {
    node.handle_failed(7, EngineNumber(engine), class, second * SECOND)
}

fn load(node: &mut Failover<u64>, engine: u64) -> Outcome {
    node.handle_loaded(7, EngineNumber(engine), engine)
}

/// Engine 1 on the GPU is lost, engine 2 on the CPU serves, and engine 3 is loaded on the GPU again.
fn node_after_a_fallback() -> Failover<u64> {
    let mut node = node();
    assert_eq!(fail(&mut node, 1, ErrorClass::DeviceLost, 5), outcome(Change::Down, [start(2, "cpu")]));
    assert_eq!(load(&mut node, 2), outcome(Change::Up, []));
    assert!(node.poll_probes(14 * SECOND).is_empty());
    assert_eq!(node.poll_probes(15 * SECOND), [device("gpu")]);
    assert_eq!(node.handle_probe_passed(&device("gpu"), 16 * SECOND), [start(3, "gpu")]);
    assert_eq!(load(&mut node, 3), outcome(Change::Up, []));
    assert_eq!((node.serving(7), node.newest(7)), (Some(&2), Some((EngineNumber(3), &device("gpu")))));
    node
}

#[test]
fn a_shard_returns_to_its_device_beside_the_engine_that_serves() {
    let mut node = node_after_a_fallback();
    assert!(!node.concerns_users(7, EngineNumber(3)));
    assert_eq!(node.take_over(7), [stop(2, "cpu")]);
    assert_eq!(node.serving(7), Some(&3));
    assert_eq!(fail(&mut node, 2, ErrorClass::Fatal, 20), outcome(Change::Nothing, []), "a stopped engine");
}

#[test]
fn a_failed_fallback_is_replaced_by_the_engine_that_waits() {
    let mut node = node_after_a_fallback();
    assert_eq!(fail(&mut node, 2, ErrorClass::Fatal, 20), outcome(Change::Replaced, []));
    assert_eq!(node.serving(7), Some(&3));
}

#[test]
fn a_failure_beside_the_serving_engine_lets_the_device_rest() {
    let mut node = node_after_a_fallback();
    assert_eq!(fail(&mut node, 3, ErrorClass::Overload, 20), outcome(Change::Up, []), "engine 2 is the newest again");
    assert_eq!(node.health(&device("gpu")), Some(Health::Resting { until: 40 * SECOND }));
    assert_eq!(node.serving(7), Some(&2));
}

#[test]
fn a_load_that_fails_for_its_files_is_not_tried_again() {
    let mut node = node_after_a_fallback();
    assert_eq!(fail(&mut node, 3, ErrorClass::Caller, 20), outcome(Change::Up, []));
    assert_eq!(node.health(&device("gpu")), Some(Health::Well));
    assert!(node.handle_probe_passed(&device("gpu"), 30 * SECOND).is_empty());
}

#[test]
fn a_leaking_engine_is_replaced_once_in_a_while() {
    let mut node = node();
    assert_eq!(node.handle_leak(7, EngineNumber(1), SECOND), Some(start(2, "gpu")));
    assert_eq!(node.handle_leak(7, EngineNumber(1), 2 * SECOND), None, "one replacement at a time");
    assert_eq!(load(&mut node, 2), outcome(Change::Up, []));
    assert_eq!(node.take_over(7), [stop(1, "gpu")]);
    assert_eq!(node.handle_leak(7, EngineNumber(2), 500 * SECOND), None);
    assert_eq!(node.handle_leak(7, EngineNumber(2), 700 * SECOND), Some(start(3, "gpu")));
}

#[test]
fn a_leaking_engine_that_crashes_is_replaced_by_the_one_that_loads() {
    let mut node = node();
    assert_eq!(node.handle_leak(7, EngineNumber(1), SECOND), Some(start(2, "gpu")));
    assert_eq!(fail(&mut node, 1, ErrorClass::Fatal, 2), outcome(Change::Down, []), "no third engine");
    assert_eq!(load(&mut node, 2), outcome(Change::Up, []));
    assert_eq!(node.serving(7), Some(&2));
}

#[test]
fn a_lost_device_keeps_no_replacement_of_a_leaking_engine() {
    let mut node = node();
    assert_eq!(node.handle_leak(7, EngineNumber(1), SECOND), Some(start(2, "gpu")));
    let orders = [stop(2, "gpu"), start(3, "cpu")];
    assert_eq!(fail(&mut node, 1, ErrorClass::DeviceLost, 2), outcome(Change::Down, orders));
    assert_eq!(load(&mut node, 2), outcome(Change::Nothing, []), "a stopped engine");
}

#[test]
fn the_last_engine_that_loads_is_waited_for() {
    let mut node = node();
    assert_eq!(node.handle_leak(7, EngineNumber(1), SECOND), Some(start(2, "gpu")));
    assert_eq!(fail(&mut node, 1, ErrorClass::Overload, 2), outcome(Change::Down, []));
    assert_eq!(fail(&mut node, 2, ErrorClass::Overload, 3), outcome(Change::Lost, []));
}

/// Engine 2 on the CPU serves, while engine 3 loads on the GPU again.
fn node_that_fails_back() -> Failover<u64> {
    let mut node = node();
    fail(&mut node, 1, ErrorClass::DeviceLost, 5);
    load(&mut node, 2);
    node.poll_probes(15 * SECOND);
    assert_eq!(node.handle_probe_passed(&device("gpu"), 16 * SECOND), [start(3, "gpu")]);
    node
}

#[test]
fn a_load_on_the_own_device_is_waited_for_when_the_fallback_crashes() {
    let mut node = node_that_fails_back();
    assert_eq!(fail(&mut node, 2, ErrorClass::Fatal, 17), outcome(Change::Down, []));
    assert_eq!(load(&mut node, 3), outcome(Change::Up, []));
    let mut node = node_that_fails_back();
    fail(&mut node, 2, ErrorClass::Fatal, 17);
    let orders = [start(4, "cpu")];
    assert_eq!(fail(&mut node, 3, ErrorClass::DeviceLost, 18), outcome(Change::Down, orders));
    assert_eq!(load(&mut node, 4), outcome(Change::Up, []));
}

#[test]
fn a_shard_is_not_given_up_while_its_own_device_is_well() {
    let mut node = node();
    fail(&mut node, 1, ErrorClass::DeviceLost, 5);
    node.poll_probes(15 * SECOND);
    assert!(node.handle_probe_passed(&device("gpu"), 16 * SECOND).is_empty(), "the fallback still loads");
    assert_eq!(fail(&mut node, 2, ErrorClass::Overload, 17), outcome(Change::Down, [start(3, "gpu")]));
    assert_eq!(load(&mut node, 3), outcome(Change::Up, []));
}

#[test]
fn a_shard_starts_on_the_fallback_while_its_device_rests() {
    let mut node = node();
    fail(&mut node, 1, ErrorClass::DeviceLost, 5);
    let started = node.place(8, device("gpu"));
    assert!(matches!(&started[..], [EngineOrder::Start { shard: 8, device, .. }] if device.0 == "cpu"), "{started:?}");
    assert_eq!(node.remove(8).len(), 1);
    assert_eq!(node.remove(8), []);
}
