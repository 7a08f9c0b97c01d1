//! The filter `tojson`: `json.dumps` with `ensure_ascii=False` by default, as transformers defines the filter.

use super::floats::{float, python_float};
use super::integers::is_long;
use super::text::check_size;
use super::{Bounded, OUTPUT_BYTES_MAX};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use std::io::Write as _;

/// The most characters of one level's indentation.
const INDENT_MAX: usize = 64;

/// How the JSON is written.
struct Style {
    ensure_ascii: bool,
    /// The indentation of one level; `None`: all on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`.
pub(super) fn to_json(
    state: &mut State<'_, '_>,
    value: &Value,
    ensure_ascii: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let style = Style::read(ensure_ascii, &options)?;
    options.assert_all_used()?;
    check_size(value, 0, &mut 0)?;
    let mut out = Bounded(Vec::new());
    style.write(value, 0, &mut out)?;
    state.consume_fuel(out.0.len() as u64 / 16)?;
    Ok(Value::from(String::from_utf8_lossy(&out.0).into_owned()))
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

impl Style {
    fn read(ensure_ascii: Option<Value>, options: &Kwargs) -> Result<Self, Error> {
        let named: Option<Value> = options.get("ensure_ascii")?;
        let indent: Option<Value> = options.get("indent")?;
        let indent = match indent.filter(|indent| !indent.is_none()) {
            None => None,
            Some(indent) => Some(match indent.as_str() {
                Some(text) => text.chars().take(INDENT_MAX).collect(),
                None => " ".repeat(usize::try_from(indent)?.min(INDENT_MAX)),
            }),
        };
        let separators: Option<Vec<String>> = options.get("separators")?;
        let (item_separator, key_separator) = match separators.as_deref() {
            None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            None => (", ".to_owned(), ": ".to_owned()),
            Some([item, key]) => (item.clone(), key.clone()),
            Some(_) => return Err(invalid("`separators` must be two strings")),
        };
        let sort_keys: Option<Value> = options.get("sort_keys")?;
        Ok(Self {
            ensure_ascii: named.or(ensure_ascii).is_some_and(|flag| flag.is_true()),
            indent,
            item_separator,
            key_separator,
            sort_keys: sort_keys.is_some_and(|flag| flag.is_true()),
        })
    }

    fn write(&self, value: &Value, depth: usize, out: &mut Bounded) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => put("null", out),
            ValueKind::Bool => put(if value.is_true() { "true" } else { "false" }, out),
            ValueKind::Number => put(&number(value), out),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_all(("[", "]"), &items, depth, out, |item, out| self.write(item, depth + 1, out))
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
                }
                self.write_all(("{", "}"), &entries, depth, out, |(key, value), out| {
                    self.write_text(key, out)?;
                    put(&self.key_separator, out)?;
                    self.write(value, depth + 1, out)
                })
            }
            _ if float(value).is_some() || is_long(value) => put(&number(value), out),
            kind => Err(invalid(format!("a value of the kind `{kind}` cannot be written as JSON"))),
        }
    }

    fn write_all<T>(
        &self,
        (open, close): (&str, &str),
        items: &[T],
        depth: usize,
        out: &mut Bounded,
        mut write: impl FnMut(&T, &mut Bounded) -> Result<(), Error>,
    ) -> Result<(), Error> {
        put(open, out)?;
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                put(&self.item_separator, out)?;
            }
            self.new_line(depth + 1, out)?;
            write(item, out)?;
        }
        if !items.is_empty() {
            self.new_line(depth, out)?;
        }
        put(close, out)
    }

    fn new_line(&self, depth: usize, out: &mut Bounded) -> Result<(), Error> {
        match &self.indent {
            Some(indent) => put(&format!("\n{}", indent.repeat(depth)), out),
            None => Ok(()),
        }
    }

    fn write_text(&self, text: &str, out: &mut Bounded) -> Result<(), Error> {
        let mut written = String::with_capacity(text.len() + 2);
        written.push('"');
        for c in text.chars() {
            match c {
                '"' => written.push_str("\\\""),
                '\\' => written.push_str("\\\\"),
                '\n' => written.push_str("\\n"),
                '\r' => written.push_str("\\r"),
                '\t' => written.push_str("\\t"),
                '\u{8}' => written.push_str("\\b"),
                '\u{c}' => written.push_str("\\f"),
                c if (c as u32) < 0x20 || self.ensure_ascii && !c.is_ascii() || c == '\u{7f}' && self.ensure_ascii => {
                    // A character beyond U+FFFF takes two escapes.
                    c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| written.push_str(&format!("\\u{unit:04x}")));
                }
                c => written.push(c),
            }
        }
        written.push('"');
        put(&written, out)
    }
}

fn put(text: &str, out: &mut Bounded) -> Result<(), Error> {
    out.write_all(text.as_bytes())
        .map_err(|_| Error::new(ErrorKind::WriteFailure, format!("the JSON is longer than {OUTPUT_BYTES_MAX} bytes")))
}

fn number(value: &Value) -> String {
    match float(value) {
        Some(number) if number.is_nan() => "NaN".to_owned(),
        Some(number) if number.is_infinite() => format!("{}Infinity", if number < 0.0 { "-" } else { "" }),
        Some(number) => python_float(number),
        None => value.to_string(),
    }
}

/// The text of a key: JSON has only strings as keys.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key)),
        kind => Err(invalid(format!("a key of the kind `{kind}` cannot be written as JSON"))),
    }
}
