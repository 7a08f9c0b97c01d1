//! Faults of an engine's process, in every phase of its life, while answers are computed: no answer is lost, and none
//! changes.
//!
//! The device is the native CPU engine under the name of a GPU. It runs in a process that fails once, at the call that
//! the test names (`faulty_worker`). Its fallback is the same engine on a thread, so an answer has the same bits on
//! both.

#[path = "faulty_worker/gpu.rs"]
mod gpu;
#[path = "../../actors/tests/node/tiny_model.rs"]
mod tiny_model;

use crate::{SMOLLM2, json, models};
use exo::{DeviceId, Fact, HangTimeouts, RunningModel, Subscription};
use exo::{GenerateRequest, Generated, ModelSpec, Node, NodeHandle, Prompt, RequestError, Sampled, SamplingParams};
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::EngineFactory;
use exo_engines::worker::{WorkerCommand, WorkerFactory};
use gpu::{Computes, GpuFactory};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tiny_model::write_tiny_model;

/// How long a call may take until the process is killed.
const HANGS_AFTER: Duration = Duration::from_millis(1500);
/// The pause before the first probe of the device.
const PROBE_AFTER: Duration = Duration::from_millis(300);
const PROMPT_TOKENS: u32 = 70;
const ANSWER_TOKENS: u32 = 60;

/// A fault: the phase, the kind, and at which call of the phase it happens.
type Fault = (&'static str, &'static str, u64);

const ENDS: [&str; 5] = ["abort", "kill", "stop", "loop", "exit"];

/// Every fault that the phase can have.
fn faults() -> Vec<Fault> {
    let of = |phase: &'static str, number: u64, kinds: &[&'static str]| -> Vec<Fault> {
        kinds.iter().chain(&ENDS).map(|&kind| (phase, kind, number)).collect()
    };
    [
        of("spawn", 1, &["version", "garbage", "cut"]),
        of("self-test", 1, &["error", "panic", "cut"]),
        of("load", 7, &["error", "memory", "panic", "cut"]),
        of("prefill", 1, &["error", "memory", "panic", "garbage", "cut"]),
        of("decode", 8, &["error", "memory", "panic", "garbage", "cut"]),
    ]
    .concat()
}

/// A node with a GPU that fails once, and the CPU; or, without a fault, the CPU alone.
struct World {
    node: NodeHandle,
    fault: Option<Fault>,
    folder: tempfile::TempDir,
}

impl World {
    async fn new(fault: Option<Fault>) -> Self {
        Self::computing(fault, Computes::NativeCpu).await
    }

    async fn computing(fault: Option<Fault>, computes: Computes) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines/tests/fixtures/llama");
        write_tiny_model(&fixture, folder.path(), 512);
        let mut factories: Vec<Arc<dyn EngineFactory>> = vec![Arc::new(CpuFactory::new(1))];
        if let Some((phase, kind, number)) = fault {
            let file = folder.path().join("fault");
            std::fs::write(&file, "").expect("written");
            let fault = format!("{phase} {kind} {number} {}", file.display());
            let mut environment = vec![("EXO_FAULT".into(), fault.into())];
            if computes == Computes::OpenCl {
                environment.push(("EXO_FAULT_OPENCL".into(), "1".into()));
            }
            let command = WorkerCommand { program: faulty_worker(), arguments: Vec::new(), environment };
            factories.insert(0, Arc::new(WorkerFactory::new(Arc::new(GpuFactory::new(computes)), command)));
        }
        let hang_timeouts = match computes {
            Computes::NativeCpu => HangTimeouts { load: HANGS_AFTER, step: HANGS_AFTER, row: Duration::ZERO },
            // Kernels are compiled in the first step.
            Computes::OpenCl => HangTimeouts::default(),
        };
        let builder = Node::builder().data_dir(folder.path().join("data")).models_dirs(vec![folder.path().to_owned()]);
        let builder = builder.factories(factories).hang_timeouts(hang_timeouts).probe_after(PROBE_AFTER);
        Self { node: builder.start().await.expect("the node starts"), fault, folder }
    }

    fn spec(&self) -> ModelSpec {
        // A device that is out of memory has no fallback: its shard is placed on another device.
        let device = self.fault.filter(|fault| fault.1 != "memory").map(|_| DeviceId(GpuFactory::DEVICE.to_owned()));
        ModelSpec { shards: Some(2), device, ..ModelSpec::new(self.folder.path().display().to_string()) }
    }

    async fn load(&self) -> RunningModel {
        self.node.load(self.spec()).await.expect("it loads")
    }

    /// The tokens of an answer with their log-probabilities, and the longest wait for a token.
    async fn ask(&self, temperature: f32) -> Result<(Vec<Sampled>, Duration), RequestError> {
        let prompt = (0..PROMPT_TOKENS).map(|at| 3 + at * 7 % 90).collect();
        let mut generation = self.node.generate(GenerateRequest {
            model: self.spec(),
            prompt: Prompt::Tokens(prompt),
            params: SamplingParams { temperature, seed: 11, top_p: 0.9, top_logprobs: 3, ..SamplingParams::greedy() },
            max_tokens: Some(ANSWER_TOKENS),
            stop: Vec::new(),
        })?;
        let (mut tokens, mut last, mut longest) = (Vec::new(), Instant::now(), Duration::ZERO);
        loop {
            let event = tokio::time::timeout(Duration::from_secs(30), generation.next()).await;
            match event.expect("the answer goes on").expect("a stream has an end")? {
                Generated::Token { sampled, .. } => tokens.push(sampled),
                Generated::Finished { .. } => return Ok((tokens, longest)),
                Generated::Started { .. } => {}
            }
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
    }

    /// Computes answers until the alarm of a slow or leaking process, and compares them.
    async fn alarm(&self, kind: &str, facts: &mut Subscription, expected: &[Sampled]) {
        let alarm = async {
            loop {
                match facts.next().await.expect("not too slow").expect("the node lives") {
                    Fact::ShardSpeed { slow_down: Some(slow), .. } if kind == "slow" => {
                        return assert!(slow.latest >= slow.best * 10, "{slow:?}");
                    }
                    Fact::ShardLeaks { growth: Some(_), .. } if kind == "leak" => return,
                    _ => {}
                }
            }
        };
        let answers = async {
            loop {
                assert!(self.ask(0.9).await.expect("an answer").0 == expected, "{kind} changes the answer");
            }
        };
        let alarm = async {
            tokio::select! { () = alarm => {}, () = answers => {} }
        };
        tokio::time::timeout(Duration::from_secs(60), alarm).await.expect("an alarm");
    }
}

/// Waits until there is one worker for each of two shards.
async fn two_workers() {
    let two = async {
        while leftovers().0.len() != 2 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), two).await.expect("each shard has one process");
}

/// Runs a test's body on a runtime of its own.
fn run<T>(body: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime").block_on(body)
}

/// The greedy and the sampled answer of an undisturbed run.
struct Calm {
    greedy: Vec<Sampled>,
    sampled: Vec<Sampled>,
}

impl Calm {
    async fn new() -> Self {
        let world = World::new(None).await;
        let greedy = world.ask(0.0).await.expect("an answer").0;
        let sampled = world.ask(0.9).await.expect("an answer").0;
        world.node.shutdown().await;
        assert!(greedy.len() > 30 && sampled.len() > 30, "long enough to be disturbed");
        Self { greedy, sampled }
    }

    /// Computes both answers side by side while a fault happens, and compares them with the undisturbed ones.
    async fn assert_kept(&self, world: &World, (phase, kind, number): Fault) {
        let (greedy, sampled) = tokio::join!(world.ask(0.0), world.ask(0.9));
        let ((greedy, pause), (sampled, other)) = (greedy.expect("an answer"), sampled.expect("an answer"));
        println!("{phase:10} {kind:8} pause {:4} ms", pause.max(other).as_millis());
        assert!(greedy == self.greedy, "{phase} {kind} {number} changes the greedy answer");
        assert!(sampled == self.sampled, "{phase} {kind} {number} changes the sampled answer");
    }
}

fn faulty_worker() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_exo-node")).parent().expect("a folder");
    folder.join("examples/faulty-worker")
}

/// The children of a process that have not been reaped.
fn children(parent: u32) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("Linux").filter_map(|entry| {
        let stat = std::fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        let after_name = stat.rsplit_once(") ")?.1;
        (after_name.split(' ').nth(1)? == parent.to_string()).then_some(stat)
    });
    processes.collect()
}

/// The children of this process that have not been reaped, and the number of its open files.
fn leftovers() -> (Vec<String>, usize) {
    (children(std::process::id()), std::fs::read_dir("/proc/self/fd").expect("Linux").count())
}

/// Waits until no worker is left and at most `files_max` files are open, and returns the number of open files. A thread
/// that reads the output of a worker closes it after the worker has ended.
async fn files_when_all_have_ended(files_max: usize) -> usize {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let (processes, files) = leftovers();
        if processes.is_empty() && files <= files_max {
            return files;
        }
        assert!(
            Instant::now() < deadline,
            "{files} open files, at most {files_max} expected; still there: {processes:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// R1.4, R3.1–R3.5, R8.1–R8.5: whatever happens to the process of an engine, in whichever phase, sampled and greedy
/// answers have the tokens and log-probabilities of an undisturbed run. No process and no file is left.
#[test]
fn no_fault_changes_an_answer() {
    run(async {
        let calm = Calm::new().await;
        let files = files_when_all_have_ended(usize::MAX).await;
        for fault in faults() {
            let world = World::new(Some(fault)).await;
            calm.assert_kept(&world, fault).await;
            assert!(!world.folder.path().join("fault").exists(), "{fault:?} has not happened");
            world.node.shutdown().await;
            files_when_all_have_ended(files).await;
        }
    });
}

/// R1.4, R6.1–R6.5: the OpenCL engine gives the answers of the CPU engine, to the bit, and a fallback to that in the
/// middle of an answer does not show.
#[test]
fn an_answer_moves_between_opencl_and_the_cpu_unchanged() {
    if GpuFactory::new(Computes::OpenCl).probe().is_empty() {
        return println!("SKIPPED: there is no OpenCL runtime for the CPU here, so nothing was tested");
    }
    run(async {
        let calm = Calm::new().await;
        for fault in [("decode", "kill", 8), ("decode", "error", 20), ("prefill", "abort", 1), ("load", "cut", 7)] {
            let world = World::computing(Some(fault), Computes::OpenCl).await;
            calm.assert_kept(&world, fault).await;
            world.node.shutdown().await;
        }
    });
}

/// R1.4, R8.1–R8.5: faults at random moments. `EXO_FAULT_RUNS` sets the number of runs, and `EXO_FAULT_SEED` the first.
#[test]
fn no_fault_at_a_random_moment_changes_an_answer() {
    let number = |name, default| std::env::var(name).map_or(default, |value| value.parse().expect("a number"));
    let (runs, first): (u64, u64) = (number("EXO_FAULT_RUNS", 25), number("EXO_FAULT_SEED", 0));
    run(async {
        let calm = Calm::new().await;
        let faults = faults();
        for seed in first..first + runs {
            // Knuth's multiplicative hash.
            let random = |salt: u64| (seed * 8 + salt).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
            let (phase, kind, _) = faults[random(0) as usize % faults.len()];
            let number = match phase {
                "spawn" | "self-test" => 1,
                "load" => 1 + random(1) % 12,
                _ => 1 + random(1) % 50,
            };
            println!("EXO_FAULT_SEED={seed}: {phase} {kind} {number}");
            let world = World::new(Some((phase, kind, number))).await;
            calm.assert_kept(&world, (phase, kind, number)).await;
            world.node.shutdown().await;
            files_when_all_have_ended(usize::MAX).await;
        }
    });
}

/// R8.1–R8.5: a shard that becomes twenty times as slow, and one whose process leaks memory, raise an alarm; a leaking
/// process is replaced in the middle of an answer.
#[test]
fn slow_and_leaking_processes_raise_alarms() {
    run(async {
        let expected = Calm::new().await.sampled;
        for (kind, number) in [("slow", 60), ("leak", 20)] {
            let world = World::new(Some(("decode", kind, number))).await;
            let mut facts = world.node.subscribe().await.expect("the node lives");
            world.alarm(kind, &mut facts, &expected).await;
            if kind == "leak" {
                let renewed = async { while !matches!(facts.next().await, Ok(Some(Fact::ShardLoaded { .. }))) {} };
                tokio::time::timeout(Duration::from_secs(20), renewed).await.expect("another process has the shard");
                assert!(world.ask(0.9).await.expect("an answer").0 == expected, "{kind} changes the answer");
                two_workers().await;
            }
            assert!(world.ask(0.9).await.expect("an answer").0 == expected, "{kind} changes the answer");
            world.node.shutdown().await;
            files_when_all_have_ended(usize::MAX).await;
        }
    });
}

/// R1.4, R8.1–R8.5: a leaking process that crashes while the one that replaces it loads is not started again: that one
/// serves, and answers do not change.
#[test]
fn a_leaking_process_that_crashes_has_one_successor() {
    run(async {
        let expected = Calm::new().await.sampled;
        let world = World::new(Some(("decode", "leak", 20))).await;
        let mut facts = world.node.subscribe().await.expect("the node lives");
        world.alarm("leak", &mut facts, &expected).await;
        let memory = |pid: &String| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
            line.split_whitespace().next().and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0)
        };
        let number = |stat: String| stat.split(' ').next().expect("a number").to_owned();
        let workers = children(std::process::id()).into_iter().map(number);
        let leaking = workers.max_by_key(memory).expect("a worker");
        let status = std::process::Command::new("kill").args(["-KILL", &leaking]).status().expect("it runs");
        assert!(status.success());
        assert!(world.ask(0.9).await.expect("an answer").0 == expected, "the crash changes the answer");
        two_workers().await;
        let starts = std::fs::read_to_string(world.folder.path().join("fault.starts")).expect("processes were started");
        assert_eq!(starts.lines().count(), 3, "two shards, and one replacement");
        let status = world.node.status().await.expect("the node lives");
        assert!(status.failed_devices.is_empty(), "{:?}", status.failed_devices);
        assert!(world.ask(0.9).await.expect("an answer").0 == expected, "the answer changes");
        world.node.shutdown().await;
        files_when_all_have_ended(usize::MAX).await;
    });
}

/// R8.1–R8.5: a process that does not let go of its device ends all the same when its model is unloaded.
#[test]
fn a_process_that_is_not_released_is_killed() {
    run(async {
        for kind in ENDS {
            let world = World::new(Some(("release", kind, 1))).await;
            drop(world.load().await);
            assert_eq!(leftovers().0.len(), 2, "a process for each shard");
            world.node.shutdown().await;
            files_when_all_have_ended(usize::MAX).await;
        }
    });
}

/// R3.1–R3.5: the command runs an engine in a process of its own with the same answer, and the process ends with its
/// node, even if that is killed.
#[test]
fn engines_of_the_command_run_in_processes_and_end_with_it() {
    models();
    let ask = |more: &[&str]| {
        let mut arguments = vec!["run", SMOLLM2, "The sky is", "--json", "--max-tokens", "24", "--standalone"];
        arguments.extend(more);
        json(&arguments)["token_ids"].clone()
    };
    assert_eq!(ask(&["--isolate"]), ask(&["--no-isolate"]));
    let node = super::node::Node::up(&[SMOLLM2, "--isolate"]);
    let parent = node.pid();
    let deadline = Instant::now() + Duration::from_secs(60);
    let worker = loop {
        if let Some(worker) = children(parent).first() {
            break worker.split(' ').next().expect("a number").to_owned();
        }
        assert!(Instant::now() < deadline, "no process for the engine");
        std::thread::sleep(Duration::from_millis(50));
    };
    node.signal("KILL");
    let stat = PathBuf::from("/proc").join(worker).join("stat");
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < deadline, "the process outlives its node");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// R3.1–R3.5: a program that cannot run as the process of an engine says so, and how it can.
#[test]
fn a_program_that_is_no_worker_is_told_how_to_become_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let builder = Node::builder().data_dir(folder.path()).isolation(exo::Isolation::All);
    let error = run(builder.start()).expect_err("it has no worker").to_string();
    assert!(error.contains("run_worker_if_asked"), "{error}");
}
