//! A hostile member: it sends the protocol's messages at times and with values that no honest member uses. It runs in a
//! process of its own, since a process can have only one clustered node.

use super::{ClusterConfig, Node, NodeActors, NodeArgs, NodeConfig};
use crate::cluster::{Cluster, Evicted};
use crate::core::context::Context;
use crate::core::desired::{DesiredEntry, Stamp, Target};
use crate::core::leader::{BrokenShard, PlacementRequest};
use crate::core::members::MemberReport;
use crate::core::plan::Demand;
use crate::core::request::{GenerateRequest, Generated, Prompt, RequestError};
use crate::core::spec::{FilesId, InstanceId, Model, ModelSpec};
use crate::core::stage::{StageEvent, StageTask};
use crate::core::watchdog::HangTimeouts;
use crate::models::ModelsConfig;
use crate::planner::PlannerLimits;
use crate::transport::protocol::{
    ControlMessage, DataHello, HeadRequest, LinkEnd, LinkHello, Revision, StageOrder, WeightsQuery, WeightsRequest,
};
use crate::transport::router::WeightsPeer;
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::{DeviceId, Incarnation};
use exo_engines::sampler::{SamplerSpec, SamplingParams};
use exo_net::{ClusterSecret, Identity, JoinToken, Network, NetworkConfig, NodeId, Payload, Priority, WireType};
use ractor::Actor;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;

fn config(secret: ClusterSecret, peers: Vec<SocketAddr>, models: &std::path::Path) -> (NodeConfig, Option<SocketAddr>) {
    let cookie = secret.cookie();
    let network = NetworkConfig::loopback(secret, peers).expect("random bytes");
    let id = network.identity.node_id();
    let (network, events) = Network::start(network).expect("it listens");
    let address = network.address();
    let addresses = address.into_iter().collect();
    let evicted = Evicted::new("test".to_owned(), BTreeMap::new(), |_| Ok(()));
    let models = ModelsConfig::of_folder(models);
    let config = NodeConfig {
        id,
        name: "test".to_owned(),
        factories: vec![Arc::new(CpuFactory::new(1))],
        disabled_devices: Vec::new(),
        models,
        limits: PlannerLimits::default(),
        hang_timeouts: HangTimeouts::default(),
        probe_after: Duration::from_secs(10),
        wire_type: WireType::F32,
        cluster: Some(ClusterConfig { network, events, cookie, addresses, evicted }),
    };
    (config, address)
}

/// A plausible shard of a model that no node has.
fn task(stamp: Stamp) -> StageTask {
    StageTask {
        instance: InstanceId(7),
        stamp,
        stage: 0,
        spec: ModelSpec::new("/etc/passwd"),
        files: FilesId([1; 32]),
        layers: 0..9,
        device: DeviceId("cpu".to_owned()),
        context_tokens: u32::MAX,
        kv_pages: 1 << 20,
        memory_bytes: 1 << 40,
    }
}

/// Shards with impossible values, which no planner places.
fn absurd_tasks(stamp: Stamp) -> [StageTask; 4] {
    let task = task(stamp);
    [
        #[expect(clippy::reversed_empty_ranges, reason = "an impossible range of layers")]
        StageTask { layers: 9..3, ..task.clone() },
        StageTask { stage: usize::MAX, ..task.clone() },
        StageTask { kv_pages: u32::MAX, ..task.clone() },
        StageTask { memory_bytes: u64::MAX, ..task },
    ]
}

/// The protocol's control messages, in an order and with values that no honest member uses.
fn out_of_turn(own: NodeId, round: u64) -> Vec<ControlMessage> {
    let stamp = Stamp { counter: u64::MAX - round, by: own };
    let (instance, incarnation) = (InstanceId(round), Incarnation { epoch: u64::MAX, owner: *own.as_bytes() });
    let events = [
        StageEvent::Up { stage: usize::MAX, device: DeviceId("x".repeat(10_000)), load: 0 },
        StageEvent::Loading { stage: 3, loaded_bytes: u64::MAX, total_bytes: 0 },
        StageEvent::Wired { stage: 0, incarnation },
        StageEvent::Cut { stage: 9, incarnation, what: "x".repeat(10_000) },
    ];
    let wire = StageOrder::Wire {
        instance: InstanceId(7),
        stage: 2,
        layers: 0..9,
        device: DeviceId("cpu".to_owned()),
        incarnation,
        from: own,
        next: own,
        to: LinkEnd::Stage(usize::MAX),
        wire_type: WireType::F16,
    };
    let demand = Demand {
        layer_bytes: vec![u64::MAX / 4; 2000],
        layer_cost_bytes: vec![1; 3],
        head_cost_bytes: u64::MAX,
        kv_pages: u32::MAX,
        kv_bytes: vec![u64::MAX / 4; 2000],
        embedding_bytes: u64::MAX,
        head_bytes: u64::MAX,
        ties_embeddings: false,
        row_bytes: 0,
    };
    let model = Model {
        name: "m".to_owned(),
        family: String::new(),
        quantization: String::new(),
        context: Context::largest(None, 0, None),
        vocabulary: 256,
        files: FilesId([2; 32]),
    };
    let spec = ModelSpec { shards: Some(usize::MAX), ..ModelSpec::new("m") };
    let ask = PlacementRequest { spec: spec.clone(), model, demand };
    let entries =
        (0..500).map(|id| (InstanceId(id), DesiredEntry { stamp, target: Target::Stopped { error: None } })).collect();
    let tasks = absurd_tasks(stamp).into_iter().chain([task(stamp)]);
    let starts = tasks.map(|task| StageOrder::Start(Box::new(task)));
    let orders = starts.chain([wire, StageOrder::Clear { instance: InstanceId(7), below: stamp }]);
    let error = RequestError::Moved;
    let device = DeviceId("cpu".to_owned());
    let others = [
        ControlMessage::Desired(entries),
        ControlMessage::Want(Box::new(ask)),
        ControlMessage::Refused { spec, error: error.clone() },
        ControlMessage::Broken(Box::new(BrokenShard { instance, stamp, node: own, device, has_run: true, error })),
    ];
    let events = events.into_iter().map(|event| ControlMessage::StageEvent { instance, stamp, event });
    events.chain(orders.map(ControlMessage::Stage)).chain(others).chain(reports(round)).collect()
}

/// A plausible report with another list's digest, a report with too many instances, and evictions of unknown nodes.
fn reports(round: u64) -> Vec<ControlMessage> {
    let report = MemberReport {
        addresses: (0..200).map(|port| SocketAddr::from(([127, 0, 0, 1], 1 + port))).collect(),
        devices: Vec::new(),
        is_draining: true,
        list: round,
        ..MemberReport::of_cpu(1 << 30, 1e10)
    };
    let absurd = MemberReport { in_use: vec![InstanceId(round); 100_000], ..report.clone() };
    let evicted = |number: u64| {
        let node = format!("{:064x}", round << 8 | number).parse().expect("an id");
        (node, Revision { number: 1, by: "x".repeat(1000) })
    };
    let nobody = (0..100).map(evicted).collect();
    let reports = [report, absurd].map(|report| ControlMessage::Report(Box::new(report)));
    reports.into_iter().chain([ControlMessage::Evicted(nobody)]).collect()
}

/// Requests for an existing head, with tokens and sampling parameters that no model accepts.
fn requests(instance: InstanceId) -> Vec<DataHello> {
    let request = |params, prompt, generated| {
        let sampler = SamplerSpec { params, prompt, generated };
        let request = Box::new(HeadRequest { sampler, max_tokens: u32::MAX, ends: BTreeSet::new() });
        DataHello::Request { instance, request }
    };
    let greedy = SamplingParams::greedy;
    vec![
        request(greedy(), vec![1, u32::MAX], Vec::new()),
        request(greedy(), vec![1], vec![u32::MAX; 3]),
        request(greedy(), Vec::new(), Vec::new()),
        request(SamplingParams { top_logprobs: u32::MAX, ..greedy() }, vec![1], Vec::new()),
        request(SamplingParams { temperature: f32::NAN, ..greedy() }, vec![1], Vec::new()),
    ]
}

fn streams(own: NodeId, round: u64) -> Vec<DataHello> {
    let incarnation = Incarnation { epoch: round, owner: *own.as_bytes() };
    let ask = |query| DataHello::Weights(WeightsRequest { model: "../../etc/passwd".to_owned(), files: None, query });
    vec![
        DataHello::Link(LinkHello { instance: InstanceId(7), incarnation, to: LinkEnd::Head }),
        ask(WeightsQuery::Outline),
        ask(WeightsQuery::Pieces(vec![u32::MAX; 1000])),
        DataHello::Probe,
    ]
}

/// The hostile process. It reads its victim's join token and the id of its victim's instance from standard input.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started as a process by `a_hostile_member_harms_no_other`"]
async fn hostile_member_process() {
    let mut token = String::new();
    std::io::stdin().read_line(&mut token).expect("a line");
    let (token, instance) = token.trim().split_once(' ').expect("two words");
    let token: JoinToken = token.parse().expect("a token");
    let instance = InstanceId(instance.parse().expect("a number"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (config, _) = config(token.secret, token.addresses, folder.path());
    let own = config.id;
    let (started, parts) = oneshot::channel();
    let (_node, _) = Node::spawn(None, Node, NodeArgs { config, started }).await.expect("it starts");
    let NodeActors { router, .. } = parts.await.expect("it starts");
    let begun = Instant::now();
    while router.peers().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "no peer connects");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for round in 0..100 {
        for WeightsPeer { id: victim, data, .. } in router.peers() {
            out_of_turn(own, round).into_iter().for_each(|message| router.tell(victim, message));
            for hello in streams(own, round).into_iter().chain(requests(instance)) {
                if let Ok(mut stream) = data.open(Priority::Normal).await {
                    // The victim may refuse the stream.
                    let _ = stream.writer.send(&hello, Payload::Nothing).await;
                }
            }
        }
        tokio::task::yield_now().await;
    }
    println!("sent everything");
    // The victim must receive the messages before the connections close.
    tokio::time::sleep(Duration::from_secs(2)).await;
}

fn resident_bytes() -> u64 {
    crate::worker::machine::measure_machine().process_bytes.expect("it is measured")
}

/// A folder with a tiny model, its tokenizer included.
fn tiny_model(folder: &std::path::Path) -> ModelSpec {
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../engines/tests/fixtures/llama");
    let model = folder.join("tiny");
    std::fs::create_dir(&model).expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(file), model.join(file)).expect("copied");
    }
    let vocabulary: serde_json::Map<_, _> = (0..96).map(|id| (format!("w{id}"), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).expect("written");
    ModelSpec::new(model.to_string_lossy())
}

/// The tokens that an honest request generates.
async fn ask(node: &crate::NodeHandle, model: &ModelSpec) -> Vec<u32> {
    let request = GenerateRequest {
        model: model.clone(),
        prompt: Prompt::Tokens((3..40).collect()),
        params: SamplingParams::greedy(),
        max_tokens: Some(60),
        stop: Vec::new(),
    };
    let mut answer = node.generate(request).expect("the request is accepted");
    let mut tokens = Vec::new();
    while let Some(event) = answer.next().await {
        if let Generated::Token { sampled, .. } = event.expect("the answer goes on") {
            tokens.push(sampled.token);
        }
    }
    tokens
}

/// R7.1–R7.5, R8.1–R8.5: a hostile member sends as fast as it can: messages out of order, about other instances and
/// with absurd numbers, and requests with tokens and parameters that no model accepts. The other node still answers in
/// time and with the same tokens, and its memory grows by less than 64 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_member_harms_no_other() {
    let secret = ClusterSecret::random().expect("random bytes");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (config, address) = config(secret.clone(), Vec::new(), folder.path());
    let node = super::start(config).await.expect("it starts");
    let model = tiny_model(folder.path());
    let running = node.load(model.clone()).await.expect("it loads");
    let expected = ask(&node, &model).await;
    assert_eq!(expected.len(), 60);
    let before = resident_bytes();
    let token = JoinToken { secret, addresses: address.into_iter().collect() }.to_string();
    let mut command = tokio::process::Command::new(std::env::current_exe().expect("this program"));
    command.args(["node::tests::hostile_member_process", "--exact", "--ignored", "--nocapture"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut hostile = command.spawn().expect("it starts");
    let mut told = hostile.stdin.take().expect("it is piped");
    told.write_all(format!("{token} {}\n", running.id).as_bytes()).await.expect("it reads its input");
    let hostile = hostile.wait_with_output();
    tokio::pin!(hostile);
    let output = loop {
        tokio::select! {
            output = &mut hostile => break output.expect("it runs"),
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                let asked = Instant::now();
                node.status().await.expect("the node answers");
                assert!(asked.elapsed() < Duration::from_secs(2), "the status came too late");
                assert_eq!(ask(&node, &model).await, expected);
            }
        }
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("sent everything"), "{said} {}", String::from_utf8_lossy(&output.stderr));
    let state = node.status().await.expect("the node answers");
    let loaded: Vec<&InstanceId> = state.instances.keys().collect();
    assert_eq!(loaded, [&running.id], "only the honest instance runs");
    assert!(state.instances[&running.id].totals.requests > 10, "the honest requests were counted");
    assert_eq!(ask(&node, &model).await, expected);
    let unknown = node.load(ModelSpec::new("no-such-model")).await;
    assert!(matches!(unknown, Err(RequestError::Model(_))), "the node still answers its own requests");
    let grown = resident_bytes().saturating_sub(before);
    println!("memory grew by {grown} bytes");
    assert!(grown < 64 << 20, "memory grew by {grown} bytes");
    node.shutdown().await;
}

#[test]
fn shards_with_impossible_values_are_implausible() {
    let stamp = Stamp { counter: 1, by: Identity::ephemeral().expect("random bytes").node_id() };
    assert!(task(stamp).is_plausible());
    assert!(absurd_tasks(stamp).iter().all(|task| !task.is_plausible()));
}

/// Other nodes can reach the control actor alone: no other actor's messages can be serialised.
#[test]
fn only_the_control_actor_is_remotable() {
    fn is_remotable<A: Actor>() -> bool
    where
        A::Msg: ractor::Message,
    {
        <A::Msg as ractor::Message>::serializable()
    }
    assert!(is_remotable::<crate::transport::control::Control>());
    let others = [
        is_remotable::<Cluster>(),
        is_remotable::<Node>(),
        is_remotable::<crate::gateway::Gateway>(),
        is_remotable::<crate::planner::Planner>(),
        is_remotable::<crate::head::Head>(),
        is_remotable::<crate::worker::Worker>(),
        is_remotable::<crate::models::Models>(),
        is_remotable::<crate::worker::device::Device>(),
        is_remotable::<crate::worker::Shard>(),
        is_remotable::<crate::monitor::Monitor>(),
        is_remotable::<crate::planner::TokenizerActor>(),
    ];
    assert!(others.iter().all(|is_remotable| !is_remotable), "{others:?}");
}
