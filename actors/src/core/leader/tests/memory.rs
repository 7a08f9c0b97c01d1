//! Devices that run out of memory.

use super::*;
use crate::core::members::{DeviceOffer, card_at};
use crate::core::request::RequestError;
use crate::core::speed::Speed;
use exo_engines::engine::{DeviceKind, DeviceReport};

fn gpu() -> DeviceId {
    DeviceId("gpu".to_owned())
}

/// A member whose best device is a GPU of the speed `bytes_per_s`. Its CPU was not measured.
fn member_with_gpu(gigabytes: u64, bytes_per_s: f64, links: &[u64]) -> MemberReport {
    let mut member = member(gigabytes, bytes_per_s, links);
    let cpu = member.devices.pop().expect("a CPU").report;
    let report = DeviceReport { id: gpu(), kind: DeviceKind::Gpu, engine: "gpu".to_owned(), ..cpu.clone() };
    let speed = Some(Speed { bytes_per_s, spread: 1.0 });
    member.devices = vec![DeviceOffer { report, speed }, DeviceOffer { report: cpu, speed: None }];
    member
}

/// A member whose best devices are cards with memory of their own.
fn member_with_cards(gigabytes: u64, cards: &[u64], links: &[u64]) -> MemberReport {
    let mut member = member(gigabytes, 10e9, links);
    let cpu = member.devices.pop().expect("a CPU").report;
    let card = |(number, gigabytes): (usize, &u64)| {
        let report = card_at(&format!("0000:0{number}:00.0"), gigabytes * GB);
        let id = DeviceId(format!("intel:{number}"));
        DeviceOffer { report: DeviceReport { id, ..report }, speed: Some(Speed { bytes_per_s: 100e9, spread: 1.0 }) }
    };
    member.devices = cards.iter().enumerate().map(card).collect();
    member.devices.push(DeviceOffer { report: cpu, speed: None });
    member
}

fn card(number: u64) -> DeviceId {
    DeviceId(format!("intel:{number}"))
}

impl Cluster {
    /// Lets a device of node 1 report that it ran out of memory.
    fn run_out(&mut self, instance: InstanceId, device: DeviceId, free_bytes: Option<u64>) {
        let stamp = self.desired.get(instance).expect("placed").stamp;
        let error = RequestError::DeviceMemory { what: "w".to_owned(), remedy: "r".into(), free_bytes };
        let broken = BrokenShard { instance, stamp, node: id(1), device, has_run: true, error };
        self.decide(|leader, round| leader.handle_broken(round, id(1), broken));
    }

    /// The layers that a device has.
    fn layers_on(&self, instance: InstanceId, node: u64, device: &DeviceId) -> usize {
        let stages = self.placement(instance).stages.iter();
        stages.filter(|s| (s.node, &s.device) == (id(node), device)).map(|stage| stage.layers.len()).sum()
    }
}

/// R7.1–R7.5: a device that ran out of memory gets as many layers as it had memory for, and others get the rest.
#[test]
fn a_device_out_of_memory_gets_fewer_layers() {
    let mut cluster = Cluster::of(vec![(1, member(10, 10e9, &[2])), (2, member(4, 10e9, &[1]))]);
    let instance = cluster.run(ModelSpec::new("m"));
    assert_eq!(cluster.placement(instance).stages.len(), 1);
    cluster.run_out(instance, cpu(), Some(5 * GB + GB / 2));
    let (first, second) = (cluster.layers_on(instance, 1, &cpu()), cluster.layers_on(instance, 2, &cpu()));
    assert!(first <= 5 && second <= 4 && first + second == 8, "{first} and {second} layers");
}

/// R1.4, R7.1–R7.5: the CPU of a GPU's node gets the layers that the GPU has no memory for, all of them if the GPU does
/// not tell how much it had.
#[test]
fn the_cpu_gets_what_a_gpu_has_no_memory_for() {
    for (free_bytes, on_gpu) in [(Some(5 * GB + GB / 2), 5), (Some(GB / 2), 0), (None, 0)] {
        let mut cluster = Cluster::of(vec![(1, member_with_gpu(20, 100e9, &[]))]);
        let instance = cluster.run(ModelSpec::new("m"));
        assert_eq!(cluster.layers_on(instance, 1, &gpu()), 8);
        cluster.run_out(instance, gpu(), free_bytes);
        let layers = (cluster.layers_on(instance, 1, &gpu()), cluster.layers_on(instance, 1, &cpu()));
        assert_eq!(layers, (on_gpu, 8 - on_gpu), "{free_bytes:?}");
    }
}

/// R7.1–R7.5: a model with layers on the CPU stays there, rather than try the full GPU again and again. It moves when a
/// better machine joins.
#[test]
fn a_full_gpu_is_not_tried_again_and_again() {
    let mut cluster = Cluster::of(vec![(1, member_with_gpu(20, 100e9, &[2])), (2, member(2, 1e9, &[1]))]);
    let instance = cluster.run(ModelSpec::new("m"));
    cluster.run_out(instance, gpu(), Some(5 * GB + GB / 2));
    let split = cluster.placement(instance).clone();
    assert_eq!((cluster.layers_on(instance, 1, &gpu()), cluster.layers_on(instance, 1, &cpu())), (5, 3));
    cluster.rounds(300);
    assert_eq!(*cluster.placement(instance), split);
    cluster.members.0.insert(id(3), member_with_gpu(20, 100e9, &[1, 2]));
    for (number, report) in [(1, 3), (2, 3)] {
        let link = Link { rtt_s: 1e-4, bytes_per_s: Some(1e9), spread: 1.0 };
        cluster.members.0.get_mut(&id(number)).expect("a member").links.insert(id(report), link);
    }
    cluster.rounds(60);
    assert_eq!(cluster.layers_on(instance, 3, &gpu()), 8, "{:?}", cluster.placement(instance));
}

/// R1.5, R7.1–R7.5: a model of 8 GB that no card can hold alone is split over two, and leaves the CPU alone.
#[test]
fn a_model_is_split_over_the_cards_of_a_machine() {
    let mut cluster = Cluster::of(vec![(1, member_with_cards(64, &[6, 6], &[]))]);
    let instance = cluster.run(ModelSpec::new("m"));
    let layers = [card(0), card(1), cpu()].map(|device| cluster.layers_on(instance, 1, &device));
    assert!(layers[0] > 0 && layers[1] > 0 && layers[0] + layers[1] == 8, "{layers:?}");
}

/// R1.5, R7.1–R7.5: what a card cannot hold goes to the CPU of its machine, and stays there; a card that can hold a
/// model shares it with nobody.
#[test]
fn the_cpu_helps_a_card_that_is_too_small() {
    for (gigabytes, on_card) in [(6, 5), (20, 8)] {
        let mut cluster = Cluster::of(vec![(1, member_with_cards(64, &[gigabytes], &[]))]);
        let instance = cluster.run(ModelSpec::new("m"));
        let layers = || (cluster.layers_on(instance, 1, &card(0)), cluster.layers_on(instance, 1, &cpu()));
        assert_eq!(layers(), (on_card, 8 - on_card), "a card of {gigabytes} GB");
        let placement = cluster.placement(instance).clone();
        cluster.rounds(120);
        assert_eq!(*cluster.placement(instance), placement);
    }
}

/// R7.1–R7.5: a card's memory and the machine's are promised apart: a model on the CPU takes nothing from the card.
#[test]
fn models_on_the_cpu_leave_cards_their_memory() {
    let member = MemberReport { memory_limit_bytes: None, ..member_with_cards(12, &[10], &[]) };
    let mut cluster = Cluster::of(vec![(1, member)]);
    let on_cpu = cluster.run(ModelSpec { device: Some(cpu()), ..ModelSpec::new("on-cpu") });
    let on_card = cluster.run(ModelSpec::new("m"));
    assert_eq!(cluster.layers_on(on_cpu, 1, &cpu()), 8);
    assert_eq!(cluster.layers_on(on_card, 1, &card(0)), 8);
    cluster.rounds(60);
    assert_eq!((cluster.layers_on(on_cpu, 1, &cpu()), cluster.layers_on(on_card, 1, &card(0))), (8, 8));
}
