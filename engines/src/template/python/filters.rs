//! Jinja's filters and global functions that minijinja lacks, or whose arguments or results differ from Jinja's.

use super::arguments::Arguments;
use super::methods::{WIDTH_MAX, padded};
use super::text::{check_length, string};
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::{filters as more, globals};
use std::collections::BTreeSet;

/// The most characters of one level's indentation.
const INDENT_MAX: usize = 256;

type Filtered = Result<Value, Error>;
/// A filter of minijinja on a list.
type ListFilter = fn(&State<'_, '_>, Value, Kwargs) -> Filtered;

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_filter("string", |value: &Value| string(value));
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    install_texts(environment);
    install_lists(environment);
    environment.add_function("cycler", |items: Rest<Value>| globals::cycler(items.0));
    environment.add_function("joiner", globals::joiner);
}

fn install_texts(environment: &mut Environment<'static>) {
    environment.add_filter("center", |value: &Value, given: Rest<Value>, named: Kwargs| -> Result<String, Error> {
        let mut given = Arguments::new(given, named, &["width"])?;
        Ok(padded(&string(value)?, given.count("width")?.unwrap_or(80), " ", "center"))
    });
    environment.add_filter("indent", indent);
    environment.add_filter("wordcount", |value: &Value| -> Result<usize, Error> {
        let text = string(value)?;
        Ok(text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count())
    });
    environment.add_filter("wordwrap", wordwrap);
    environment.add_filter("truncate", truncate);
    environment.add_filter("filesizeformat", more::filesizeformat);
    environment.add_filter("striptags", more::striptags);
    for name in ["escape", "e"] {
        environment.add_filter(name, |value: Value| if value.is_safe() { Ok(value) } else { escape(&value) });
    }
    environment.add_filter("forceescape", escape);
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("replace", replace);
    environment.add_filter("trim", |value: &Value, given: Rest<Value>, named: Kwargs| -> Result<String, Error> {
        let mut given = Arguments::new(given, named, &["chars"])?;
        let text = string(value)?;
        Ok(match given.text("chars")? {
            Some(chars) => {
                let chars: BTreeSet<char> = chars.chars().collect();
                text.trim_matches(|c| chars.contains(&c)).to_owned()
            }
            None => text.trim().to_owned(),
        })
    });
    environment.add_filter("upper", |value: &Value| string(value).map(|text| text.to_uppercase()));
    environment.add_filter("lower", |value: &Value| string(value).map(|text| text.to_lowercase()));
    environment.add_filter("title", |value: &Value| string(value).map(|text| filters::title(text.into())));
    environment.add_filter("capitalize", |value: &Value| -> Result<String, Error> {
        let text = string(value)?;
        let mut chars = text.chars();
        let first = chars.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
        Ok(first + &chars.as_str().to_lowercase())
    });
    environment.add_filter("join", join);
}

fn install_lists(environment: &mut Environment<'static>) {
    environment.add_filter(
        "batch",
        |state: &State<'_, '_>, value: Value, given: Rest<Value>, named: Kwargs| -> Filtered {
            let mut given = Arguments::new(given, named, &["linecount", "fill_with"])?;
            let count = given.count("linecount")?.unwrap_or(1);
            filters::batch(state, value, count.min(WIDTH_MAX), given.take("fill_with"))
        },
    );
    environment.add_filter("dictsort", |value: &Value, given: Rest<Value>, named: Kwargs| -> Filtered {
        filters::dictsort(value, Arguments::new(given, named, &["case_sensitive", "by", "reverse"])?.into_kwargs())
    });
    // minijinja takes the arguments of these filters by name only.
    let by_name: [(&str, ListFilter, &'static [&'static str]); 4] = [
        ("sort", filters::sort, &["reverse", "case_sensitive", "attribute"]),
        ("unique", filters::unique, &["case_sensitive", "attribute"]),
        ("min", filters::min, &["case_sensitive", "attribute"]),
        ("max", filters::max, &["case_sensitive", "attribute"]),
    ];
    for (name, filter, names) in by_name {
        let call = move |state: &State<'_, '_>, value: Value, given: Rest<Value>, named: Kwargs| -> Filtered {
            filter(state, value, Arguments::new(given, named, names)?.into_kwargs())
        };
        environment.add_filter(name, call);
    }
    environment.add_function("dict", |pairs: Option<Value>, named: Kwargs| -> Filtered {
        let mut entries = Vec::new();
        for pair in pairs.iter().filter(|pairs| pairs.kind() != ValueKind::Map).map(Value::try_iter) {
            for pair in pair? {
                entries.push((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?));
            }
        }
        if let Some(map) = pairs.filter(|pairs| pairs.kind() == ValueKind::Map) {
            for key in map.try_iter()? {
                entries.push((key.clone(), map.get_item(&key)?));
            }
        }
        for name in named.args() {
            entries.push((Value::from(name), named.get(name)?));
        }
        Ok(Value::from_pairs(entries))
    });
}

/// `replace(text, old, new, count=None)`.
fn replace(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let mut given = Arguments::new(given, named, &["old", "new", "count"])?;
    let (old, new) = (given.needed_text("old")?, given.needed_text("new")?);
    let count = given.count("count")?.unwrap_or(usize::MAX);
    let text = string(value)?;
    let found = text.matches(&old).take(count).count();
    check_length(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(text.replacen(&old, &new, count))
}

/// `join(list, d='', attribute=None)`.
fn join(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let mut given = Arguments::new(given, named, &["d", "attribute"])?;
    let separator = given.text("d")?.unwrap_or_default();
    let attribute = given.take("attribute");
    let mut joined = String::new();
    for (index, item) in value.try_iter()?.enumerate() {
        let item = match attribute.as_ref().map(|attribute| (attribute, attribute.as_str())) {
            None => item,
            Some((_, Some(path))) => path.split('.').try_fold(item, |item, name| item.get_attr(name))?,
            Some((key, None)) => item.get_item(key)?,
        };
        if index > 0 {
            joined.push_str(&separator);
        }
        joined.push_str(&string(&item)?);
        check_length(joined.len())?;
    }
    Ok(joined)
}

/// The length of what has one: 0 for an undefined value.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| Error::new(ErrorKind::InvalidOperation, format!("a {} has no length", value.kind())))
}

/// `default(value, default_value='', boolean=False)`.
fn default(value: Value, given: Rest<Value>, named: Kwargs) -> Filtered {
    let mut given = Arguments::new(given, named, &["default_value", "boolean"])?;
    let is_missing = value.is_undefined() || given.flag("boolean") && !value.is_true();
    let default = given.remove("default_value").unwrap_or_else(|| Value::from(""));
    Ok(if is_missing { default } else { value })
}

/// `int(value, default=0, base=10)`: the default for what is no number.
fn int(value: Value, given: Rest<Value>, named: Kwargs) -> Filtered {
    let mut given = Arguments::new(given, named, &["default", "base"])?;
    let default = given.take("default").unwrap_or_else(|| Value::from(0));
    let base = given.count("base")?.and_then(|base| u32::try_from(base).ok()).unwrap_or(10);
    let Some(text) = value.as_str() else {
        let whole = i128::try_from(value.clone()).ok();
        let whole = whole.or_else(|| super::floats::float(&value).filter(|x| x.is_finite()).map(|x| x as i128));
        let whole = whole.or_else(|| (value.kind() == ValueKind::Bool).then(|| i128::from(value.is_true())));
        return Ok(whole.map_or(default, Value::from));
    };
    let text = text.trim().replace('_', "");
    let digits = match base {
        16 => text.trim_start_matches("0x"),
        8 => text.trim_start_matches("0o"),
        2 => text.trim_start_matches("0b"),
        3..=36 => text.as_str(),
        _ => return Ok(default),
    };
    let whole = i128::from_str_radix(digits, base).ok();
    let whole =
        whole.or_else(|| text.parse::<f64>().ok().filter(|number| number.is_finite()).map(|number| number as i128));
    Ok(whole.map_or(default, Value::from))
}

/// `float(value, default=0.0)`: the default for what is no number.
fn float(value: Value, given: Rest<Value>, named: Kwargs) -> Filtered {
    let mut given = Arguments::new(given, named, &["default"])?;
    let default = given.take("default").unwrap_or_else(|| Value::from(0.0));
    let number = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => super::floats::float(&value).or_else(|| f64::try_from(value).ok()),
    };
    Ok(number.map_or(default, Value::from))
}

/// `indent(text, width=4, first=False, blank=False)`.
fn indent(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let mut given = Arguments::new(given, named, &["width", "first", "blank"])?;
    let (first, blank) = (given.flag("first"), given.flag("blank"));
    let indentation = match given.take("width") {
        None => "    ".to_owned(),
        Some(width) => match width.as_str() {
            Some(text) => text.chars().take(INDENT_MAX).collect(),
            None => " ".repeat(usize::try_from(width)?.min(INDENT_MAX)),
        },
    };
    let text = string(value)?;
    let mut indented = String::with_capacity(text.len());
    for (number, line) in text.split('\n').enumerate() {
        if number > 0 {
            indented.push('\n');
        }
        let is_indented = if number == 0 { first } else { blank || !line.is_empty() };
        if is_indented {
            indented.push_str(&indentation);
        }
        indented.push_str(line);
        check_length(indented.len())?;
    }
    Ok(indented)
}

/// `wordwrap(text, width=79, break_long_words=True, wrapstring='\n')`, line by line.
fn wordwrap(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let mut given = Arguments::new(given, named, &["width", "break_long_words", "wrapstring"])?;
    let width = given.count("width")?.unwrap_or(79).clamp(1, WIDTH_MAX);
    let breaks = given.take("break_long_words").is_none_or(|flag| flag.is_true());
    let end = given.text("wrapstring")?.unwrap_or_else(|| "\n".to_owned());
    let text = string(value)?;
    let mut wrapped: Vec<String> = Vec::new();
    for line in text.lines() {
        let mut current = String::new();
        let mut used = 0;
        for word in line.split(' ') {
            let length = word.chars().count();
            if used > 0 && used + 1 + length > width {
                wrapped.push(std::mem::take(&mut current));
                used = 0;
            } else if used > 0 {
                current.push(' ');
                used += 1;
            }
            for c in word.chars() {
                if breaks && used == width {
                    wrapped.push(std::mem::take(&mut current));
                    used = 0;
                }
                current.push(c);
                used += 1;
            }
        }
        wrapped.push(current);
    }
    check_length(text.len().saturating_add(wrapped.len().saturating_mul(end.len())))?;
    Ok(wrapped.join(&end))
}

/// `truncate(text, length=255, killwords=False, end='...', leeway=5)`.
fn truncate(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let mut given = Arguments::new(given, named, &["length", "killwords", "end", "leeway"])?;
    let length = given.count("length")?.unwrap_or(255);
    let leeway = given.count("leeway")?.unwrap_or(5);
    let (killwords, end) = (given.flag("killwords"), given.text("end")?.unwrap_or_else(|| "...".to_owned()));
    let text = string(value)?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
    let kept = if killwords { kept.as_str() } else { kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words) };
    Ok(format!("{kept}{end}"))
}

/// HTML's five special characters, as markupsafe writes them.
fn escape(value: &Value) -> Filtered {
    let text = string(value)?;
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&#34;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    Ok(Value::from_safe_string(escaped))
}

/// A text quoted for a path, or the query of a map or of pairs.
fn urlencode(value: &Value) -> Result<String, Error> {
    let quoted = |text: &str, space: &str, safe: &str| -> String {
        let byte = |byte: u8| match byte {
            b' ' => space.to_owned(),
            byte if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || safe.as_bytes().contains(&byte) => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        };
        text.bytes().map(byte).collect()
    };
    let pairs: Vec<(Value, Value)> = match value.kind() {
        ValueKind::Map => {
            let entry = |key: Value| Ok((key.clone(), value.get_item(&key)?));
            value.try_iter()?.map(entry).collect::<Result<_, Error>>()?
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let pair = |pair: Value| Ok((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?));
            value.try_iter()?.map(pair).collect::<Result<_, Error>>()?
        }
        _ => return Ok(quoted(&string(value)?, "%20", "/")),
    };
    let part = |(key, value): &(Value, Value)| -> Result<String, Error> {
        Ok(format!("{}={}", quoted(&string(key)?, "+", ""), quoted(&string(value)?, "+", "")))
    };
    Ok(pairs.iter().map(part).collect::<Result<Vec<_>, _>>()?.join("&"))
}
