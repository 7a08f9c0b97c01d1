//! Prints values as Python does, because templates were tested with Python's Jinja only.

use super::{Bounded, OUTPUT_BYTES_MAX};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use std::fmt::Write as _;
use std::io;

/// The most spaces of `tojson(indent=…)`.
const INDENT_MAX: usize = 16;
/// Levels of nested lists. Deeper lists serve only to overflow a stack.
const DEPTH_MAX: usize = 64;
/// Elements of a value, nested ones included. A list that holds another list twice doubles them at each level.
const ELEMENTS_MAX: usize = 1 << 20;

/// Prints what `{{ value }}` prints: `str(value)`.
pub(super) fn print(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => {
            check_size(value, 0, &mut 0)?;
            let mut text = String::new();
            represent(value, &mut text)?;
            out.write_str(&text).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Fails if a value is too deep or too large to be written. `elements` counts the elements so far.
fn check_size(value: &Value, depth: usize, elements: &mut usize) -> Result<(), Error> {
    *elements += 1;
    if depth > DEPTH_MAX || *elements > ELEMENTS_MAX {
        let what = format!("a value has more than {DEPTH_MAX} levels or {ELEMENTS_MAX} elements");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    match value.kind() {
        ValueKind::Seq => value.try_iter()?.try_for_each(|item| check_size(&item, depth + 1, elements)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| check_size(&value.get_item(&key)?, depth + 1, elements)),
        _ => Ok(()),
    }
}

/// Appends `repr(value)`.
fn represent(value: &Value, out: &mut String) -> Result<(), Error> {
    if out.len() > OUTPUT_BYTES_MAX {
        return Err(Error::new(ErrorKind::WriteFailure, "the output is too long"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => represent_text(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                separate(index, out);
                represent(&item, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                separate(index, out);
                represent(&key, out)?;
                out.push_str(": ");
                represent(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        _ => write!(out, "{value}")?,
    }
    Ok(())
}

fn separate(index: usize, out: &mut String) {
    if index > 0 {
        out.push_str(", ");
    }
}

/// Appends `repr(text)`. Python prefers single quotes, and escapes invisible characters.
fn represent_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    // Templates that set `ensure_ascii` ask for the default here.
    let _: Option<Value> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    check_size(value, 0, &mut 0)?;
    let separators = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "`separators` must be two strings")),
    };
    let indent = indent.map(|spaces| " ".repeat(spaces.min(INDENT_MAX)));
    let formatter = PythonFormatter { separators, indent, depth: 0, is_empty: true };
    let mut bytes = Bounded(Vec::new());
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    let written = match sort_keys {
        Some(true) => serde_json::to_value(value).and_then(|mut value| {
            value.sort_all_objects();
            value.serialize(&mut serializer)
        }),
        _ => value.serialize(&mut serializer),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from(String::from_utf8_lossy(&bytes.0).into_owned()))
}

/// Python's layout of JSON: by default a space after each comma and colon.
struct PythonFormatter {
    /// The texts after an item and after a key.
    separators: (String, String),
    /// The indentation of one level; `None`: all on one line.
    indent: Option<String>,
    depth: usize,
    /// Whether the open list or object is still empty.
    is_empty: bool,
}

impl PythonFormatter {
    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.new_line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.separators.0.as_bytes())?;
        }
        self.is_empty = false;
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }
}

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.separators.1.as_bytes())
    }
}
