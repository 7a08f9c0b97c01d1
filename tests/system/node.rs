//! A running node process, and a plain HTTP client for it.

use crate::{exo, stderr};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A running node, stopped on drop.
pub(crate) struct Node {
    child: Child,
    pub(crate) port: u16,
    pub(crate) folder: tempfile::TempDir,
    setup: Setup,
    /// The lines that the node has written to stderr, its start included.
    told: Arc<Mutex<Vec<String>>>,
}

/// How a node is started.
#[derive(Debug, Clone, Default)]
pub(crate) struct Setup {
    pub(crate) arguments: Vec<String>,
    /// `$DATA` in a value stands for the node's own folder.
    pub(crate) variables: Vec<(String, String)>,
    /// The network namespace of the node. From outside it, only the node's Unix socket can be reached.
    pub(crate) namespace: Option<String>,
    /// The limit on the process's descriptors.
    pub(crate) descriptors: Option<u32>,
}

impl Setup {
    pub(crate) fn of(arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Self { arguments, ..Self::default() }
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct HttpAnswer {
    pub(crate) status: u16,
    pub(crate) headers: String,
    pub(crate) body: String,
}

impl HttpAnswer {
    pub(crate) fn read(mut from: impl Read) -> Self {
        let mut text = Vec::new();
        from.read_to_end(&mut text).expect("an answer");
        let text = String::from_utf8(text).expect("UTF-8");
        let (headers, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        let status = headers.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let body = if headers.contains("chunked") { unchunk(body) } else { body.to_owned() };
        Self { status, headers: headers.to_lowercase(), body }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("not JSON ({error}): {}", self.body))
    }
}

impl Node {
    pub(crate) fn up(arguments: &[&str]) -> Self {
        Self::up_with(arguments, &[])
    }

    pub(crate) fn up_with(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self::start(Setup { variables, ..Setup::of(arguments) }, folder)
    }

    pub(crate) fn start(setup: Setup, folder: tempfile::TempDir) -> Self {
        let told = Arc::default();
        let (child, port) = spawn(&setup, folder.path(), &told);
        Self { child, port, folder, setup, told }
    }

    /// Restarts a node that has died, in its folder.
    pub(crate) fn again(&mut self) {
        // Reaps the dead process, which no other code does.
        let _ = self.child.wait();
        (self.child, self.port) = spawn(&self.setup, self.folder.path(), &self.told);
    }

    /// The lines that the node has written to stderr.
    pub(crate) fn told(&self) -> Vec<String> {
        self.told.lock().expect("no thread panics with the lock").clone()
    }

    pub(crate) fn has_told(&self, part: &str) -> bool {
        self.told().iter().any(|line| line.contains(part))
    }

    /// The node's status, over its Unix socket.
    pub(crate) fn state(&self) -> Value {
        self.json(&["status", "--json"])
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Opens a connection, and sends a request on it.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the node listens");
        stream.set_read_timeout(Some(Duration::from_secs(120))).expect("a socket");
        let host = if headers.iter().any(|(name, _)| *name == "host") { "" } else { "host: localhost\r\n" };
        let mut head =
            format!("{method} {path} HTTP/1.1\r\n{host}connection: close\r\ncontent-length: {}\r\n", body.len());
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).expect("the node reads");
        stream
    }

    pub(crate) fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> HttpAnswer {
        HttpAnswer::read(self.send(method, path, headers, body))
    }

    pub(crate) fn get(&self, path: &str) -> HttpAnswer {
        self.request("GET", path, &[], "")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> HttpAnswer {
        self.request("POST", path, &[], &body.to_string())
    }

    /// The sum of a metric over all its labels, over the Unix socket, which can be reached in any namespace.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let mut socket = UnixStream::connect(self.folder().join("api.sock")).expect("the node listens");
        socket
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            .expect("the node reads");
        let text = HttpAnswer::read(socket).body;
        let lines = text.lines().filter(|line| line.starts_with(&format!("exo_{name}")));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Runs a command on the node's folder.
    pub(crate) fn command(&self, arguments: &[&str]) -> std::process::Output {
        self.prepare(arguments).output().expect("exo-node starts")
    }

    /// A command on the node's folder, not started yet.
    pub(crate) fn prepare(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = exo(arguments);
        command.env("EXO_DATA_DIR", self.folder());
        command
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(sent.is_ok_and(|status| status.success()), "{name} could not be sent");
    }

    /// The addresses on which the node's process listens for TCP over IPv4, as the kernel lists them.
    pub(crate) fn listening(&self) -> Vec<SocketAddr> {
        let process = Path::new("/proc").join(self.child.id().to_string());
        let open = std::fs::read_dir(process.join("fd")).expect("Linux").filter_map(|entry| {
            let target = std::fs::read_link(entry.ok()?.path()).ok()?;
            Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        });
        let open: BTreeSet<String> = open.collect();
        let listening = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (address, port) = fields.get(1)?.split_once(':')?;
            // The state 0A is "listening". The address is in the machine's byte order.
            let is_its = fields.get(3) == Some(&"0A") && open.contains(*fields.get(9)?);
            let ip = Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?.to_le_bytes());
            is_its.then_some(SocketAddr::from((ip, u16::from_str_radix(port, 16).ok()?)))
        };
        std::fs::read_to_string(process.join("net/tcp")).expect("Linux").lines().filter_map(listening).collect()
    }

    /// The JSON object that a command on the node's folder prints.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).expect("one object")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        // Even on a busy machine a node ends within 60 s; one that does not is killed.
        let asked = std::process::Command::new("kill").args(["-TERM", &pid]).status();
        let ended = asked.is_ok_and(|status| status.success()) && {
            (0..600).any(|_| {
                std::thread::sleep(Duration::from_millis(100));
                matches!(self.child.try_wait(), Ok(Some(_)))
            })
        };
        if !ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
            if !std::thread::panicking() {
                panic!("the node did not end after SIGTERM");
            }
        }
    }
}

fn spawn(setup: &Setup, folder: &Path, told: &Arc<Mutex<Vec<String>>>) -> (Child, u16) {
    let wrapper = match (&setup.namespace, setup.descriptors) {
        (Some(namespace), _) => vec!["ip".to_owned(), "netns".to_owned(), "exec".to_owned(), namespace.clone()],
        (None, Some(limit)) => vec!["prlimit".to_owned(), format!("--nofile={limit}:{limit}")],
        (None, None) => Vec::new(),
    };
    let mut command = exo(&["up", "--data-dir"]);
    if let Some((program, arguments)) = wrapper.split_first() {
        command = Command::new(program);
        command.args(arguments).args([env!("CARGO_BIN_EXE_exo-node"), "up", "--data-dir"]).stdin(Stdio::null());
    }
    // Relative paths of a request would be found here.
    command.arg(folder).args(&setup.arguments).current_dir(folder);
    let is_given = |name: &str| setup.arguments.iter().any(|argument| argument == name);
    if !is_given("--listen") {
        command.args(["--listen", "none"]);
    }
    if !is_given("--api") {
        command.args(["--api", "127.0.0.1:0"]);
    }
    for (name, value) in &setup.variables {
        command.env(name, value.replace("$DATA", &folder.to_string_lossy()));
    }
    let mut child = command.env("EXO_LOG", "warn").stderr(Stdio::piped()).spawn().expect("exo-node starts");
    let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
    let address = lines.find_map(|line| {
        let line = line.expect("UTF-8");
        told.lock().expect("no thread panics with the lock").push(line.clone());
        Some(line.strip_prefix("API on http://")?.strip_suffix("/v1")?.to_owned())
    });
    let address = address.expect("the node prints its API address");
    // Later lines go to the test's output.
    let told = Arc::clone(told);
    std::thread::spawn(move || {
        lines.map_while(Result::ok).for_each(|line| {
            eprintln!("node: {line}");
            told.lock().expect("no thread panics with the lock").push(line);
        });
    });
    (child, address.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port"))
}

fn unchunk(body: &str) -> String {
    let (mut rest, mut out) = (body, String::new());
    while let Some((size, behind)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        out.push_str(&behind[..size]);
        rest = behind[size..].trim_start_matches("\r\n");
    }
    out
}
