//! Members on hosts of their own: they find each other by multicast, and outlive cut cables.

use crate::cluster::{Cluster, alone_for, alone_with, answer, asking_of, question};
use crate::joining::{long_question, wait_for_prefill};
use crate::lan::Lan;
use crate::node::{Node, Setup};
use crate::{GEMMA3, SMOLLM2};
use std::time::{Duration, Instant};

/// A head waits for a shard that was taken away until its patience ends: minutes.
const NOT_HUNG: Duration = Duration::from_secs(120);
const SPLIT: &str = "a:0-9,b:10-19,c:20-29";

/// Members a, b and c, each on a host, who know nothing of each other but the secret.
pub(crate) fn members(lan: &Lan) -> Cluster {
    members_with(lan, 3, &[])
}

/// The first so many of them, started with `more`.
pub(crate) fn members_with(lan: &Lan, count: usize, more: &[&str]) -> Cluster {
    crate::models();
    let folders: Vec<_> = (0..count).map(|_| tempfile::tempdir().expect("a temporary folder")).collect();
    // Where no node runs yet, a token has no addresses.
    let token = crate::exo(&["token", "--data-dir"]).arg(folders[0].path()).output().expect("exo-node starts");
    let token = String::from_utf8(token.stdout).expect("UTF-8").trim().to_owned();
    let nodes = folders.into_iter().enumerate().map(|(host, folder)| {
        let listen = format!("{}:52416", Lan::address(host));
        let name = ["a", "b", "c"][host];
        let arguments = ["--listen", &listen, "--name", name, "--threads", "1", "--join", &token];
        let arguments = arguments.iter().chain(more).map(|&argument| argument.to_owned()).collect();
        Node::start(Setup { arguments, variables: Vec::new(), namespace: Some(lan.host(host)) }, folder)
    });
    let cluster = Cluster { nodes: nodes.collect() };
    for node in &cluster.nodes {
        cluster.wait_for(node, count - 1);
    }
    cluster
}

/// R7.1: hosts that have the secret find each other by multicast, and answer as one process does.
#[test]
fn hosts_find_each_other() {
    let Some(lan) = Lan::of(3) else { return };
    let cluster = members(&lan);
    for (model, split) in [(SMOLLM2, SPLIT), (GEMMA3, "c:0-5,b:6-11,a:12-17")] {
        assert_eq!(answer(cluster.asking_model(1, model, split)), alone_with(model), "{model}");
    }
}

/// R7.2: a host is cut off while it computes for others, or while it asks others: answers go on, on both sides, and lose
/// nothing; when the cable is back, all are one again.
#[test]
fn a_partition_heals() {
    let Some(lan) = Lan::of(3) else { return };
    let (expected, cluster) = (alone_with(SMOLLM2), members(&lan));
    for (case, (asked, cut)) in [(0, 2), (1, 0), (2, 2)].into_iter().enumerate() {
        // Another cache each time, so that it is an instance which is split as it says.
        let mut question = question(SMOLLM2, "Tell me a long story about a ship.", "120");
        question.extend(["--context".to_owned(), (1024 + 32 * case).to_string()]);
        assert_eq!(answer(cluster.asking_for(asked, &question, SPLIT)), expected);
        let asking = cluster.asking_for(asked, &question, SPLIT);
        std::thread::sleep(Duration::from_millis(500));
        lan.plug(cut, "down");
        assert_eq!(answer(asking), expected, "{cut} was cut off while {asked} was asked");
        // Alone, the host that was cut off answers too.
        let by_itself = answer(cluster.asking_for(cut, &question, SPLIT));
        assert_eq!(by_itself, expected, "{cut} was asked while it was alone");
        lan.plug(cut, "up");
        for node in &cluster.nodes {
            cluster.wait_for(node, 2);
        }
        for node in 0..3 {
            let by_all = answer(cluster.asking_for(node, &question, SPLIT));
            assert_eq!(by_all, expected, "{node} was asked when all were one again");
        }
    }
}

/// R7.2, R8.4: a host is cut off while a prompt is computed, the head's or another one: the answer is the same.
#[test]
fn a_prompt_outlives_a_cut() {
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

/// R7.2, R8.4: the way between two hosts breaks for a moment, and the head, on a third one, sees both all the time: the rows
/// that were on it are computed again.
#[test]
fn an_answer_outlives_a_way_that_its_head_does_not_go() {
    let Some(lan) = Lan::of(3) else { return };
    let cluster = members(&lan);
    let (expected, question) = (alone_with(SMOLLM2), question(SMOLLM2, "Tell me a long story about a ship.", "120"));
    let split = "c:0-9,a:10-19,b:20-29";
    assert_eq!(answer(cluster.asking_for(2, &question, split)), expected);
    let asking = cluster.asking_for(2, &question, split);
    std::thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    lan.part(0, 1, "add");
    // Long enough for the two to lose each other, and not for being apart.
    std::thread::sleep(Duration::from_secs(4));
    lan.part(0, 1, "delete");
    assert_eq!(answer(asking), expected);
    assert!(begun.elapsed() < NOT_HUNG, "nobody waits for what is lost");
}

/// R7.2: of three hosts two do not reach each other, and both reach the third: that one plans with one of them, the other
/// works by itself, each says why, and all answer. When the two meet, all are one again.
#[test]
fn hosts_that_do_not_all_reach_each_other_plan_apart() {
    let Some(lan) = Lan::of(3) else { return };
    let (expected, cluster) = (alone_with(SMOLLM2), members(&lan));
    let mut question = question(SMOLLM2, "Tell me a long story about a ship.", "120");
    // What runs over all three is to run in both parts, as what it was.
    question.extend(["--shards", "3"].map(str::to_owned));
    let ask = |node: &Node| {
        let begun = Instant::now();
        assert_eq!(answer(asking_of(node, &question)), expected);
        assert!(begun.elapsed() < NOT_HUNG, "no shard of this part was taken away by the other");
    };
    cluster.nodes.iter().for_each(ask);
    let counts = |field: &str| {
        let count = |node: &Node| node.state()[field].as_object().map_or(0, serde_json::Map::len);
        cluster.nodes.iter().map(count).collect::<Vec<_>>()
    };
    let wait_for = |members: &[usize], apart: &[usize]| {
        let begun = Instant::now();
        loop {
            let (mut now_members, now_apart) = (counts("members"), counts("apart"));
            let of_third = (now_members.pop(), now_apart[2]);
            now_members.sort_unstable();
            if (&now_members[..], of_third) == (&members[..2], (Some(members[2]), apart[2])) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{now_members:?} {of_third:?}, apart {now_apart:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    lan.part(0, 1, "add");
    wait_for(&[0, 1, 1], &[0, 1, 1]);
    let said = String::from_utf8(cluster.nodes[2].command(&["status"]).stdout).expect("UTF-8");
    assert!(said.contains("outside") && said.contains("do not reach each other"), "{said}");
    for _ in 0..3 {
        cluster.nodes.iter().for_each(ask);
    }
    lan.part(0, 1, "delete");
    wait_for(&[2, 2, 2], &[0, 0, 0]);
    cluster.nodes.iter().for_each(ask);
    for node in 0..3 {
        assert_eq!(answer(cluster.asking(node, SPLIT)), expected, "{node} was asked when all were one again");
    }
}
