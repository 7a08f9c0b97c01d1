//! Methods of Python's strings, lists, maps and numbers that minijinja-contrib lacks, or has with other results.

use super::floats::float;
use super::tests_of_values::has_one_case;
use super::text::{check_length, is_printable};
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use std::collections::BTreeSet;

/// The most characters of a padded field; also the limit of other widths and counts.
pub(super) const WIDTH_MAX: usize = 4096;

/// Calls a method of a value.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => of_text(value.as_str().unwrap_or_default(), method, arguments)?,
        ValueKind::Seq | ValueKind::Iterable => of_list(value, method, arguments)?,
        ValueKind::Map if method == "copy" => Some(value.clone()),
        ValueKind::Number if method == "is_integer" => Some(Value::from(float(value).is_none_or(|x| x.fract() == 0.0))),
        ValueKind::Number if method == "bit_length" => {
            let number = i128::try_from(value.clone())?.unsigned_abs();
            Some(Value::from(u128::BITS - number.leading_zeros()))
        }
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, method, arguments),
    }
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

fn of_text(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    match ask_text(text, method, arguments)? {
        Some(answer) => Ok(Some(answer)),
        None => change_text(text, method, arguments),
    }
}

/// The methods that make another text, or parts of the text.
fn change_text(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let result = match method {
        "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => {
            let swapped = text.chars().map(|c| match c.is_uppercase() {
                true => c.to_lowercase().to_string(),
                false => c.to_uppercase().to_string(),
            });
            Value::from(swapped.collect::<String>())
        }
        "center" | "ljust" | "rjust" => pad(text, method, arguments)?,
        "zfill" => {
            let (width,): (usize,) = from_args(arguments)?;
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing(text, width))))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let is_first = method == "partition";
            let cut = if is_first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match cut {
                Some((before, behind)) => [before, separator, behind],
                None if is_first => [text, "", ""],
                None => ["", "", text],
            };
            Value::from_object(Tuple::from(parts.map(Value::from)))
        }
        "split" | "rsplit" => split(text, method, arguments)?,
        "splitlines" => {
            let (keeps, options): (Option<bool>, Kwargs) = from_args(arguments)?;
            let named: Option<bool> = options.get("keepends")?;
            options.assert_all_used()?;
            lines(text, named.or(keeps).unwrap_or(false))
        }
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(arguments)?;
            let chars: Option<BTreeSet<char>> = chars.map(|chars| chars.chars().collect());
            let is_cut = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(&c));
            let start = if method == "rstrip" { text } else { text.trim_start_matches(is_cut) };
            Value::from(if method == "lstrip" { start } else { start.trim_end_matches(is_cut) })
        }
        "title" => Value::from(title(text)),
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(arguments)?;
            Value::from(expand_tabs(text, size.unwrap_or(8).min(WIDTH_MAX))?)
        }
        "join" => {
            let (items,): (&Value,) = from_args(arguments)?;
            let items: Vec<Value> = items.try_iter()?.collect();
            match items.iter().map(Value::as_str).collect::<Option<Vec<&str>>>() {
                Some(texts) => {
                    let separators = texts.len().saturating_mul(text.len());
                    check_length(texts.iter().fold(separators, |sum, part| sum.saturating_add(part.len())))?;
                    Value::from(texts.join(text))
                }
                None => return Err(invalid("`join` takes strings only")),
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// The methods that ask something of the text.
fn ask_text(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let answer = match method {
        "index" | "rindex" | "find" | "rfind" => {
            let (needle, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (part, offset) = range(text, start, end);
            let found = if method.starts_with('r') { part.rfind(needle) } else { part.find(needle) };
            match found {
                Some(at) => Value::from(offset + part[..at].chars().count()),
                None if method.ends_with("find") => Value::from(-1),
                None => return Err(invalid("the substring is not there")),
            }
        }
        "count" => {
            let (needle, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (part, _) = range(text, start, end);
            // An empty string is found before each character, and at the end.
            Value::from(if needle.is_empty() { part.chars().count() + 1 } else { part.matches(needle).count() })
        }
        "islower" => Value::from(has_one_case(text, char::is_lowercase)),
        "isupper" => Value::from(has_one_case(text, char::is_uppercase)),
        "isnumeric" => Value::from(all(text, char::is_numeric)),
        "isdecimal" => Value::from(all(text, |c| c.is_numeric() && !is_not_decimal(c))),
        "isdigit" => Value::from(all(text, |c| c.is_numeric() && !is_not_digit(c))),
        "isidentifier" => {
            let starts = text.starts_with(|c: char| c.is_alphabetic() || c == '_');
            Value::from(starts && text.chars().all(|c| c.is_alphanumeric() || c == '_'))
        }
        "isprintable" => Value::from(text.chars().all(is_printable)),
        "startswith" | "endswith" => {
            let (affixes, start, end): (&Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (part, _) = range(text, start, end);
            let is_there = |affix: &str| match method {
                "startswith" => part.starts_with(affix),
                _ => part.ends_with(affix),
            };
            Value::from(match affixes.as_str() {
                Some(affix) => is_there(affix),
                None => affixes.try_iter()?.any(|affix| affix.as_str().is_some_and(is_there)),
            })
        }
        "isalpha" => Value::from(all(text, char::is_alphabetic)),
        "isalnum" => Value::from(all(text, char::is_alphanumeric)),
        "isspace" => Value::from(all(text, is_space)),
        "istitle" => Value::from(!text.is_empty() && title(text) == text && text.chars().any(char::is_uppercase)),
        _ => return Ok(None),
    };
    Ok(Some(answer))
}

fn of_list(value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            at.map(|at| Some(Value::from(at))).ok_or_else(|| invalid("the value is not in the list"))
        }
        "count" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            Ok(Some(Value::from(value.try_iter()?.filter(|item| item == wanted).count())))
        }
        "copy" => Ok(Some(Value::from(value.try_iter()?.collect::<Vec<Value>>()))),
        _ => Ok(None),
    }
}

fn all(text: &str, is: fn(char) -> bool) -> bool {
    !text.is_empty() && text.chars().all(is)
}

/// Numeric characters that are not decimal: superscripts, circled numbers, and those of [`is_not_digit`].
fn is_not_decimal(c: char) -> bool {
    matches!(c, '\u{b2}' | '\u{b3}' | '\u{b9}' | '\u{2070}'..='\u{2089}' | '\u{2460}'..='\u{249b}') || is_not_digit(c)
}

/// Numeric characters that are no digits: fractions, Roman numerals, ideographs.
fn is_not_digit(c: char) -> bool {
    matches!(c, '\u{bc}'..='\u{be}' | '\u{2150}'..='\u{2189}' | '\u{3007}' | '\u{3021}'..='\u{3029}' | '\u{4e00}'..='\u{9fff}')
}

/// `str.isspace` of one character.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// How many characters `text` lacks to the width, which counts as at most [`WIDTH_MAX`].
fn missing(text: &str, width: usize) -> usize {
    width.min(WIDTH_MAX).saturating_sub(text.chars().count())
}

fn pad(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(arguments)?;
    let fill = fill.unwrap_or(" ");
    if fill.chars().count() != 1 {
        return Err(invalid("the fill must be one character"));
    }
    Ok(Value::from(padded(text, width, fill, method)))
}

/// Pads a text as `center`, `ljust` or `rjust` do.
pub(super) fn padded(text: &str, width: usize, fill: &str, method: &str) -> String {
    let missing = missing(text, width);
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        // As CPython rounds.
        _ => missing / 2 + (missing & width & 1),
    };
    format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left))
}

fn split(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (separator, limit, options): (Option<Value>, Option<i64>, Kwargs) = from_args(arguments)?;
    let separator = options.get::<Option<Value>>("sep")?.or(separator).filter(|separator| !separator.is_none());
    let limit = options.get::<Option<i64>>("maxsplit")?.or(limit).unwrap_or(-1);
    options.assert_all_used()?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let from_right = method == "rsplit";
    let mut parts: Vec<&str> = match separator.as_ref().map(Value::as_str) {
        None => split_at_spaces(text, limit, from_right),
        Some(None) => return Err(invalid("the separator must be a string")),
        Some(Some("")) => return Err(invalid("the separator is empty")),
        Some(Some(separator)) if from_right => text.rsplitn(limit.saturating_add(1), separator).collect(),
        Some(Some(separator)) => text.splitn(limit.saturating_add(1), separator).collect(),
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// The words of a text; from the right, the last word comes first.
fn split_at_spaces(text: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    // The last part keeps the spaces behind it where the limit is reached.
    let mut rest = if from_right { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut.filter(|_| parts.len() < limit) else {
            parts.push(rest);
            break;
        };
        if from_right {
            parts.push(rest[at..].trim_start_matches(is_space));
            rest = rest[..at].trim_end_matches(is_space);
        } else {
            parts.push(&rest[..at]);
            rest = rest[at..].trim_start_matches(is_space);
        }
    }
    parts
}

fn lines(text: &str, keeps_ends: bool) -> Value {
    let is_end = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find(is_end);
        let end = match at.map(|at| &rest[at..]) {
            None => 0,
            Some(end) if end.starts_with("\r\n") => 2,
            Some(end) => end.chars().next().map_or(0, char::len_utf8),
        };
        let at = at.unwrap_or(rest.len());
        lines.push(Value::from(&rest[..if keeps_ends { at + end } else { at }]));
        rest = &rest[at + end..];
    }
    Value::from(lines)
}

/// The part of a text that `start` and `end` name, and its offset, in characters. Negative: from the end.
fn range(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    let length = text.chars().count() as i64;
    let place = |at: i64| if at < 0 { (length + at).max(0) } else { at.min(length) };
    let start = place(start.unwrap_or(0));
    let end = place(end.unwrap_or(length)).max(start);
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    (&text[byte(start)..byte(end)], start as usize)
}

/// `str.title`: a letter after a character that is no letter begins a word.
fn title(text: &str) -> String {
    let mut within = false;
    let mut titled = String::with_capacity(text.len());
    for c in text.chars() {
        match within {
            true => titled.extend(c.to_lowercase()),
            false => titled.extend(c.to_uppercase()),
        }
        within = c.is_alphabetic();
    }
    titled
}

fn expand_tabs(text: &str, size: usize) -> Result<String, Error> {
    let (mut expanded, mut column) = (String::new(), 0);
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                expanded.push_str(&" ".repeat(spaces));
                check_length(expanded.len())?;
                column += spaces;
            }
            '\t' => {}
            c => {
                expanded.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(expanded)
}
