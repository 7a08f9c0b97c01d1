//! The threads of one CPU engine.
//!
//! A step consists of a few hundred short parallel sections, microseconds apart, so a helper that has finished a
//! section spins briefly before it sleeps. Threads claim tasks one by one from a counter: on a shared machine, a
//! descheduled helper delays one task, not a fixed share of all tasks.

use parking_lot::{Condvar, Mutex};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// Checks of the counter before a helper sleeps: some tens of microseconds, or a few gaps between sections of a step.
const SPINS_BEFORE_SLEEP: u32 = 20_000;

/// The calling thread and its helper threads. Dropping the pool stops the helpers.
#[derive(Debug)]
pub(crate) struct ThreadPool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

/// The work of a section: called once for each task number.
type Work = dyn Fn(usize) + Sync;

#[derive(Debug)]
struct Shared {
    /// The number of sections started; a change is the signal to start. Written under `asleep`, so that no sleeping
    /// helper misses it.
    section: AtomicU64,
    job: Mutex<Option<Job>>,
    next_task: AtomicUsize,
    /// Helpers that have not finished the current section.
    busy: AtomicUsize,
    panicked: AtomicBool,
    ending: AtomicBool,
    asleep: Mutex<()>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct Job {
    work: *const Work,
    tasks: usize,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job({} tasks)", self.tasks)
    }
}

// SAFETY: the pointee is `Sync`, and `ThreadPool::run` does not return before every helper has finished with it.
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
            section: AtomicU64::new(0),
            job: Mutex::new(None),
            next_task: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self { shared, helpers: Vec::new() };
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
    /// [`Panicked`] if a task panicked; the other tasks may or may not have run.
    pub(crate) fn run(&mut self, tasks: usize, work: &(dyn Fn(usize) + Sync)) -> Result<(), Panicked> {
        let shared = &*self.shared;
        if self.helpers.is_empty() || tasks <= 1 {
            return catch_unwind(AssertUnwindSafe(|| (0..tasks).for_each(work))).map_err(|_| Panicked);
        }
        // SAFETY: the cast changes only the lifetime, and this function waits for all helpers before it returns.
        let work = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Work>(work) };
        let job = Job { work, tasks };
        *shared.job.lock() = Some(job);
        shared.next_task.store(0, Ordering::Relaxed);
        shared.busy.store(self.helpers.len(), Ordering::Relaxed);
        {
            let _guard = shared.asleep.lock();
            shared.section.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        shared.take_tasks(job);
        let mut spins = 0_u32;
        while shared.busy.load(Ordering::Acquire) > 0 {
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(SPINS_BEFORE_SLEEP) {
                std::thread::yield_now();
            }
        }
        match shared.panicked.swap(false, Ordering::AcqRel) {
            true => Err(Panicked),
            false => Ok(()),
        }
    }
}

impl Shared {
    fn take_tasks(&self, job: Job) {
        // SAFETY: `ThreadPool::run` keeps the work alive until every thread is done.
        let work = unsafe { &*job.work };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next_task.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                work(task);
            }
        }));
        if outcome.is_err() {
            self.next_task.store(job.tasks, Ordering::Relaxed);
            self.panicked.store(true, Ordering::Release);
        }
    }

    /// Waits for a section after `seen`; returns `None` when the pool stops.
    fn wait_for_section(&self, seen: u64) -> Option<u64> {
        for _ in 0..SPINS_BEFORE_SLEEP {
            let section = self.section.load(Ordering::Acquire);
            if section != seen {
                return self.unless_ending(section);
            }
            std::hint::spin_loop();
        }
        let mut guard = self.asleep.lock();
        loop {
            let section = self.section.load(Ordering::Acquire);
            if section != seen {
                return self.unless_ending(section);
            }
            self.wake.wait(&mut guard);
        }
    }

    fn unless_ending(&self, section: u64) -> Option<u64> {
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
        shared.busy.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        {
            let _guard = self.shared.asleep.lock();
            self.shared.section.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
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

    #[test]
    fn a_panic_is_an_error_and_the_pool_stays_usable() {
        let mut pool = ThreadPool::new(2).expect("threads");
        let failed = pool.run(8, &|task| assert_ne!(task, 5, "a task that fails"));
        assert_eq!(failed, Err(Panicked));
        assert_eq!(pool.run(8, &|_| {}), Ok(()));
    }
}
