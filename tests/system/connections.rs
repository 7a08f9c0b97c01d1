//! Connections to the API that are many, idle or slow.

use crate::node::{HttpAnswer, Node, Setup};
use crate::{SMOLLM2, models, stderr};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Descriptors of the node's process: fewer than the connections below.
const DESCRIPTORS: u32 = 256;
const CONNECTIONS: usize = 300;
/// A node closes a connection that is silent for half as long.
const SILENCE_MAX: Duration = Duration::from_secs(60);

fn connect(node: &Node) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", node.port)).expect("the system accepts");
    stream.set_read_timeout(Some(SILENCE_MAX)).expect("a socket");
    stream
}

fn node_with_few_descriptors() -> Node {
    let setup = Setup { descriptors: Some(DESCRIPTORS), ..Setup::of(&[]) };
    Node::start(setup, tempfile::tempdir().expect("a temporary folder"))
}

/// R8.1–R8.5: no number of connections that send nothing keeps the owner out, or fails a model. Clients beyond the
/// bound are told so, and have places again when others have gone.
#[test]
fn idle_connections_keep_nobody_out() {
    models();
    let node = node_with_few_descriptors();
    let idle: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connect(&node)).collect();
    let refused = HttpAnswer::read(connect(&node));
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (503, Some("too_many_connections")));
    let asked = Instant::now();
    assert!(node.state()["name"].is_string(), "the owner's socket answers");
    let answer = node.command(&["run", SMOLLM2, "hello", "--max-tokens", "2"]);
    assert!(answer.status.success(), "a model loads and answers: {}", stderr(&answer));
    assert!(asked.elapsed() < SILENCE_MAX, "the connections are still there");
    drop(idle);
    let is_served = || node.request("GET", "/health", &[], "").status == 200;
    assert!((0..50).any(|_| is_served() || {
        std::thread::sleep(Duration::from_millis(100));
        false
    }));
}

/// R8.1–R8.5: a client that sends nothing, or its headers too slowly, is closed.
#[test]
fn slow_headers_are_cut_off() {
    let node = node_with_few_descriptors();
    let mut silent = connect(&node);
    let mut slow = connect(&node);
    slow.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n").expect("the node reads");
    let mut drip = slow.try_clone().expect("a second handle");
    let dripping = std::thread::spawn(move || {
        // A header never ends. Writing fails when the node has closed the connection.
        while drip.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    for stream in [&mut silent, &mut slow] {
        let mut rest = Vec::new();
        // A timeout of the read would be an error of another kind.
        let ended = stream.read_to_end(&mut rest);
        assert!(!ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "it is not closed");
    }
    drop((silent, slow));
    dripping.join().expect("the thread ends");
}
