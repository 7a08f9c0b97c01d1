//! Integers of any length, as Python has them.

use minijinja::Value;
use minijinja::value::{Object, ObjectRepr};
use std::fmt;
use std::sync::Arc;

/// An integer beyond 128 bits, by its digits. minijinja has no number for it.
#[derive(Debug, Clone)]
struct LongInteger(String);

impl Object for LongInteger {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The integer with these decimal digits, behind a minus sign or none; `None` for another text.
pub(super) fn integer(text: &str) -> Option<Value> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(match text.parse::<i128>() {
        Ok(integer) => Value::from(integer),
        Err(_) => Value::from_object(LongInteger(text.to_owned())),
    })
}

/// Whether a value is an integer beyond 128 bits.
pub(super) fn is_long(value: &Value) -> bool {
    value.downcast_object_ref::<LongInteger>().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_keep_their_digits() {
        let uint256 = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
        for text in ["0", "-7", "18446744073709551616", "-170141183460469231731687303715884105729", uint256] {
            let value = integer(text).expect("an integer");
            assert_eq!((value.to_string(), is_long(&value)), (text.to_owned(), text.len() > 38));
        }
        for text in ["", "-", "1.0", "1e5", "+1", "0x1"] {
            assert!(integer(text).is_none(), "{text}");
        }
    }
}
