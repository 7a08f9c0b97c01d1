//! Events of a worker in the node's log: the worker writes each as one marked line of JSON to its standard error, and
//! the node logs it again, in the span of the worker's shard.

use super::message::LogLevel;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Level, Metadata, Subscriber};

/// The first byte of an event's line: ASCII's record separator, as in JSON text sequences (RFC 7464).
const MARK: u8 = 0x1e;

/// The longest event, in bytes; the message of a longer one is cut, and its fields are left out.
pub(super) const EVENT_BYTES_MAX: usize = 60 << 10;

/// The most detailed level that the node logs, as [`LogLevel`]. A worker learns it with its first request.
static LEVEL: AtomicU8 = AtomicU8::new(LogLevel::Warn as u8);

/// An event on its way to the node.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Event {
    level: LogLevel,
    target: String,
    message: String,
    fields: BTreeMap<String, String>,
}

impl LogLevel {
    /// The most detailed level that this process logs.
    pub(super) fn of_this_process() -> Self {
        match LevelFilter::current().into_level() {
            None => Self::Off,
            Some(level) => Self::of(level),
        }
    }

    fn of(level: Level) -> Self {
        match level {
            Level::ERROR => Self::Error,
            Level::WARN => Self::Warn,
            Level::INFO => Self::Info,
            Level::DEBUG => Self::Debug,
            Level::TRACE => Self::Trace,
        }
    }
}

impl Event {
    /// Returns the event in a line of a worker's standard error; `None`: the line is plain text.
    pub(super) fn read(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line.strip_prefix(&[MARK])?).ok()
    }

    /// Whether a line is an event, or a part of one.
    pub(super) fn is_marked(line: &[u8]) -> bool {
        line.first() == Some(&MARK)
    }

    fn write(&self) {
        let Ok(json) = serde_json::to_vec(self) else { return };
        let json = match json.len() {
            0..EVENT_BYTES_MAX => json,
            // A character takes up to six bytes in JSON.
            _ => {
                let message: String = self.message.chars().take(EVENT_BYTES_MAX / 12).collect();
                let (level, target, fields) = (self.level, self.target.clone(), BTreeMap::new());
                let Ok(json) = serde_json::to_vec(&Self { level, target, message, fields }) else { return };
                json
            }
        };
        let line = [&[MARK], json.as_slice(), b"\n"].concat();
        // A worker whose node has gone ends soon.
        let _ = std::io::stderr().lock().write_all(&line);
    }

    /// Logs the event in this process.
    pub(super) fn log(&self, worker: i32) {
        let Self { level, target, message, fields } = self;
        let fields = fields.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ");
        match level {
            LogLevel::Error => tracing::error!(worker, from = target, fields, "{message}"),
            LogLevel::Warn => tracing::warn!(worker, from = target, fields, "{message}"),
            LogLevel::Info => tracing::info!(worker, from = target, fields, "{message}"),
            LogLevel::Debug => tracing::debug!(worker, from = target, fields, "{message}"),
            LogLevel::Trace => tracing::trace!(worker, from = target, fields, "{message}"),
            LogLevel::Off => {}
        }
    }
}

/// Sets the most detailed level of a worker's events.
pub(super) fn set_level(level: LogLevel) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Makes this process write its events for the node.
pub(super) fn start() {
    // Fails only where the program has set another subscriber, whose output goes to the node as plain lines.
    let _ = tracing::subscriber::set_global_default(ToNode);
}

/// Writes events to standard error. Spans are the node's affair.
struct ToNode;

impl Subscriber for ToNode {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        // The level changes with the first request.
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && LogLevel::of(*metadata.level()) as u8 <= LEVEL.load(Ordering::Relaxed)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let Fields { message, fields } = fields;
        let level = LogLevel::of(*metadata.level());
        Event { level, target: metadata.target().to_owned(), message, fields }.write();
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Fields {
    message: String,
    fields: BTreeMap<String, String>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.message = text,
            name => drop(self.fields.insert(name.to_owned(), text)),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => drop(self.fields.insert(name.to_owned(), value.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_back_and_other_lines_are_not_events() {
        let fields = BTreeMap::from([("kernel".to_owned(), "matmul".to_owned())]);
        let event = Event { level: LogLevel::Info, target: "t".to_owned(), message: "compiled".to_owned(), fields };
        let json = serde_json::to_vec(&event).expect("plain data");
        assert_eq!(Event::read(&[&[MARK], json.as_slice(), b"\n"].concat()), Some(event));
        assert_eq!(Event::read(&json), None);
        assert_eq!(Event::read(b"\x1ecut off {"), None);
    }
}
