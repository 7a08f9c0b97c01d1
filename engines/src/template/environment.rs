//! The environment of chat templates: Jinja as Hugging Face configures it.

use super::python;
use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use parking_lot::Mutex;
use std::fmt::Write as _;
use std::sync::Arc;

/// The prefix that marks an error of `raise_exception`.
pub(super) const RAISED: &str = "raised: ";

/// An environment with trimmed blocks, nothing escaped, and Python's methods on values. `now` is the time that
/// `strftime_now` formats.
pub(super) fn python_like(now: &Arc<Mutex<NaiveDateTime>>) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    python::install(&mut environment);
    environment.add_function("raise_exception", |what: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{what}")))
    });
    let now = Arc::clone(now);
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let now = *now.lock();
        let mut text = String::new();
        // Python writes microseconds; `%%` is a percent sign.
        let parts: Vec<String> = format.split("%%").map(|part| part.replace("%f", "%6f")).collect();
        write!(text, "{}", now.format(&parts.join("%%")))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("`{format}` is not a date format")))?;
        Ok(text)
    });
    Ok(environment)
}

/// The source with `\n` as its only line end. Hugging Face's `generation` blocks, which mark text for training only,
/// become `with` blocks.
pub(super) fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut prepared = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        prepared.push_str(before);
        let length = tag.find("%}").map_or(tag.len(), |end| end + 2);
        prepared.push_str(&scope(&tag[..length]).unwrap_or_else(|| tag[..length].to_owned()));
        rest = &tag[length..];
    }
    prepared + rest
}

/// The tag of a scope, if `tag` begins or ends a `generation` block.
fn scope(tag: &str) -> Option<String> {
    let is_sign = |c: char| matches!(c, '-' | '+');
    let inside = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let open = if inside.starts_with(is_sign) { &inside[..1] } else { "" };
    let inside = &inside[open.len()..];
    let close = if inside.ends_with(is_sign) { &inside[inside.len() - 1..] } else { "" };
    let keyword = match inside[..inside.len() - close.len()].trim() {
        "generation" => "with",
        "endgeneration" => "endwith",
        _ => return None,
    };
    Some(format!("{{%{open} {keyword} {close}%}}"))
}
