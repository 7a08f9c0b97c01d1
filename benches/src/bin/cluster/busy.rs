//! Load beside what is measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Threads that compute until this value is dropped.
pub(crate) struct Busy {
    is_over: Arc<AtomicBool>,
}

impl Busy {
    pub(crate) fn start(threads: usize) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        for _ in 0..threads {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self { is_over }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}
