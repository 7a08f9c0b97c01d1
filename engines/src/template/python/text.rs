//! `str(value)` and `repr(value)`.

use super::OUTPUT_BYTES_MAX;
use super::floats::{float, python_float};
use minijinja::value::{Enumerator, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};

/// The most levels of nested lists and maps. Deeper ones serve only to overflow a stack.
const DEPTH_MAX: usize = 64;
/// Elements of a value, nested ones included. A list that holds another list twice doubles them at each level.
const ELEMENTS_MAX: usize = 1 << 20;

/// Prints what `{{ value }}` prints: `str(value)`.
pub(super) fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if !is_container(value) && float(value).is_none() {
        return minijinja::escape_formatter(out, state, value);
    }
    let text = string(value)?;
    state.consume_fuel(text.len() as u64 / 16)?;
    out.write_str(&text).map_err(Error::from)
}

/// `str(value)`: strings as they are, other values as `repr` has them.
pub(super) fn string(value: &Value) -> Result<String, Error> {
    if !is_container(value) {
        return Ok(float(value).map_or_else(|| value.to_string(), python_float));
    }
    check_size(value, 0, &mut 0)?;
    let mut text = String::new();
    represent(value, &mut text)?;
    Ok(text)
}

/// Fails before a text is made that would be longer than any output.
pub(super) fn check_length(bytes: usize) -> Result<(), Error> {
    match bytes > OUTPUT_BYTES_MAX {
        true => Err(Error::new(ErrorKind::OutOfFuel, format!("a text of {bytes} bytes is too long"))),
        false => Ok(()),
    }
}

/// Whether a value is a list, tuple, map or view of one. Objects such as macros print as minijinja has them.
fn is_container(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => true,
        // A range prints as a list of its numbers.
        ValueKind::Iterable => {
            value.as_object().is_some_and(|object| !matches!(object.enumerate(), Enumerator::NonEnumerable))
        }
        _ => false,
    }
}

/// Fails if a value is too deep or too large to be written. `elements` counts the elements so far.
pub(super) fn check_size(value: &Value, depth: usize, elements: &mut usize) -> Result<(), Error> {
    *elements += 1;
    if depth > DEPTH_MAX || *elements > ELEMENTS_MAX {
        let what = format!("a value has more than {DEPTH_MAX} levels or {ELEMENTS_MAX} elements");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.try_for_each(|item| check_size(&item, depth + 1, elements))
        }
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
        ValueKind::String => represent_text(value.as_str().unwrap_or_default(), out),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Seq if value.is_tuple() => {
            out.push('(');
            let count = represent_items(value, out)?;
            out.push_str(if count == 1 { ",)" } else { ")" });
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            represent_items(value, out)?;
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
        _ => out.push_str(&float(value).map_or_else(|| value.to_string(), python_float)),
    }
    Ok(())
}

fn represent_items(value: &Value, out: &mut String) -> Result<usize, Error> {
    let mut count = 0;
    for item in value.try_iter()? {
        separate(count, out);
        represent(&item, out)?;
        count += 1;
    }
    Ok(count)
}

fn separate(index: usize, out: &mut String) {
    if index > 0 {
        out.push_str(", ");
    }
}

/// Appends `repr(text)`. Python prefers single quotes, and escapes what cannot be seen.
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
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match c as u32 {
                code @ 0..=0xff => format!("\\x{code:02x}"),
                code @ 0x100..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

/// `str.isprintable` of one character, except in rare scripts: controls, format characters, private use, and
/// separators except the space are not printable.
pub(super) fn is_printable(c: char) -> bool {
    let is_hidden = matches!(c,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'..='\u{10ffff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || is_hidden)
}
