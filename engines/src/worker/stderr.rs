//! A worker's standard error: its events go to this process's log, and its last lines explain its end.

use super::log::{EVENT_BYTES_MAX, Event};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::process::ChildStderr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;
use tracing::Span;

/// The last lines that are kept.
const LINES_KEPT: usize = 8;
/// The longest line, in bytes; a longer one counts as several.
const LINE_BYTES_MAX: u64 = EVENT_BYTES_MAX as u64 + 16;
/// The most characters of a kept line.
const SHOWN_MAX: usize = 300;
/// How long the end of a dead worker's output is waited for.
const END_WITHIN: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Stderr {
    lines: Arc<Mutex<VecDeque<String>>>,
    /// Disconnected when everything has been read.
    end: Receiver<()>,
}

impl Stderr {
    /// Starts a thread that reads `stderr` to its end, and logs in the span of its caller.
    pub(super) fn read(stderr: ChildStderr, pid: i32) -> io::Result<Self> {
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let (ended, end) = sync_channel(0);
        let (kept, span) = (Arc::clone(&lines), Span::current());
        std::thread::Builder::new().name("engine-stderr".to_owned()).spawn(move || {
            let _ended = ended;
            let _entered = span.entered();
            let mut stderr = BufReader::new(stderr);
            let mut line = Vec::new();
            loop {
                line.clear();
                match (&mut stderr).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                    Ok(1..) => handle(&line, pid, &kept),
                    Ok(0) | Err(_) => return,
                }
            }
        })?;
        Ok(Self { lines, end })
    }

    /// Returns the last lines of a worker that has ended.
    pub(super) fn last_lines(&self) -> Vec<String> {
        // An error means that the thread has ended, or that another process holds the pipe.
        let _ = self.end.recv_timeout(END_WITHIN);
        self.lines.lock().iter().cloned().collect()
    }
}

fn handle(line: &[u8], pid: i32, kept: &Mutex<VecDeque<String>>) {
    if let Some(event) = Event::read(line) {
        return event.log(pid);
    }
    if Event::is_marked(line) {
        return;
    }
    let line = String::from_utf8_lossy(line);
    let shown: String = line.trim_end().chars().filter(|c| !c.is_control()).take(SHOWN_MAX).collect();
    if shown.is_empty() {
        return;
    }
    tracing::debug!(worker = pid, "{shown}");
    let mut kept = kept.lock();
    if kept.len() == LINES_KEPT {
        kept.pop_front();
    }
    kept.push_back(shown);
}
