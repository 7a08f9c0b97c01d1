//! The members of a cluster, the links between them, and previews of placements.

use crate::SMOLLM2;
use crate::cluster::{Cluster, question};
use crate::node::Node;
use serde_json::Value;
use std::time::{Duration, Instant};

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn members(node: &Node) -> serde_json::Map<String, Value> {
    node.get("/state").json()["members"].as_object().expect("members").clone()
}

/// R7.1–R7.5: links are measured automatically, and shown. A model that fits one machine is not split, and the preview
/// says why, and what each policy would do.
#[test]
fn links_are_measured_and_placements_explained() {
    let cluster = Cluster::up();
    let asked = &cluster.nodes[0];
    let is_measured = |link: &Value| link["rtt_s"].as_f64() > Some(0.0) && link["bytes_per_s"].as_f64() > Some(1e6);
    until("some links are not measured", || {
        members(asked).values().all(|member| {
            let links = member["links"].as_object().expect("links");
            links.len() == 2 && links.values().all(is_measured)
        })
    });
    let status = String::from_utf8(asked.command(&["status"]).stdout).expect("UTF-8");
    assert!(status.contains("away over") && status.contains("MB/s"), "{status}");
    let previews = asked.json(&["plan", SMOLLM2, "--json"]);
    let previews = previews.as_array().expect("a list");
    assert_eq!(previews.len(), 3);
    for preview in previews.iter().filter(|preview| preview["policy"] != "throughput") {
        let placed = &preview["outcome"]["placed"];
        assert_eq!(placed["placement"]["stages"].as_array().map(Vec::len), Some(1), "{preview}");
        assert!(placed["reason"].as_str().is_some_and(|reason| reason.contains("fits one device")), "{preview}");
    }
    let by_hand = asked.json(&["plan", SMOLLM2, "--json", "--split", "a:0-9,c:10-29"]);
    assert_eq!(by_hand[0]["outcome"]["placed"]["reason"], "split by hand");
    let refused = asked.json(&["plan", SMOLLM2, "--json", "--split", "a:0-9,nobody:10-29"]);
    assert!(
        refused[0]["outcome"]["refused"]["error"].as_str().is_some_and(|error| error.contains("nobody")),
        "{refused}"
    );
    assert!(members(asked).values().all(|member| member["owned"].as_object().is_some_and(serde_json::Map::is_empty)));
}

/// All members disconnect from an evicted member for good. After a renewal, the old secret connects to no member.
#[test]
fn an_evicted_member_stays_disconnected() {
    let mut cluster = Cluster::up();
    let evicted = cluster.nodes[0].command(&["evict", "c"]);
    assert!(evicted.status.success(), "{}", crate::stderr(&evicted));
    until("the evicted member is still connected", || {
        let [a, b, c] = [0, 1, 2].map(|index| members(&cluster.nodes[index]).len());
        (a, b, c) == (1, 1, 0)
    });
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!([0, 1, 2].map(|index| members(&cluster.nodes[index]).len()), [1, 1, 0]);
    until("c does not know why nobody answers", || {
        let status = cluster.nodes[2].command(&["status"]).stdout;
        String::from_utf8_lossy(&status).contains("does not admit this node, which was evicted on a")
    });
    // An eviction can be undone, on any member, and made again.
    let listed = String::from_utf8(cluster.nodes[1].command(&["evict", "--list"]).stdout).expect("UTF-8");
    let id = cluster.nodes[2].state()["node"].as_str().expect("an id").to_owned();
    assert!(listed.lines().any(|line| line.starts_with(&id) && line.ends_with("c  evicted on a")), "{listed}");
    let undone = cluster.nodes[1].command(&["evict", "--undo", &id[..8]]);
    assert!(undone.status.success(), "{}", crate::stderr(&undone));
    until("the member is not back", || [0, 1, 2].iter().all(|&index| members(&cluster.nodes[index]).len() == 2));
    assert!(cluster.nodes[0].command(&["evict", "c"]).status.success());
    until("the evicted member is still connected", || members(&cluster.nodes[2]).is_empty());
    let not_there = cluster.nodes[0].command(&["evict", "nobody"]);
    assert!(crate::stderr(&not_there).contains("no member is called"), "{}", crate::stderr(&not_there));
    let old = cluster.nodes[1].command(&["token"]).stdout;
    let new = cluster.nodes[1].command(&["token", "--renew"]).stdout;
    assert_ne!(old, new);
    // From its next start on, b is a cluster of its own, until the others join that cluster.
    cluster.nodes[1].signal("TERM");
    cluster.nodes[1].again();
    until("b is still connected", || members(&cluster.nodes[0]).is_empty());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!([0, 1].map(|index| members(&cluster.nodes[index]).len()), [0, 0]);
    cluster.nodes.truncate(2);
}

/// R8.1–R8.5: a member's report is of one moment: an instance that it reports as ready is in the phase `Ready`, and a
/// finished answer is counted. (A report that was sent before it was renewed showed the earlier phase.)
#[test]
fn reports_of_members_are_current() {
    let cluster = Cluster::up();
    let mut asking = cluster.asking_for(0, &question(SMOLLM2, "Why is the sky blue?", "30"), "b:0-29");
    let begun = Instant::now();
    let (mut seen_ready, mut counted) = (false, false);
    while !counted {
        let state = cluster.nodes[0].state();
        let members = state["members"].as_object().expect("members").values();
        for owned in members.flat_map(|member| member["owned"].as_object().expect("heads").values()) {
            if owned["is_ready"] == true {
                assert_eq!(owned["state"]["phase"], "Ready", "{owned}");
                seen_ready = true;
                counted = owned["state"]["totals"]["requests"] == 1;
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "the answer is not counted: {state}");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(seen_ready && asking.wait().expect("it ends").success());
}
