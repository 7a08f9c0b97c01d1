//! JSON as a template's values.

use super::floats::{ExponentFloat, python_float};
use super::integers::integer;
use minijinja::Value;
use serde_json::{Map, Value as Json};

/// The value of JSON. Objects keep the order of their keys.
pub(in crate::template) fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect::<Vec<Value>>().into(),
        Json::Object(fields) => from_fields(fields),
        Json::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(whole), ..) => Value::from(whole),
            (_, Some(whole), _) => Value::from(whole),
            (.., float) => {
                let text = number.to_string();
                if let Some(integer) = integer(&text) {
                    return integer;
                }
                let float = float.or_else(|| text.parse().ok()).unwrap_or(f64::NAN);
                let has_exponent = python_float(float).contains('e');
                if has_exponent { Value::from_object(ExponentFloat(float)) } else { Value::from(float) }
            }
        },
    }
}

/// The value of an object's fields.
pub(in crate::template) fn from_fields(fields: &Map<String, Json>) -> Value {
    Value::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), from_json(value))))
}
