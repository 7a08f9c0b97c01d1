//! Members on separate hosts: they find each other by multicast, and answers survive cut cables.

use crate::cluster::{Cluster, alone_for, alone_with, answer, asking_of, question};
use crate::joining::{long_question, wait_for_prefill};
use crate::lan::Lan;
use crate::node::{Node, Setup};
use crate::{GEMMA3, SMOLLM2};
use std::time::{Duration, Instant};

/// The limit for an answer that must not wait for hang timeouts: those take minutes.
const NOT_HUNG: Duration = Duration::from_secs(120);
const SPLIT: &str = "a:0-9,b:10-19,c:20-29";

/// Members a, b and c, each on its own host. They share the secret, and know no addresses.
pub(crate) fn members(lan: &Lan) -> Cluster {
    members_with(lan, 3, &[])
}

/// The first `count` members, started with the additional arguments `more`.
pub(crate) fn members_with(lan: &Lan, count: usize, more: &[&str]) -> Cluster {
    crate::models();
    let folders: Vec<_> = (0..count).map(|_| tempfile::tempdir().expect("a temporary folder")).collect();
    // Before the node runs, its token has no addresses.
    let token = crate::exo(&["token", "--data-dir"]).arg(folders[0].path()).output().expect("exo-node starts");
    let token = String::from_utf8(token.stdout).expect("UTF-8").trim().to_owned();
    let nodes = folders.into_iter().enumerate().map(|(host, folder)| {
        let listen = format!("{}:52416", Lan::address(host));
        let name = ["a", "b", "c"][host];
        let arguments = ["--listen", &listen, "--name", name, "--threads", "1", "--join", &token];
        let arguments = arguments.iter().chain(more).map(|&argument| argument.to_owned()).collect();
        Node::start(Setup { arguments, namespace: Some(lan.host(host)), ..Setup::default() }, folder)
    });
    let cluster = Cluster { nodes: nodes.collect() };
    for node in &cluster.nodes {
        cluster.wait_for(node, count - 1);
    }
    cluster
}

/// R7.1–R7.5: hosts that share the secret find each other by multicast, and give the answers of one process.
#[test]
fn hosts_find_each_other() {
    let Some(lan) = Lan::of(3) else { return };
    let cluster = members(&lan);
    for (model, split) in [(SMOLLM2, SPLIT), (GEMMA3, "c:0-5,b:6-11,a:12-17")] {
        assert_eq!(answer(cluster.asking_model(1, model, split)), alone_with(model), "{model}");
    }
}

/// R7.1–R7.5: a host is cut off while it computes for others, or while it asks others: both sides answer without a
/// loss. When the cable is plugged in again, the cluster is whole again.
#[test]
fn a_partition_heals() {
    let Some(lan) = Lan::of(3) else { return };
    let (expected, cluster) = (alone_with(SMOLLM2), members(&lan));
    for (case, (asked, cut)) in [(0, 2), (1, 0), (2, 2)].into_iter().enumerate() {
        // Each case has its own cache size, and so its own instance, with exactly this split.
        let mut question = question(SMOLLM2, "Tell me a long story about a ship.", "120");
        question.extend(["--context".to_owned(), (1024 + 32 * case).to_string()]);
        assert_eq!(answer(cluster.asking_for(asked, &question, SPLIT)), expected);
        let asking = cluster.asking_for(asked, &question, SPLIT);
        std::thread::sleep(Duration::from_millis(500));
        lan.plug(cut, "down");
        assert_eq!(answer(asking), expected, "{cut} was cut off while {asked} was asked");
        // The host that is cut off answers alone, too.
        let by_itself = answer(cluster.asking_for(cut, &question, SPLIT));
        assert_eq!(by_itself, expected, "{cut} was asked while it was alone");
        lan.plug(cut, "up");
        for node in &cluster.nodes {
            cluster.wait_for(node, 2);
        }
        for node in 0..3 {
            let by_all = answer(cluster.asking_for(node, &question, SPLIT));
            assert_eq!(by_all, expected, "{node} was asked when the cluster was whole again");
        }
    }
}

/// R7.1–R7.5, R8.1–R8.5: the owner or another host is cut off while a prompt is computed: the answer is the same.
#[test]
fn a_prompt_survives_a_cut_cable() {
    let Some(lan) = Lan::of(3) else { return };
    let cluster = members(&lan);
    let expected = alone_for(&long_question(2048));
    for (cut, context_tokens) in [(2, 2080), (0, 2112)] {
        let asking = cluster.asking_for(1, &long_question(context_tokens), SPLIT);
        wait_for_prefill(&cluster.nodes[0]);
        lan.plug(cut, "down");
        assert_eq!(answer(asking), expected, "{cut} was cut off");
        lan.plug(cut, "up");
        for node in &cluster.nodes {
            cluster.wait_for(node, 2);
        }
    }
}

/// R7.1–R7.5, R8.1–R8.5: the link between two hosts breaks for a moment, while the head, on a third host, stays
/// connected to both: the rows that were on the link are computed again.
#[test]
fn an_answer_survives_a_broken_link_between_two_other_nodes() {
    let Some(lan) = Lan::of(3) else { return };
    let cluster = members(&lan);
    let (expected, question) = (alone_with(SMOLLM2), question(SMOLLM2, "Tell me a long story about a ship.", "120"));
    let split = "c:0-9,a:10-19,b:20-29";
    assert_eq!(answer(cluster.asking_for(2, &question, split)), expected);
    let asking = cluster.asking_for(2, &question, split);
    std::thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    lan.block(0, 1, "add");
    // Long enough for the two to lose their connection, and too short for a change of the clique.
    std::thread::sleep(Duration::from_secs(4));
    lan.block(0, 1, "delete");
    assert_eq!(answer(asking), expected);
    assert!(begun.elapsed() < NOT_HUNG, "the head waited for lost rows");
}

/// R7.1–R7.5: two of three hosts do not reach each other, and both reach the third: the third forms a clique with one
/// of them, the other works alone, `status` says why, and all answer. When the two connect, the clique has all three
/// again.
#[test]
fn a_disconnected_pair_works_in_two_cliques() {
    let Some(lan) = Lan::of(3) else { return };
    let (expected, cluster) = (alone_with(SMOLLM2), members(&lan));
    let mut question = question(SMOLLM2, "Tell me a long story about a ship.", "120");
    // A model that runs over all three must also run in both cliques, with as many shards.
    question.extend(["--shards", "3"].map(str::to_owned));
    let ask = |node: &Node| {
        let begun = Instant::now();
        assert_eq!(answer(asking_of(node, &question)), expected);
        assert!(begun.elapsed() < NOT_HUNG, "a shard was lost to the other clique");
    };
    cluster.nodes.iter().for_each(ask);
    let counts = |field: &str| {
        let count = |node: &Node| node.state()[field].as_object().map_or(0, serde_json::Map::len);
        cluster.nodes.iter().map(count).collect::<Vec<_>>()
    };
    let wait_for = |members: &[usize], outside: &[usize]| {
        let begun = Instant::now();
        loop {
            let (mut now_members, now_outside) = (counts("members"), counts("apart"));
            let of_third = (now_members.pop(), now_outside[2]);
            now_members.sort_unstable();
            if (&now_members[..], of_third) == (&members[..2], (Some(members[2]), outside[2])) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{now_members:?} {of_third:?}, outside {now_outside:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    lan.block(0, 1, "add");
    wait_for(&[0, 1, 1], &[0, 1, 1]);
    let said = String::from_utf8(cluster.nodes[2].command(&["status"]).stdout).expect("UTF-8");
    assert!(said.contains("outside") && said.contains("do not reach each other"), "{said}");
    for _ in 0..3 {
        cluster.nodes.iter().for_each(ask);
    }
    lan.block(0, 1, "delete");
    wait_for(&[2, 2, 2], &[0, 0, 0]);
    cluster.nodes.iter().for_each(ask);
    for node in 0..3 {
        assert_eq!(answer(cluster.asking(node, SPLIT)), expected, "{node} was asked when the clique was whole again");
    }
}
