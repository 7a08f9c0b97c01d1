//! The processes of workers: started from one thread, killed from any, waited for by their engine's thread.

use super::stderr::Stderr;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How often a process is looked at that is given time to end.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// The command that runs a worker: a program that calls [`serve`](super::serve()).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables that are set beside those of this process.
    pub environment: Vec<(OsString, OsString)>,
}

/// A started worker. Its number stays its own until [`Process::wait`] has returned, so it can be killed at any time.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Running(Child),
    Gone(io::Result<ExitStatus>),
}

/// A process to start.
struct Order {
    command: Command,
    reply: SyncSender<io::Result<Child>>,
}

/// The workers of this program that have not been reaped.
static LIVE: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// The thread that starts all workers, once it is started. Linux ends a child when the thread that started it ends, so
/// this one never does.
static STARTER: Mutex<Option<SyncSender<Order>>> = Mutex::new(None);

/// Returns the numbers of the processes that serve engines of this program.
pub fn live_processes() -> Vec<u32> {
    LIVE.lock().iter().copied().collect()
}

fn starter() -> io::Result<SyncSender<Order>> {
    let mut starter = STARTER.lock();
    if let Some(orders) = &*starter {
        return Ok(orders.clone());
    }
    // Each caller waits for its own reply.
    let (orders, receiver) = sync_channel::<Order>(0);
    std::thread::Builder::new().name("engine-starter".to_owned()).spawn(move || {
        while let Ok(Order { mut command, reply }) = receiver.recv() {
            // The caller waits for the reply.
            let _ = reply.send(command.spawn());
        }
    })?;
    Ok(starter.insert(orders).clone())
}

impl WorkerCommand {
    /// Starts a worker with `socket` as its standard input and `memory` as its standard output.
    pub(super) fn start(&self, socket: OwnedFd, memory: Option<OwnedFd>) -> io::Result<(Process, Stderr)> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::from(socket)).stderr(Stdio::piped());
        command.stdout(memory.map_or_else(Stdio::null, Stdio::from));
        // Ctrl-C is for the node, which then stops its workers.
        command.process_group(0);
        let (reply, started) = sync_channel(1);
        let ended = || io::Error::other("the thread that starts processes has ended");
        starter()?.send(Order { command, reply }).map_err(|_| ended())?;
        let mut child = started.recv().map_err(|_| ended())??;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(ended)?;
        let stderr = child.stderr.take();
        let process = Process { pid, state: Mutex::new(State::Running(child)) };
        LIVE.lock().insert(process.id());
        let stderr = stderr.ok_or_else(ended).and_then(|stderr| Stderr::read(stderr, pid.as_raw_nonzero().get()));
        match stderr {
            Ok(stderr) => Ok((process, stderr)),
            Err(error) => {
                process.kill();
                process.wait();
                Err(error)
            }
        }
    }
}

impl Process {
    pub(super) fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Kills the process. Does not wait; does nothing to a process that has ended.
    pub(super) fn kill(&self) {
        if let State::Running(_) = *self.state.lock() {
            // It may have ended already: then it is a zombie, or there is nobody to kill.
            let _ = kill_process(self.pid, Signal::KILL);
        }
    }

    /// Waits until the process has ended and its memory is free, and returns how it ended, in words.
    pub(super) fn wait(&self) -> String {
        if self.is_gone() {
            return self.reap();
        }
        // The process is not reaped while others may kill it by its number.
        while let Err(rustix::io::Errno::INTR) =
            waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
        {}
        self.reap()
    }

    /// Waits at most `limit` for the end of the process. Returns whether it has ended.
    pub(super) fn wait_at_most(&self, limit: Duration) -> bool {
        if self.is_gone() {
            return true;
        }
        let started = Instant::now();
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        loop {
            match waitid(WaitId::Pid(self.pid), options) {
                Ok(None) if started.elapsed() < limit => std::thread::sleep(LOOK_EVERY),
                Ok(None) => return false,
                Err(rustix::io::Errno::INTR) => {}
                Ok(Some(_)) | Err(_) => return true,
            }
        }
    }

    /// Whether the process was reaped: its number may be another's.
    fn is_gone(&self) -> bool {
        matches!(*self.state.lock(), State::Gone(_))
    }

    fn reap(&self) -> String {
        let mut state = self.state.lock();
        if let State::Running(child) = &mut *state {
            *state = State::Gone(child.wait());
            LIVE.lock().remove(&self.id());
        }
        match &*state {
            State::Gone(Ok(status)) => status.to_string(),
            State::Gone(Err(error)) => format!("its end is unknown: {error}"),
            State::Running(_) => "it runs".to_owned(),
        }
    }
}
