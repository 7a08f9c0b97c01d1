//! What a user reads when members do not find each other: other clusters, silence, copied folders, new addresses.

use crate::cluster::{alone_for, answer, asking_of, question, token_of};
use crate::lan::Lan;
use crate::node::{Node, Setup};
use crate::{SMOLLM2, exo, models, stderr};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MEMBER: [&str; 5] = ["--listen", "127.0.0.1:0", "--no-discovery", "--threads", "1"];

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn members(node: &Node) -> usize {
    node.state()["members"].as_object().map_or(0, serde_json::Map::len)
}

fn address(node: &Node) -> String {
    node.state()["addresses"][0].as_str().expect("an address").to_owned()
}

fn status(node: &Node) -> String {
    String::from_utf8(node.command(&["status"]).stdout).expect("UTF-8")
}

/// R8.1–R8.5: who meets nobody is told why, once, with the address; the status has it as long as it holds. The gone
/// member is shown with the reason.
#[test]
fn who_meets_nobody_is_told_why() {
    let stranger = Node::up(&MEMBER);
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let silent = silent.local_addr().expect("an address").to_string();
    let node = Node::up(&[&MEMBER[..], &["--peer", &address(&stranger), "--peer", &silent]].concat());
    let other = format!("{} is a member of another cluster", address(&stranger));
    let nobody = format!("{silent} does not answer");
    until("the causes are not told", || node.has_told(&other) && node.has_told(&nobody));
    let shown = status(&node);
    assert!(shown.contains(&other) && shown.contains(&nobody), "{shown}");
    assert_eq!(node.told().iter().filter(|line| line.contains(&nobody)).count(), 1, "{:?}", node.told());
    let token = token_of(&node);
    let member = Node::up(&[&MEMBER[..], &["--name", "guest", "--join", &token]].concat());
    until("the member has not joined", || node.has_told("guest joined"));
    drop(member);
    until("the member's end is not told", || node.has_told("guest has gone: it was stopped"));
    assert!(status(&node).contains("gone     guest"), "{}", status(&node));
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
        }
    }
}

/// R8.1–R8.5: of two nodes on copies of one data folder, the first goes on without a break. All who can know are told
/// both addresses, and what to delete.
#[test]
fn a_copied_data_folder_is_told_and_disturbs_nobody() {
    let member = Node::up(&[&MEMBER[..], &["--name", "a"]].concat());
    let token = token_of(&member);
    let original = Node::up(&[&MEMBER[..], &["--name", "b", "--join", &token]].concat());
    until("the original has not joined", || members(&member) == 1 && members(&original) == 1);
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy(original.folder(), folder.path());
    let clone = Node::start(Setup::of(&[&MEMBER[..], &["--name", "b2"]].concat()), folder);
    let same = "have the same key";
    until("the member is not told", || member.has_told(same) && member.has_told("delete node.key"));
    until("the original is not told", || original.has_told(same));
    until("the clone is not told", || clone.has_told("another node with this node's key"));
    let said = member.told().into_iter().find(|line| line.contains(same)).expect("a line");
    assert!(said.contains(&address(&original)) && said.contains(&address(&clone)), "{said}");
    std::thread::sleep(Duration::from_secs(5));
    assert!(!member.has_told("b has gone"), "the original was disturbed: {:?}", member.told());
    assert_eq!((members(&member), members(&original)), (1, 1));
}

/// R8.1–R8.5: a node that was killed and starts again at once is no copy of itself.
#[test]
fn a_killed_node_is_back_soon() {
    let member = Node::up(&[&MEMBER[..], &["--name", "a"]].concat());
    let token = token_of(&member);
    let mut other = Node::up(&[&MEMBER[..], &["--name", "b", "--join", &token]].concat());
    until("it has not joined", || members(&member) == 1);
    other.signal("KILL");
    other.again();
    until("it is not back", || members(&other) == 1 && members(&member) == 1);
    assert!(!member.has_told("same key"), "{:?}", member.told());
}

/// Starts node a, b or c on a host, where it listens on all addresses.
fn node_on(lan: &Lan, host: usize, more: &[&str]) -> Node {
    let name = ["a", "b", "c"][host];
    let arguments = [&["--listen", "[::]:52416", "--threads", "1", "--name", name], more].concat();
    let setup = Setup { namespace: Some(lan.host(host)), ..Setup::of(&arguments) };
    Node::start(setup, tempfile::tempdir().expect("a temporary folder"))
}

/// R8.1–R8.5: hosts that have IPv6 alone find each other by multicast, and by `--peer`, and compute together.
#[test]
fn hosts_with_ipv6_alone_are_one_cluster() {
    models();
    let Some(lan) = Lan::of_ipv6(3) else { return };
    let first = node_on(&lan, 0, &[]);
    let listens = address(&first);
    assert_eq!(listens, format!("[{}]:52416", Lan::address_v6(0)));
    let token = token_of(&first);
    // Without addresses, a token leaves discovery the only way.
    let found = node_on(&lan, 1, &["--join", &token]);
    let named = node_on(&lan, 2, &["--join", &token, "--no-discovery", "--peer", &listens]);
    until("they do not meet", || [&first, &found, &named].iter().all(|node| members(node) == 2));
    let answer = found.command(&["run", SMOLLM2, "Hello", "--max-tokens", "4", "--split", "a:0-9,b:10-19,c:20-29"]);
    assert!(answer.status.success(), "{}", stderr(&answer));
}

/// R8.1–R8.5: hosts that have link-local addresses alone find each other by multicast, and compute together.
#[test]
fn hosts_with_link_local_addresses_are_one_cluster() {
    models();
    let Some(lan) = Lan::of_link_local(2) else { return };
    let first = node_on(&lan, 0, &[]);
    let other = node_on(&lan, 1, &["--join", &token_of(&first)]);
    until("they do not meet", || members(&first) == 1 && members(&other) == 1);
    let answer = other.command(&["run", SMOLLM2, "Hello", "--max-tokens", "4", "--split", "a:0-14,b:15-29"]);
    assert!(answer.status.success(), "{}", stderr(&answer));
}

/// R8.1–R8.5: a machine that gets another address announces it, has it in new tokens, and is a member again. An answer
/// that it computes for another one meanwhile is complete.
#[test]
fn a_new_address_is_announced() {
    models();
    let Some(lan) = Lan::of(2) else { return };
    let first = node_on(&lan, 0, &[]);
    let other = node_on(&lan, 1, &["--join", &token_of(&first)]);
    until("they do not meet", || members(&first) == 1 && members(&other) == 1);
    let question = question(SMOLLM2, "Tell me a long story about a ship.", "120");
    let split = ["--split", "b:0-9,a:10-29"].map(str::to_owned);
    let asking = asking_of(&other, &[&question[..], &split].concat());
    std::thread::sleep(Duration::from_millis(1500));
    lan.readdress(0, "10.77.0.99");
    until("the new address is not announced", || address(&first) == "10.77.0.99:52416");
    assert!(first.has_told("this machine has other addresses now: 10.77.0.99:52416"));
    until("they do not meet again", || members(&first) == 1 && members(&other) == 1);
    let shown = |node: &Node| {
        let members = node.state()["members"].clone();
        let member = members.as_object().and_then(|members| members.values().next().cloned());
        member.is_some_and(|member| member["addresses"][0] == "10.77.0.99:52416")
    };
    until("the member does not know the new address", || shown(&other));
    assert_eq!(answer(asking), alone_for(&question));
}

/// R8.1–R8.5: secrets come from stdin and files, and no message repeats one.
#[test]
fn secrets_are_never_repeated() {
    let member = Node::up(&MEMBER);
    let token = token_of(&member);
    let damaged = &token[..token.len() - 3];
    let folder = tempfile::tempdir().expect("a temporary folder");
    let up = |more: &[&str], stdin: &str| {
        let mut command = exo(&[&["up", "--api", "none"], &MEMBER[..], more].concat());
        command.env("EXO_DATA_DIR", folder.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("exo-node starts");
        // The node may have ended before it reads.
        let _ = child.stdin.take().expect("it is piped").write_all(stdin.as_bytes());
        child
    };
    for (arguments, stdin) in [(["--join", damaged], ""), (["--join", "-"], damaged)] {
        let output = up(&arguments, stdin).wait_with_output().expect("it ends");
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains("damaged"), "{said}");
        assert!(!said.contains(&damaged[5..]), "the secret is repeated: {said}");
    }
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{token}\n")).expect("written");
    for arguments in [["--join", "-"], ["--join-file", file.to_str().expect("UTF-8")]] {
        let mut joined = up(&arguments, &format!("{token}\n"));
        until("it has not joined", || members(&member) == 1);
        let ended = Command::new("kill").args(["-TERM", &joined.id().to_string()]).status();
        assert!(ended.is_ok_and(|status| status.success()));
        joined.wait().expect("it ends");
        until("it has not left", || members(&member) == 0);
    }
}

/// R8.1–R8.5: a node whose API has no port ends before it joins; the error names the option and who has the port.
#[test]
fn a_taken_port_ends_the_start_before_it_joins() {
    let member = Node::up(&MEMBER);
    let api = format!("127.0.0.1:{}", member.port);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let token = token_of(&member);
    let second = [&["up", "--api", &api, "--name", "second", "--join", &token], &MEMBER[..]].concat();
    let output = exo(&second).env("EXO_DATA_DIR", folder.path()).output().expect("exo-node starts");
    let said = stderr(&output);
    assert!(!output.status.success() && said.contains(&api) && said.contains("--api ADDR:PORT"), "{said}");
    assert!(said.contains("exo-node") && said.contains("has the port"), "{said}");
    assert!(!member.has_told("second joined"), "{:?}", member.told());
    // The same folder still serves a node.
    drop(Node::start(Setup::of(&MEMBER), folder));
}

/// R8.1–R8.5: a refused prompt computes nothing, and counts as nothing. Counters stay when the model has gone. A
/// request that names only the model is answered by the instance that was split by hand.
#[test]
fn counters_and_instances_are_those_of_the_cluster() {
    models();
    let first = Node::up(&[&MEMBER[..], &["--name", "a"]].concat());
    let second = Node::up(&[&MEMBER[..], &["--name", "b", "--join", &token_of(&first)]].concat());
    until("they do not meet", || members(&first) == 1 && members(&second) == 1);
    let split = ["--split", "b:0-9,a:10-29"];
    let answer = first.command(&[&["run", SMOLLM2, "Hello", "--max-tokens", "4"], &split[..]].concat());
    assert!(answer.status.success(), "{}", stderr(&answer));
    let body = serde_json::json!({"model": SMOLLM2, "prompt": "Hello", "max_tokens": 4});
    assert_eq!(first.post("/v1/completions", &body).status, 200);
    for node in [&first, &second] {
        let state = node.state();
        let instances = state["instances"].as_object().expect("instances by id");
        assert_eq!(instances.len(), 1, "{state}");
        let instance = instances.values().next().expect("one");
        assert_eq!((&instance["head"], &instance["model"]["name"]), (&"b".into(), &SMOLLM2.into()));
        assert_eq!(instance["placement"]["stages"][1]["name"], "a");
    }
    let counted = |node: &Node| node.state()["totals"][SMOLLM2]["prompt_tokens"].as_u64();
    let before = counted(&second).expect("two prompts");
    let long = serde_json::json!({"model": SMOLLM2, "prompt": "word ".repeat(20_000), "max_tokens": 4});
    assert_eq!(second.post("/v1/completions", &long).status, 400);
    assert_eq!(counted(&second), Some(before));
    assert!(second.get("/metrics").body.contains("exo_prompt_tokens_total{model=\"smollm2\"}"));
}
