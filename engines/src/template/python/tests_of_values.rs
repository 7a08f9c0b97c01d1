//! Jinja's tests (`value is iterable`), where minijinja's differ.

use super::floats::float;
use super::integers::is_long;
use minijinja::value::ValueKind;
use minijinja::{Environment, Value};

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool) || float(value).is_some() || is_long(value)
    });
    environment.add_test("integer", |value: &Value| value.is_integer() || is_long(value));
    environment.add_test("float", |value: &Value| float(value).is_some());
    environment.add_test("callable", |value: &Value| {
        matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined) && float(value).is_none() && !is_long(value)
    });
    environment
        .add_test("lower", |value: &Value| value.as_str().is_some_and(|text| has_one_case(text, char::is_lowercase)));
    environment
        .add_test("upper", |value: &Value| value.as_str().is_some_and(|text| has_one_case(text, char::is_uppercase)));
}

/// Whether `iter(value)` works. Templates ask it of `tools`, which may be none.
fn is_iterable(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Undefined => true,
        ValueKind::Plain => value.try_iter().is_ok(),
        _ => false,
    }
}

/// Whether a value has a length and items.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// `str.islower` and `str.isupper`: at least one letter has a case, and all that have one have this case.
pub(super) fn has_one_case(text: &str, is_case: fn(char) -> bool) -> bool {
    let mut cased = text.chars().filter(|c| c.is_lowercase() || c.is_uppercase()).peekable();
    cased.peek().is_some() && cased.all(is_case)
}
