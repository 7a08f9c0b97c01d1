//! Node processes of one thread each, and token streams from them.

use anyhow::{Context, ensure};
use exo_actors::core::plan::Policy;
use exo_actors::core::spec::Speculation;
use exo_actors::{GenerateRequest, ModelSpec, Prompt, SamplingParams};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A running node, killed on drop.
pub(crate) struct Process {
    child: Child,
    address: String,
    folder: tempfile::TempDir,
    /// What it has printed on stderr.
    printed: Arc<Mutex<Vec<String>>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // A process that has ended already needs no kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn up(exo_node: &Path, name: &str, token: Option<&str>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(exo_node);
        command.args(["up", "--listen", "127.0.0.1:0", "--api", "127.0.0.1:0", "--no-discovery", "--threads", "1"]);
        command.args(["--name", name, "--data-dir"]).arg(folder.path());
        if let Some(token) = token {
            command.args(["--join", token]);
        }
        let mut child = command.env("EXO_LOG", "off").stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stderr.take().context("stderr is not piped")?).lines();
        let address =
            lines.find_map(|line| Some(line.ok()?.strip_prefix("API on http://")?.strip_suffix("/v1")?.to_owned()));
        let printed = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&printed);
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| kept.lock().unwrap_or_else(PoisonError::into_inner).push(line));
        });
        Ok(Self { child, address: address.context("the node printed no API address")?, folder, printed })
    }

    /// Sends a signal to the process: `KILL`, `STOP` or `CONT`.
    pub(crate) fn signal(&self, name: &str) -> anyhow::Result<()> {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status()?;
        ensure!(sent.success(), "kill -{name} failed");
        Ok(())
    }

    /// The number of lines on stderr with this text.
    pub(crate) fn lines_with(&self, text: &str) -> usize {
        self.printed.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|line| line.contains(text)).count()
    }

    pub(crate) fn state(&self, exo_node: &Path) -> anyhow::Result<serde_json::Value> {
        let output =
            Command::new(exo_node).args(["status", "--json", "--data-dir"]).arg(self.folder.path()).output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn members(&self, exo_node: &Path) -> anyhow::Result<usize> {
        Ok(self.state(exo_node)?["members"].as_object().map_or(0, serde_json::Map::len))
    }

    pub(crate) fn resident_bytes(&self, exo_node: &Path) -> anyhow::Result<u64> {
        self.state(exo_node)?["machine"]["process_bytes"].as_u64().context("the node reports no memory")
    }
}

/// Starts one cluster of `count` processes, at most three (a, b, c), and waits until all are connected.
pub(crate) fn cluster(exo_node: &Path, count: usize) -> anyhow::Result<Vec<Process>> {
    let mut processes = vec![Process::up(exo_node, "a", None)?];
    let token = Command::new(exo_node).args(["token", "--data-dir"]).arg(processes[0].folder.path()).output()?;
    let token = String::from_utf8(token.stdout)?.trim().to_owned();
    for name in ["b", "c"].into_iter().take(count - 1) {
        processes.push(Process::up(exo_node, name, Some(&token))?);
    }
    let begun = Instant::now();
    for process in &processes {
        while process.members(exo_node)? + 1 < count {
            ensure!(begun.elapsed() < Duration::from_secs(30), "the processes did not connect within 30 s");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(processes)
}

/// A model without drafts: steps of one token each are measured.
pub(crate) fn whole(model: &str) -> ModelSpec {
    ModelSpec { speculation: Speculation::None, ..ModelSpec::new(model) }
}

/// The model in `count` shards, as even as possible.
pub(crate) fn shards(model: &str, count: usize) -> ModelSpec {
    ModelSpec { shards: Some(count), policy: Policy::Throughput, ..whole(model) }
}

/// Streams an answer, and returns the time at which each token came.
pub(crate) fn stream(process: &Process, model: &ModelSpec, tokens: u32) -> anyhow::Result<Vec<Instant>> {
    let mut times = Vec::new();
    stream_to(process, model, "Once upon a time there was a ship", tokens, |time| times.push(time))?;
    Ok(times)
}

/// Streams an answer to `prompt`, and reports the time of each token when it comes.
pub(crate) fn stream_to(
    process: &Process,
    model: &ModelSpec,
    prompt: &str,
    tokens: u32,
    mut on_token: impl FnMut(Instant),
) -> anyhow::Result<()> {
    let request = GenerateRequest {
        model: model.clone(),
        prompt: Prompt::Text(prompt.to_owned()),
        params: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(tokens),
        stop: Vec::new(),
    };
    let body = serde_json::to_string(&request)?;
    let mut stream = TcpStream::connect(&process.address)?;
    write!(
        stream,
        "POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut came = 0_u32;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        ensure!(!line.starts_with("{\"error"), "{line}");
        if line.starts_with("{\"event\":{\"token\"") {
            on_token(Instant::now());
            came += 1;
        }
    }
    ensure!(came > 0, "no tokens came");
    Ok(())
}

/// The tokens per second of concurrent streams, from the time when all have begun until the first ends.
pub(crate) fn throughput(process: &Process, model: &ModelSpec, tokens: u32, streams: usize) -> anyhow::Result<f64> {
    let times = std::thread::scope(|scope| {
        let running: Vec<_> = (0..streams).map(|_| scope.spawn(|| stream(process, model, tokens))).collect();
        running
            .into_iter()
            .map(|run| run.join().map_err(|_| anyhow::anyhow!("a stream failed"))?)
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    let begun = times.iter().filter_map(|times| times.first()).max().context("no stream began")?;
    let ended = times.iter().filter_map(|times| times.last()).min().context("no stream ended")?;
    let between = times.iter().flatten().filter(|&time| time > begun && time <= ended).count();
    Ok(between as f64 / ended.duration_since(*begun).as_secs_f64())
}
