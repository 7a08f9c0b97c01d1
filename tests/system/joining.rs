//! Members that join, die and return while requests run, and failures while a prompt is computed.

use crate::SMOLLM2;
use crate::cluster::{Cluster, Transcript, alone_for, answer, question};
use crate::node::Node;
use std::time::{Duration, Instant};

/// A prompt of about 1,200 tokens: seconds of prefill.
fn long_prompt() -> String {
    let sentence = "The ship sailed on over the grey sea, and nobody on board knew what the next day would bring. ";
    format!("{}What happened then?", sentence.repeat(60))
}

/// A question with a long prompt. Each cache size makes an instance of its own.
pub(crate) fn long_question(context_tokens: usize) -> Vec<String> {
    let mut question = question(SMOLLM2, &long_prompt(), "24");
    question.extend(["--context".to_owned(), context_tokens.to_string()]);
    question
}

/// Waits until `node`, the owner, runs a request that has no token yet.
pub(crate) fn wait_for_prefill(node: &Node) {
    let generated = node.metric("generated_tokens_total");
    let begun = Instant::now();
    while node.metric("requests_running") < 1.0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no request runs");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(node.metric("generated_tokens_total"), generated, "the prompt was already computed");
}

/// R7.1–R7.5, R8.1–R8.5: the owner or another node is killed or stopped while a prompt is computed: the answer is the
/// same.
#[test]
fn a_prompt_survives_the_death_of_any_other_node() {
    let question = long_question(2048);
    let expected: Transcript = alone_for(&question);
    for (asked, victim, signal) in [(1, 2, "KILL"), (0, 1, "STOP"), (1, 0, "KILL")] {
        let cluster = Cluster::up();
        let asking = cluster.asking_for(asked, &question, "a:0-9,b:10-19,c:20-29");
        wait_for_prefill(&cluster.nodes[0]);
        cluster.nodes[victim].signal(signal);
        assert_eq!(answer(asking), expected, "{victim} was sent {signal} while {asked} was asked");
        if signal == "STOP" {
            cluster.nodes[victim].signal("CONT");
        }
    }
}

/// R7.1–R7.5: a member that joins while an answer streams does not change the answer, and can serve at once, both its
/// own requests and others'.
#[test]
fn a_member_joins_while_requests_run() {
    let question = question(SMOLLM2, "Tell me a long story about a ship.", "120");
    let expected = alone_for(&question);
    let mut cluster = Cluster::up_as(&[], &[]);
    drop(cluster.nodes.pop());
    cluster.wait_for(&cluster.nodes[0], 1);
    let asking = cluster.asking_for(0, &question, "a:0-14,b:15-29");
    cluster.join("d", &[], &[]);
    for node in &cluster.nodes {
        cluster.wait_for(node, 2);
    }
    let meanwhile = cluster.asking_for(2, &question, "d:0-9,a:10-19,b:20-29");
    assert_eq!(answer(asking), expected);
    assert_eq!(answer(meanwhile), expected);
}

/// R7.1–R7.5: when a dead node returns, its layers move back to it, as the split requests; answers that run meanwhile
/// lose nothing.
#[test]
fn a_split_is_restored_when_its_node_returns() {
    let question = question(SMOLLM2, "Tell me a long story about a ship.", "120");
    let expected = alone_for(&question);
    let mut cluster = Cluster::up();
    let split = "a:0-9,b:10-19,c:20-29";
    assert_eq!(answer(cluster.asking_for(0, &question, split)), expected);
    cluster.nodes[2].signal("KILL");
    assert_eq!(answer(cluster.asking_for(0, &question, split)), expected);
    let nodes_of = |cluster: &Cluster| -> Vec<String> {
        let state = cluster.nodes[0].state();
        let instances = state["instances"].as_object().expect("instances");
        let live = instances.values().find(|instance| instance["phase"] == "Ready");
        let stages = live.and_then(|instance| instance["placement"]["stages"].as_array());
        let node = |stage: &serde_json::Value| stage["node"].as_str().expect("an id").to_owned();
        stages.into_iter().flatten().map(node).collect()
    };
    let distinct = |cluster: &Cluster| nodes_of(cluster).into_iter().collect::<std::collections::BTreeSet<_>>().len();
    assert_eq!(distinct(&cluster), 2);
    cluster.nodes[2].again();
    let begun = Instant::now();
    while distinct(&cluster) < 3 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the returned node gets no layers");
        assert_eq!(answer(cluster.asking_for(1, &question, split)), expected);
    }
    assert_eq!(answer(cluster.asking_for(1, &question, split)), expected);
}

/// R4.3: with 16-bit activations on the wire, an answer begins with the same tokens as with 32-bit ones.
#[test]
fn activations_travel_in_16_bits() {
    let question = question(SMOLLM2, "Why is the sky blue?", "16");
    let expected = alone_for(&question);
    for wire_type in ["f16", "bf16"] {
        let cluster = Cluster::up_as(&["--wire-dtype", wire_type], &[]);
        let said = answer(cluster.asking_for(1, &question, "a:0-9,b:10-19,c:20-29"));
        assert_eq!(said.tokens.len(), expected.tokens.len(), "{wire_type}");
        assert_eq!(said.tokens[..3], expected.tokens[..3], "{wire_type}");
    }
}

/// R8.1–R8.5: `status` draws members, the links between them, devices, and the placement of layers. Only the QUIC port
/// is open to the network: all TCP listeners of the process are on loopback.
#[test]
fn status_draws_the_whole_cluster() {
    let cluster = Cluster::up();
    let split = "a:0-9,b:10-19,c:20-29";
    assert!(!cluster.ask(1, split).tokens.is_empty());
    let begun = Instant::now();
    loop {
        let drawn = String::from_utf8(cluster.nodes[1].command(&["status"]).stdout).expect("UTF-8");
        let names = ["a", "c"].iter().all(|name| drawn.contains(&format!("member   {name} ")));
        let stages = ["layers 0–9 on cpu of a", "layers 10–19 on cpu of b", "layers 20–29 on cpu of c"];
        let links = ["to a ", "to c "].iter().all(|link| drawn.contains(link));
        if names && links && stages.iter().all(|stage| drawn.contains(stage)) && drawn.matches("away over").count() >= 2
        {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{drawn}");
        std::thread::sleep(Duration::from_millis(200));
    }
    for node in &cluster.nodes {
        let listening = node.listening();
        assert!(listening.len() >= 2, "the API or ractor_cluster does not listen: {listening:?}");
        assert!(listening.iter().all(|address| address.ip().is_loopback()), "{listening:?}");
    }
}
