//! Progress on stderr: bars on a terminal only, and one-line notes for logs, too.

use crate::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use std::io::IsTerminal;
use std::time::Duration;

/// The progress display of a command.
#[derive(Debug)]
pub(super) struct Display {
    bar: Mutex<ProgressBar>,
    shows: Shows,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shows {
    BarsAndNotes,
    Notes,
    Nothing,
}

impl Display {
    pub(super) fn new() -> Self {
        Self::with(Shows::BarsAndNotes)
    }

    /// A display that shows nothing.
    pub(super) fn quiet() -> Self {
        Self::with(Shows::Nothing)
    }

    /// A display of notes alone.
    pub(super) fn notes() -> Self {
        Self::with(Shows::Notes)
    }

    fn with(shows: Shows) -> Self {
        Self { bar: Mutex::new(ProgressBar::hidden()), shows }
    }

    fn note(&self, text: &str) {
        if self.shows != Shows::Nothing {
            self.clear();
            eprintln!("{text}");
        }
    }

    /// Shows the progress of a model's download.
    pub(super) fn fetch(&self, progress: Progress) {
        match progress {
            Progress::Trying { model, source } => self.note(&format!("fetching {model} from {source}")),
            Progress::Failed { source, reason } => self.note(&format!("{source} failed: {reason}")),
            Progress::Fetching { fetched_bytes, total_bytes } => self.bytes("fetching", fetched_bytes, total_bytes),
            Progress::Unlike { model, path } => self.note(&format!(
                "warning: {} is not the catalogue's {model}: its SHA-256 differs\n  remedy: delete it, and fetch the \
                 model again",
                path.display()
            )),
            Progress::Verifying => self.bytes("verifying", 0, None),
            Progress::Fetched { path, source } => {
                self.note(&format!("fetched from {source} to {}", path.display()));
            }
        }
    }

    /// Shows the progress of a load, in bytes.
    pub(super) fn load(&self, loaded_bytes: u64, total_bytes: u64) {
        if total_bytes > 0 {
            self.bytes("loading", loaded_bytes, Some(total_bytes));
        }
    }

    /// Removes the bar.
    pub(super) fn clear(&self) {
        let mut bar = self.bar.lock();
        bar.finish_and_clear();
        *bar = ProgressBar::hidden();
    }

    fn bytes(&self, what: &'static str, done: u64, total: Option<u64>) {
        if self.shows != Shows::BarsAndNotes || !std::io::stderr().is_terminal() {
            return;
        }
        let mut bar = self.bar.lock();
        if bar.is_hidden() || bar.message() != what {
            bar.finish_and_clear();
            *bar = new_bar(total).with_message(what);
        }
        bar.set_position(done);
    }
}

fn new_bar(total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{msg} {bar:32} {bytes} of {total_bytes}, {bytes_per_sec}"),
        None => (ProgressBar::new_spinner(), "{spinner} {msg} {bytes}"),
    };
    bar.set_draw_target(ProgressDrawTarget::stderr());
    bar.enable_steady_tick(Duration::from_millis(100));
    // The templates are constants and valid; the default style is a harmless fallback.
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
