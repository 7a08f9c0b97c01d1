//! Parses the tool calls in an answer.
//!
//! Two formats are supported: `<tool_call>{"name": …, "arguments": …}</tool_call>` (Hermes, Qwen), and an answer that
//! consists of `{"name": …, "parameters": …}` alone (Llama 3). All other text is content.

use serde_json::{Value, json};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A tool call in OpenAI's format: the arguments are JSON text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Call {
    id: String,
    name: String,
    arguments: String,
}

/// Splits an answer into its text and its tool calls.
pub(super) fn parse(answer: &str) -> (String, Vec<Call>) {
    let mut words = String::new();
    let mut calls = Vec::new();
    let mut rest = answer;
    while let Some(at) = rest.find(OPEN) {
        let (before, inside) = (&rest[..at], &rest[at + OPEN.len()..]);
        // The last call may lack its closing tag, because the answer was cut off.
        let (inside, behind) = inside.split_once(CLOSE).unwrap_or((inside, ""));
        let Some(call) = call(inside, calls.len()) else {
            return (answer.to_owned(), Vec::new());
        };
        words.push_str(before);
        calls.push(call);
        rest = behind;
    }
    words.push_str(rest);
    if calls.is_empty()
        && let Some(call) = call(answer.trim().trim_start_matches("<|python_tag|>"), 0)
    {
        return (String::new(), vec![call]);
    }
    match calls.is_empty() {
        true => (answer.to_owned(), calls),
        false => (words.trim().to_owned(), calls),
    }
}

fn call(text: &str, number: usize) -> Option<Call> {
    let value: Value = serde_json::from_str(text.trim()).ok()?;
    let arguments = value.get("arguments").or(value.get("parameters"))?;
    let arguments = match arguments {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let id = format!("call_{:016x}{number}", exo_actors::fresh_seed());
    Some(Call { id, name: value["name"].as_str()?.to_owned(), arguments })
}

/// The calls as a whole message has them.
pub(super) fn whole(calls: &[Call]) -> Value {
    calls.iter().map(Call::json).collect()
}

/// The calls as a stream's delta has them, each with its index.
pub(super) fn deltas(calls: &[Call]) -> Value {
    let numbered = calls.iter().enumerate().map(|(index, call)| {
        let mut call = call.json();
        call["index"] = Value::from(index);
        call
    });
    numbered.collect()
}

impl Call {
    fn json(&self) -> Value {
        json!({
            "id": self.id, "type": "function", "function": { "name": self.name, "arguments": self.arguments }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(answer: &str) -> (String, Vec<(String, String)>) {
        let (words, calls) = parse(answer);
        (words, calls.into_iter().map(|call| (call.name, call.arguments)).collect())
    }

    fn pair(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn calls_are_parsed_and_other_text_is_kept() {
        let two = "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>";
        assert_eq!(read(two), ("I look.".to_owned(), vec![pair("f", "{\"a\":1}"), pair("g", "{}")]));
        let llama = "{\"name\": \"f\", \"parameters\": {\"a\": [1]}}";
        assert_eq!(read(llama), (String::new(), vec![pair("f", "{\"a\":[1]}")]));
        let cut = "<tool_call>{\"name\": \"f\", \"arguments\": {}}";
        assert_eq!(read(cut).1.len(), 1);
    }

    #[test]
    fn text_without_valid_calls_is_unchanged() {
        for words in ["plain", " {\"a\": 1} ", "<tool_call>nonsense</tool_call> x", "<tool_call>", ""] {
            assert_eq!(read(words), (words.to_owned(), Vec::new()), "{words}");
        }
    }
}
