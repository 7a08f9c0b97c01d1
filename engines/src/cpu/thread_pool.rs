//! The threads of one CPU engine.
//!
//! A step consists of a few hundred short parallel sections, microseconds apart, so a helper that has finished a
//! section spins briefly before it sleeps. Threads claim tasks one by one, and a section ends when its tasks are done,
//! not when every helper has looked for one: on a shared machine, a helper that does not run delays nothing, and one
//! that is descheduled in a task delays that task. After such a delay, the calling thread works alone for a while:
//! another process wants the core, and two threads would be slower than one.

use parking_lot::{Condvar, Mutex};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Checks of the counter before a helper sleeps: some tens of microseconds, or a few gaps between sections of a step.
const SPINS_BEFORE_SLEEP: u32 = 20_000;
/// Checks before the calling thread reads the clock, and lets others run: some tens of microseconds.
const SPINS_BEFORE_YIELD: u32 = 2_000;
/// The least delay of a section by a helper that does not run: less than a scheduler's time slice.
const DELAY_MIN: Duration = Duration::from_micros(500);
/// How long the calling thread works alone after a delay: several time slices.
const ALONE: Duration = Duration::from_millis(30);

/// The calling thread and its helper threads. Dropping the pool stops the helpers.
#[derive(Debug)]
pub(crate) struct ThreadPool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    alone_until: Option<Instant>,
}

/// The work of a section: called once for each task number.
type Work = dyn Fn(usize) + Sync;

#[derive(Debug)]
struct Shared {
    /// The current section, and its next task. A claim names its section, so that a late helper takes no task of
    /// another one. A new section is written under `asleep`, so that no sleeping helper misses it.
    claims: AtomicU64,
    job: Mutex<Option<Job>>,
    /// Tasks of the section that are done.
    done: AtomicUsize,
    panicked: AtomicBool,
    ending: AtomicBool,
    asleep: Mutex<()>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct Job {
    section: u32,
    work: *const Work,
    /// The end of the tasks' numbers.
    tasks: u32,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job({} tasks)", self.tasks)
    }
}

// SAFETY: the pointee is `Sync`, and is used only by tasks of its section, for which `ThreadPool::run` waits.
unsafe impl Send for Job {}

/// A helper or the caller panicked inside a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a compute thread panicked")]
pub(crate) struct Panicked;

impl ThreadPool {
    /// Creates a pool of `threads` threads, the caller included.
    ///
    /// # Errors
    /// The operating system's error if a thread cannot be started.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            claims: AtomicU64::new(0),
            job: Mutex::new(None),
            done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self { shared, helpers: Vec::new(), alone_until: None };
        for number in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("cpu-engine-{number}"));
            pool.helpers.push(thread.spawn(move || help(&shared))?);
        }
        Ok(pool)
    }

    /// Returns the number of threads, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `work(0)` … `work(tasks − 1)`, each once, in any order, on any thread of the pool.
    ///
    /// # Errors
    /// [`Panicked`] if a task panicked; the other tasks have run.
    pub(crate) fn run(&mut self, tasks: usize, work: &(dyn Fn(usize) + Sync)) -> Result<(), Panicked> {
        let tasks = u32::try_from(tasks).unwrap_or_else(|_| unreachable!("a section has a few tasks per row"));
        let mut panicked = false;
        let mut first = 0;
        while first < tasks && (self.helpers.is_empty() || tasks - first == 1 || self.is_alone()) {
            panicked |= panics(work, first);
            first += 1;
        }
        if first < tasks {
            panicked |= self.run_together(first..tasks, work);
        }
        if panicked { Err(Panicked) } else { Ok(()) }
    }

    /// Runs tasks on all threads; returns whether one panicked.
    fn run_together(&mut self, tasks: Range<u32>, work: &(dyn Fn(usize) + Sync)) -> bool {
        // SAFETY: the cast changes only the lifetime, and this function waits for all tasks before it returns.
        let work = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Work>(work) };
        let shared = &*self.shared;
        let started = Instant::now();
        let section = section_of(shared.claims.load(Ordering::Relaxed)).wrapping_add(1);
        let job = Job { section, work, tasks: tasks.end };
        *shared.job.lock() = Some(job);
        shared.done.store(0, Ordering::Relaxed);
        shared.begin(section, tasks.start);
        shared.take_tasks(job);
        if shared.wait_for_tasks(tasks.len(), started) {
            self.alone_until = Some(Instant::now() + ALONE);
        }
        self.shared.panicked.swap(false, Ordering::AcqRel)
    }

    fn is_alone(&mut self) -> bool {
        self.alone_until = self.alone_until.filter(|&until| Instant::now() < until);
        self.alone_until.is_some()
    }
}

/// Runs a task; returns whether it panicked.
fn panics(work: &(dyn Fn(usize) + Sync), task: u32) -> bool {
    catch_unwind(AssertUnwindSafe(|| work(task as usize))).is_err()
}

fn section_of(claims: u64) -> u32 {
    (claims >> 32) as u32
}

impl Shared {
    /// Starts a section: its tasks from `first` on can be claimed from now on.
    fn begin(&self, section: u32, first: u32) {
        {
            let _guard = self.asleep.lock();
            self.claims.store(u64::from(section) << 32 | u64::from(first), Ordering::Release);
        }
        self.wake.notify_all();
    }

    /// Claims a task of the job; `None` if all are claimed, or the job's section is over.
    fn claim(&self, job: Job) -> Option<u32> {
        let claimed = self.claims.fetch_update(Ordering::AcqRel, Ordering::Acquire, |claims| {
            (section_of(claims) == job.section && (claims as u32) < job.tasks).then_some(claims + 1)
        });
        claimed.ok().map(|claims| claims as u32)
    }

    fn take_tasks(&self, job: Job) {
        while let Some(task) = self.claim(job) {
            // SAFETY: `ThreadPool::run` keeps the work alive until every claimed task of its section is done.
            let work = unsafe { &*job.work };
            if panics(work, task) {
                self.panicked.store(true, Ordering::Release);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }

    /// Waits until `tasks` tasks are done. Returns whether a helper delayed the section, which `started`: it took
    /// longer than the caller's own tasks, and than tasks of unequal length explain.
    fn wait_for_tasks(&self, tasks: usize, started: Instant) -> bool {
        let mut own = None;
        let mut spins = 0_u32;
        while self.done.load(Ordering::Acquire) < tasks {
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(SPINS_BEFORE_YIELD) {
                own.get_or_insert_with(|| started.elapsed());
                std::thread::yield_now();
            }
        }
        own.is_some_and(|own| started.elapsed() > own * 2 + DELAY_MIN)
    }

    /// Waits for a section after `seen`; returns `None` when the pool stops.
    fn wait_for_section(&self, seen: u32) -> Option<u32> {
        let next = || Some(section_of(self.claims.load(Ordering::Acquire))).filter(|&section| section != seen);
        for _ in 0..SPINS_BEFORE_SLEEP {
            if let Some(section) = next() {
                return self.unless_ending(section);
            }
            std::hint::spin_loop();
        }
        let mut guard = self.asleep.lock();
        loop {
            if let Some(section) = next() {
                return self.unless_ending(section);
            }
            self.wake.wait(&mut guard);
        }
    }

    fn unless_ending(&self, section: u32) -> Option<u32> {
        (!self.ending.load(Ordering::Acquire)).then_some(section)
    }
}

fn help(shared: &Shared) {
    let mut seen = 0;
    while let Some(section) = shared.wait_for_section(seen) {
        seen = section;
        let job = *shared.job.lock();
        if let Some(job) = job {
            shared.take_tasks(job);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.shared.begin(section_of(self.shared.claims.load(Ordering::Relaxed)).wrapping_add(1), u32::MAX);
        for helper in self.helpers.drain(..) {
            // A panic in a helper has been caught and reported by its section.
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let mut pool = ThreadPool::new(3).expect("threads");
        for tasks in [0, 1, 2, 7, 100] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            let done = pool.run(tasks, &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done, Ok(()));
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    /// More threads than most machines' cores, and sections that are over before a helper wakes.
    #[test]
    fn short_sections_with_late_helpers_run_every_task_once() {
        let mut pool = ThreadPool::new(4).expect("threads");
        for section in 0..4000_usize {
            let tasks = section % 9;
            let sum = AtomicUsize::new(0);
            let done = pool.run(tasks, &|task| {
                sum.fetch_add(task + 1, Ordering::Relaxed);
            });
            assert_eq!(done, Ok(()));
            assert_eq!(sum.into_inner(), tasks * (tasks + 1) / 2, "section {section}");
        }
    }

    /// After a delay the caller works alone, but for a while only: a long section is shared again.
    #[test]
    fn a_long_section_is_shared_after_a_delay() {
        let mut pool = ThreadPool::new(2).expect("threads");
        pool.alone_until = Some(Instant::now() + ALONE);
        let threads = Mutex::new(std::collections::BTreeSet::new());
        let done = pool.run(200, &|_| {
            threads.lock().insert(format!("{:?}", std::thread::current().id()));
            std::thread::sleep(Duration::from_millis(1));
        });
        assert_eq!(done, Ok(()));
        assert_eq!(threads.into_inner().len(), 2);
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_stays_usable() {
        let mut pool = ThreadPool::new(2).expect("threads");
        let failed = pool.run(8, &|task| assert_ne!(task, 5, "a task that fails"));
        assert_eq!(failed, Err(Panicked));
        assert_eq!(pool.run(8, &|_| {}), Ok(()));
    }
}
