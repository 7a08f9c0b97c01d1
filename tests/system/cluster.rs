//! Tests of one cluster of several processes on one machine. Traffic stays on loopback.

use crate::node::Node;
use crate::{GEMMA3, SMOLLM2, ids, json, models};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const QUESTION: &str = "Tell me a long story about a ship.";
const TOKENS: &str = "120";

/// A cluster whose members have one-letter names: a, b, c.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
}

impl Cluster {
    pub(crate) fn up() -> Self {
        Self::up_with(&[])
    }

    /// Starts three members, with `variables` in the environment of b and c.
    pub(crate) fn up_with(variables: &[(&str, &str)]) -> Self {
        Self::up_as(&[], variables)
    }

    /// Starts two members, neither of which has memory for a whole model.
    fn small() -> Self {
        let mut cluster = Self { nodes: vec![member("a", &["--memory", "0.13"], &[])] };
        cluster.join("b", &["--memory", "0.13"], &[]);
        for node in &cluster.nodes {
            cluster.wait_for(node, 1);
        }
        cluster
    }

    pub(crate) fn up_as(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut cluster = Self { nodes: vec![member("a", arguments, &[])] };
        for name in ["b", "c"] {
            cluster.join(name, arguments, variables);
        }
        for node in &cluster.nodes {
            cluster.wait_for(node, 2);
        }
        cluster
    }

    /// Starts one more member.
    pub(crate) fn join(&mut self, name: &str, arguments: &[&str], variables: &[(&str, &str)]) {
        let token = token_of(&self.nodes[0]);
        self.nodes.push(member(name, &[arguments, &["--join", &token]].concat(), variables));
    }

    pub(crate) fn wait_for(&self, node: &Node, members: usize) {
        let begun = Instant::now();
        while node.state()["members"].as_object().map(serde_json::Map::len) != Some(members) {
            assert!(begun.elapsed() < Duration::from_secs(30), "the node has not connected to {members} other members");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Asks node `index`, with SmolLM2 split by `split`.
    pub(crate) fn asking(&self, index: usize, split: &str) -> Child {
        self.asking_model(index, SMOLLM2, split)
    }

    pub(crate) fn asking_model(&self, index: usize, model: &str, split: &str) -> Child {
        self.asking_for(index, &question(model, QUESTION, TOKENS), split)
    }

    /// Asks node `index` with the arguments `question`.
    pub(crate) fn asking_for(&self, index: usize, question: &[String], split: &str) -> Child {
        asking_of(&self.nodes[index], &[question, &["--split", split].map(str::to_owned)].concat())
    }

    pub(crate) fn ask(&self, index: usize, split: &str) -> Transcript {
        answer(self.asking(index, split))
    }
}

/// An answer, compared token by token and character by character.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Transcript {
    pub(crate) tokens: Vec<u64>,
    text: String,
}

impl Transcript {
    fn of(answer: &Value) -> Self {
        let text = answer["text"].as_str().expect("a text").to_owned();
        Self { tokens: ids(&answer["token_ids"]), text }
    }
}

/// Asks a node with the arguments `question`, which may name a split.
pub(crate) fn asking_of(node: &Node, question: &[String]) -> Child {
    let mut command: Command = node.prepare(&[]);
    command.args(question).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("exo-node starts")
}

pub(crate) fn answer(asking: Child) -> Transcript {
    outcome(asking).unwrap_or_else(|refusal| panic!("{refusal}"))
}

/// The answer, or the stderr of the command that failed.
pub(crate) fn outcome(asking: Child) -> Result<Transcript, String> {
    let output = asking.wait_with_output().expect("it ends");
    match output.status.success() {
        true => Ok(Transcript::of(&serde_json::from_slice(&output.stdout).expect("one object"))),
        false => Err(crate::stderr(&output)),
    }
}

/// Starts a node on loopback; `$DATA` in a variable's value stands for the node's folder.
pub(crate) fn member(name: &str, more: &[&str], variables: &[(&str, &str)]) -> Node {
    models();
    let arguments = ["--listen", "127.0.0.1:0", "--no-discovery", "--threads", "1", "--name", name];
    Node::up_with(&[&arguments, more].concat(), variables)
}

/// The join token: the last word that `exo-node token` prints.
pub(crate) fn token_of(node: &Node) -> String {
    let token = String::from_utf8(node.command(&["token"]).stdout).expect("UTF-8");
    token.split_whitespace().last().expect("a token").to_owned()
}

/// The answer of a single process.
fn alone() -> Transcript {
    alone_with(SMOLLM2)
}

pub(crate) fn alone_with(model: &str) -> Transcript {
    alone_for(&question(model, QUESTION, TOKENS))
}

pub(crate) fn alone_for(question: &[String]) -> Transcript {
    models();
    let question: Vec<&str> = question.iter().map(String::as_str).chain(["--standalone"]).collect();
    Transcript::of(&json(&question))
}

/// The arguments of a greedy request, which has only one right answer.
pub(crate) fn question(model: &str, prompt: &str, tokens: &str) -> Vec<String> {
    ["run", model, prompt, "--json", "--temperature", "0", "--max-tokens", tokens].map(str::to_owned).to_vec()
}

/// R7.1–R7.5: three processes give the tokens of one, for every split and whichever node is asked.
#[test]
fn three_processes_answer_as_one() {
    let (expected, cluster) = (alone(), Cluster::up());
    for (asked, split) in
        [(0, "a:0-9,b:10-19,c:20-29"), (1, "c:0,a:1-28,b:29"), (2, "a:0-29"), (2, "b:0-4,a:5-24,b:25-29")]
    {
        assert_eq!(cluster.ask(asked, split), expected, "{split}");
    }
}

/// R7.1–R7.5: a model split in two or three, at any layers and over any nodes, gives the tokens of one process. Only
/// some splits in three are tried; `EXO_SPLITS=all` tries all.
#[test]
fn every_cut_gives_the_same_tokens() {
    let cluster = Cluster::up_as(&["--unload-after", "1s"], &[]);
    let is_tried = |first: usize, second: usize| {
        std::env::var("EXO_SPLITS").is_ok_and(|splits| splits == "all") || (first * 7 + second * 3).is_multiple_of(61)
    };
    for (model, layers) in [(SMOLLM2, 30), (GEMMA3, 18)] {
        let mut question = question(model, QUESTION, "16");
        // Small caches, so that many instances fit into memory together.
        question.extend(["--context", "256"].map(str::to_owned));
        let expected = alone_for(&question);
        let name = |at: usize| ["a", "b", "c"][at % 3];
        let in_two =
            (1..layers).map(|cut| format!("{}:0-{},{}:{cut}-{}", name(cut), cut - 1, name(cut + 1), layers - 1));
        let pairs = (1..layers).flat_map(|first| (first + 1..layers).map(move |second| (first, second)));
        let in_three = pairs.filter(|&(first, second)| is_tried(first, second)).map(|(first, second)| {
            let [a, b, c] = [0, 1, 2].map(|at| name(first + second * (1 + at % 2) + at));
            format!("{a}:0-{},{b}:{first}-{},{c}:{second}-{}", first - 1, second - 1, layers - 1)
        });
        for (number, split) in in_two.chain(in_three).enumerate() {
            let answered = answer(cluster.asking_for(number % 3, &question, &split));
            assert_eq!(answered, expected, "{model} as {split}");
        }
    }
}

/// R7.1–R7.5, R8.1–R8.5: a node that is not asked is killed, or is stopped and continues, while an answer streams, be
/// it the owner or another node: no token is lost or doubled, and the text is the same.
#[test]
fn an_answer_outlives_the_death_of_any_other_node() {
    let expected = alone();
    for (asked, victim, signal, wait_ms) in
        [(1, 2, "KILL", 300), (1, 0, "KILL", 900), (0, 1, "STOP", 600), (2, 0, "STOP", 400), (2, 0, "KILL", 0)]
    {
        let cluster = Cluster::up();
        let split = "a:0-9,b:10-19,c:20-29";
        assert_eq!(cluster.ask(asked, split), expected);
        let asking = cluster.asking(asked, split);
        std::thread::sleep(Duration::from_millis(wait_ms));
        cluster.nodes[victim].signal(signal);
        assert_eq!(answer(asking), expected, "{victim} was sent {signal} while {asked} was asked");
        if signal == "STOP" {
            cluster.nodes[victim].signal("CONT");
            cluster.wait_for(&cluster.nodes[asked], 2);
            assert_eq!(cluster.ask(victim, split), expected, "node {victim} was asked after it continued");
        }
    }
}

/// R7.1–R7.5, R8.1–R8.5: a model too large for one node is split over two by default; if one of them dies and the other
/// is too small, the request fails with the number of missing bytes, and does not hang.
#[test]
fn a_model_that_no_longer_fits_fails_with_the_missing_bytes() {
    let cluster = Cluster::small();
    let question = ["run", SMOLLM2, QUESTION, "--temperature", "0", "--max-tokens", "1000", "--context", "1024"];
    let mut command: Command = cluster.nodes[0].prepare(&question);
    let mut asking = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("exo-node starts");
    let mut text = asking.stdout.take().expect("it is piped");
    let (began, beginning) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        // The send fails if the test has ended.
        let _ = began.send(text.read_exact(&mut [0]));
        let _ = std::io::copy(&mut text, &mut std::io::sink());
    });
    beginning.recv_timeout(Duration::from_secs(60)).expect("in time").expect("an answer begins");
    cluster.nodes[1].signal("KILL");
    let killed = Instant::now();
    while asking.try_wait().expect("it is a child").is_none() {
        if killed.elapsed() > Duration::from_secs(30) {
            asking.kill().expect("it runs");
            panic!("the request hangs");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = asking.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("bytes are missing"), "{said}");
}

/// A drained node moves its shards to other nodes, and running answers lose nothing.
#[test]
fn a_drained_node_is_empty_and_answers_continue() {
    let (expected, cluster) = (alone(), Cluster::up());
    let split = "a:0-9,b:10-19,c:20-29";
    assert_eq!(cluster.ask(1, split), expected);
    let asking = cluster.asking(1, split);
    let drained = cluster.nodes[0].command(&["drain"]);
    assert!(drained.status.success(), "{}", crate::stderr(&drained));
    let is_empty = || {
        let state = cluster.nodes[0].get("/state").json();
        let own = state["node"].as_str().expect("an id").to_owned();
        let members = state["members"].as_object().expect("members").clone();
        let owned = members.values().flat_map(|member| member["owned"].as_object().expect("owned").values());
        let placed: Vec<&Value> =
            owned.flat_map(|owned| owned["state"]["placement"]["stages"].as_array().into_iter().flatten()).collect();
        !placed.is_empty() && placed.iter().all(|stage| stage["node"] != own.as_str())
    };
    // Members report to each other every second.
    let begun = Instant::now();
    while !is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the drained node still has shards");
        std::thread::sleep(Duration::from_millis(200));
    }
    // A drained node can be stopped.
    cluster.nodes[0].signal("KILL");
    assert_eq!(answer(asking), expected);
}

/// If no other node can take the shards of a drained node, `drain` lists them.
#[test]
fn a_drain_that_cannot_end_lists_its_layers() {
    let cluster = Cluster::small();
    let asked = ["run", SMOLLM2, QUESTION, "--max-tokens", "4", "--context", "1024", "--json"];
    let first = cluster.nodes[0].command(&asked);
    assert!(first.status.success(), "{}", crate::stderr(&first));
    let mut draining: Command = cluster.nodes[1].prepare(&["drain"]);
    let mut draining = draining.stderr(Stdio::piped()).spawn().expect("exo-node starts");
    let mut said = BufReader::new(draining.stderr.take().expect("it is piped")).lines();
    let line = said.next().expect("it says something").expect("UTF-8");
    draining.kill().expect("it waits");
    draining.wait().expect("it is a child");
    assert!(line.contains("still here") && line.contains("GB"), "{line}");
    let still = cluster.nodes[0].command(&asked);
    assert!(still.status.success(), "layers that fit nowhere else must still serve: {}", crate::stderr(&still));
}

/// Nodes with other secrets do not connect, and a damaged token is refused.
#[test]
fn a_node_with_another_secret_does_not_connect() {
    models();
    let [ours, theirs] =
        ["ours", "theirs"].map(|name| Node::up(&["--listen", "127.0.0.1:0", "--no-discovery", "--name", name]));
    let address = ours.get("/state").json()["addresses"][0].as_str().expect("an address").to_owned();
    let stranger = Node::up(&["--listen", "127.0.0.1:0", "--no-discovery", "--peer", &address]);
    std::thread::sleep(Duration::from_secs(3));
    for node in [&ours, &theirs, &stranger] {
        assert_eq!(node.get("/state").json()["members"].as_object().map(serde_json::Map::len), Some(0));
    }
    let refused = theirs.command(&["up", "--listen", "127.0.0.1:0", "--join", "exo1nonsense"]);
    assert!(crate::stderr(&refused).contains("damaged"), "{}", crate::stderr(&refused));
}
