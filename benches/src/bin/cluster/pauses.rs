//! The pauses of an answer over three processes, when some of them die or are stopped.

use super::processes::{Process, cluster, shards, stream, stream_to};
use anyhow::{Context, ensure};
use exo_actors::ModelSpec;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The tokens of an answer: enough that it still runs when a process that was stopped for 5 s continues.
const ANSWER: u32 = 1000;
/// The tokens before the fault.
const BEFORE: usize = 50;
/// The tokens after the pause.
const AFTER: usize = 50;
/// The numbered words of the long prompt; each is about six tokens.
const PROMPT_WORDS: usize = 500;

/// What a process does for the answer.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Role {
    /// It has the first layers and the scheduler.
    Head,
    Middle,
    /// It has the last layers.
    Tail,
    /// It places models: the process with the lowest id.
    Leader,
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill(&'static [Role]),
    /// Stops the tail for this time.
    Stop(Duration),
    /// Kills a process while the prompt is computed.
    KillInPrompt(Role),
}

const CASES: [(&str, Fault); 9] = [
    ("the tail is killed", Fault::Kill(&[Role::Tail])),
    ("the head is killed", Fault::Kill(&[Role::Head])),
    ("the leader is killed", Fault::Kill(&[Role::Leader])),
    ("head and tail are killed", Fault::Kill(&[Role::Head, Role::Tail])),
    ("the tail is stopped for 5 s", Fault::Stop(Duration::from_secs(5))),
    ("the tail is stopped for 30 s", Fault::Stop(Duration::from_secs(30))),
    ("the tail is killed in a prompt", Fault::KillInPrompt(Role::Tail)),
    ("the middle is killed in a prompt", Fault::KillInPrompt(Role::Middle)),
    ("the head is killed in a prompt", Fault::KillInPrompt(Role::Head)),
];

/// Measures the cases whose names contain `only`.
pub(crate) fn bench(exo_node: &Path, model: &str, repeat: usize, only: &str) -> anyhow::Result<()> {
    println!("pauses, in seconds; of a kill in a prompt, the time beyond an undisturbed prompt:");
    for (name, fault) in CASES.into_iter().filter(|(name, _)| name.contains(only)) {
        let pauses = (0..repeat).map(|_| measure(exo_node, model, fault)).collect::<anyhow::Result<Vec<_>>>()?;
        let longest = pauses.iter().copied().fold(0.0, f64::max);
        let all: Vec<String> = pauses.iter().map(|pause| format!("{pause:.2}")).collect();
        println!("{name}: {:.2}, {longest:.2} at most ({})", crate::median(pauses), all.join(" "));
    }
    Ok(())
}

/// Three processes, each with a third of the layers.
struct Trio {
    processes: Vec<Process>,
    split: ModelSpec,
    /// The indices of head, middle and tail.
    stages: Vec<usize>,
    leader: usize,
}

impl Trio {
    fn start(exo_node: &Path, model: &str) -> anyhow::Result<Self> {
        let processes = cluster(exo_node, 3)?;
        let split = shards(model, 3);
        stream(&processes[0], &split, 1)?;
        let states = processes.iter().map(|process| process.state(exo_node)).collect::<anyhow::Result<Vec<_>>>()?;
        let ids: Vec<&str> = states.iter().filter_map(|state| state["node"].as_str()).collect();
        let leader = (0..ids.len()).min_by_key(|&index| ids[index]).context("no process has an id")?;
        let instances = states.iter().filter_map(|state| state["instances"].as_object()?.values().next());
        let instance = instances.into_iter().next().context("no process has the model")?;
        let stages = instance["placement"]["stages"].as_array().context("the model has no stages")?;
        let nodes = stages.iter().filter_map(|stage| stage["node"].as_str());
        let stages: Vec<usize> = nodes.filter_map(|node| ids.iter().position(|id| *id == node)).collect();
        ensure!(stages.len() == 3, "the model is not on three processes");
        Ok(Self { processes, split, stages, leader })
    }

    fn find(&self, role: Role) -> usize {
        match role {
            Role::Head => self.stages[0],
            Role::Middle => self.stages[1],
            Role::Tail => self.stages[2],
            Role::Leader => self.leader,
        }
    }

    /// A process that is none of `victims`: the head, if it is none of them.
    fn asked(&self, victims: &[usize]) -> anyhow::Result<&Process> {
        let asked = self.stages.iter().find(|index| !victims.contains(index)).context("all processes are victims")?;
        Ok(&self.processes[*asked])
    }
}

/// The pause after a fault, in seconds.
fn measure(exo_node: &Path, model: &str, fault: Fault) -> anyhow::Result<f64> {
    let trio = Trio::start(exo_node, model)?;
    match fault {
        Fault::Kill(roles) => {
            let victims: Vec<usize> = roles.iter().map(|role| trio.find(*role)).collect();
            pause(&trio, &victims, || victims.iter().try_for_each(|&victim| trio.processes[victim].signal("KILL")))
        }
        Fault::Stop(time) => {
            let tail = trio.find(Role::Tail);
            let process = &trio.processes[tail];
            std::thread::scope(|scope| {
                pause(&trio, &[tail], || {
                    process.signal("STOP")?;
                    scope.spawn(move || {
                        std::thread::sleep(time);
                        go_on(process);
                    });
                    Ok(())
                })
            })
        }
        Fault::KillInPrompt(role) => extra_time(&trio, trio.find(role)),
    }
}

/// Lets a stopped process go on.
fn go_on(process: &Process) {
    if let Err(error) = process.signal("CONT") {
        eprintln!("the stopped process does not continue: {error}");
    }
}

/// The longest time between two tokens of an answer, in which `strike` is called.
fn pause(trio: &Trio, victims: &[usize], strike: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let asked = trio.asked(victims)?;
    let (sender, times) = mpsc::sync_channel(ANSWER as usize);
    std::thread::scope(|scope| {
        let streaming = scope.spawn(move || {
            stream_to(asked, &trio.split, "Once upon a time there was a ship", ANSWER, |time| {
                // Nobody waits for the tokens after the pause.
                let _ = sender.send(time);
            })
        });
        let next = || times.recv().context("the answer ended too soon");
        for _ in 0..BEFORE {
            next()?;
        }
        strike()?;
        let (mut longest, mut last, mut after) = (0.0_f64, Instant::now(), 0);
        while after < AFTER {
            let Ok(time) = times.recv() else { break };
            let gap = time.saturating_duration_since(last).as_secs_f64();
            (longest, last) = (longest.max(gap), time);
            // Tokens that were under way when the fault struck still come.
            after = if gap >= longest { 0 } else { after + 1 };
        }
        drop(times);
        streaming.join().map_err(|_| anyhow::anyhow!("the stream failed"))??;
        Ok(longest)
    })
}

/// The time to the first token when a process is killed halfway through a long prompt, minus the undisturbed time.
fn extra_time(trio: &Trio, victim: usize) -> anyhow::Result<f64> {
    let asked = trio.asked(&[victim])?;
    let undisturbed = time_to_first_token(asked, &trio.split, &long_prompt("red"))?;
    let disturbed = std::thread::scope(|scope| {
        let streaming = scope.spawn(|| time_to_first_token(asked, &trio.split, &long_prompt("blue")));
        std::thread::sleep(undisturbed / 2);
        trio.processes[victim].signal("KILL")?;
        streaming.join().map_err(|_| anyhow::anyhow!("the stream failed"))?
    })?;
    Ok(disturbed.as_secs_f64() - undisturbed.as_secs_f64())
}

fn time_to_first_token(process: &Process, model: &ModelSpec, prompt: &str) -> anyhow::Result<Duration> {
    let (begun, mut first) = (Instant::now(), None);
    stream_to(process, model, prompt, 2, |time| first = first.or(Some(time)))?;
    Ok(first.context("no token came")?.duration_since(begun))
}

/// A prompt that shares no prefix with one of another colour.
fn long_prompt(colour: &str) -> String {
    (0..PROMPT_WORDS).map(|number| format!("{colour} {number} ")).collect()
}
