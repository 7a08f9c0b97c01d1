//! Parses calls of tools in an answer's words.
//!
//! | families | format |
//! |---|---|
//! | Hermes, Qwen | `<tool_call>{"name": …, "arguments": …}</tool_call>` |
//! | Qwen 3 Coder | `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` |
//! | Mistral | `[TOOL_CALLS][{"name": …, "arguments": …}]`, `[TOOL_CALLS]NAME[ARGS]{…}` |
//! | Phi, Granite | `<|tool_call|>[{"name": …, "arguments": …}]<|/tool_call|>` |
//! | Llama 3 | `{"name": …, "parameters": …}` alone, with or without `<|python_tag|>` before it |
//!
//! Everything else is text.

use super::{Delta, held_back};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// A call of a tool. The arguments are JSON text, as OpenAI's interface has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The tool's name.
    pub name: String,
    /// A JSON object, or the text that the model wrote as its arguments.
    pub arguments: String,
}

impl Call {
    pub(super) fn new(name: String, arguments: String) -> Self {
        Self { name, arguments }
    }
}

/// Whether a text is a JSON object, as arguments are.
pub(super) fn is_object(text: &str) -> bool {
    serde_json::from_str::<Map<String, Value>>(text).is_ok()
}

/// The types of the tools' parameters: by tool, then by parameter.
#[derive(Debug, Clone, Default)]
pub(super) struct ToolTypes(BTreeMap<String, BTreeMap<String, Value>>);

impl ToolTypes {
    pub(super) fn of(tools: &[Value]) -> Self {
        let tool = |tool: &Value| {
            let function = tool.get("function")?;
            let properties = function["parameters"]["properties"].as_object().cloned().unwrap_or_default();
            let types = properties.into_iter().map(|(name, schema)| (name, schema["type"].clone()));
            Some((function["name"].as_str()?.to_owned(), types.collect()))
        };
        Self(tools.iter().filter_map(tool).collect())
    }

    /// The value that a parameter's text stands for: text where the schema says so, or where the text is not JSON.
    fn value(&self, tool: &str, parameter: &str, text: &str) -> Value {
        let kind = self.0.get(tool).and_then(|types| types.get(parameter));
        let is_text =
            |kind: &Value| kind == "string" || kind.as_array().is_some_and(|kinds| kinds.contains(&"string".into()));
        match kind.is_some_and(is_text) {
            true => Value::from(text),
            false => serde_json::from_str(text).unwrap_or_else(|_| Value::from(text)),
        }
    }
}

/// The markers around calls.
#[derive(Debug, Clone, Copy)]
struct Markers {
    open: &'static str,
    /// `None`: the calls end with the answer, or at the next opening marker.
    close: Option<&'static str>,
}

const MARKERS: [Markers; 4] = [
    Markers { open: "<tool_call>", close: Some("</tool_call>") },
    Markers { open: "<|tool_call|>", close: Some("<|/tool_call|>") },
    Markers { open: "[TOOL_CALLS]", close: None },
    Markers { open: "<|python_tag|>", close: None },
];
const OPENS: [&str; 4] = [MARKERS[0].open, MARKERS[1].open, MARKERS[2].open, MARKERS[3].open];

/// Splits streamed words into text and calls.
#[derive(Debug)]
pub(super) struct CallStream {
    tools: ToolTypes,
    state: State,
    /// Text that is not parsed yet.
    held: String,
    /// Whitespace at the end of the text. It is shown before further text, or at the end of an answer without calls.
    blank: String,
    has_calls: bool,
    has_words: bool,
    /// How many bytes of `held` were searched for the closing marker.
    searched: usize,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Before any text but whitespace: the answer may be one JSON object.
    Start,
    Words,
    Calls(Markers),
    /// The answer begins as a call in bare JSON. It is parsed at its end.
    Json,
}

impl CallStream {
    pub(super) fn new(tools: ToolTypes) -> Self {
        let (held, blank) = (String::new(), String::new());
        Self { tools, state: State::Start, held, blank, has_calls: false, has_words: false, searched: 0 }
    }

    /// Adds words. Returns text and calls that can be told now.
    pub(super) fn push(&mut self, words: &str) -> Vec<Delta> {
        self.held.push_str(words);
        let mut deltas = Vec::new();
        loop {
            match self.state {
                State::Json => return deltas,
                State::Start => match begins_json(self.held.trim_start()) {
                    None => return deltas,
                    Some(true) => self.state = State::Json,
                    Some(false) => self.state = State::Words,
                },
                State::Words => {
                    let open = MARKERS.iter().filter_map(|markers| Some((self.held.find(markers.open)?, markers)));
                    let Some((at, markers)) = open.min_by_key(|(at, _)| *at) else {
                        let shown = self.held.len() - held_back(&self.held, &OPENS);
                        let text: String = self.held.drain(..shown).collect();
                        deltas.extend(self.text(&text));
                        return deltas;
                    };
                    let text: String = self.held.drain(..at).collect();
                    deltas.extend(self.text(&text));
                    self.held.drain(..markers.open.len());
                    self.state = State::Calls(*markers);
                }
                State::Calls(markers) => {
                    let end = markers.close.unwrap_or(markers.open);
                    let from = self.held.floor_char_boundary(self.searched.saturating_sub(end.len()));
                    let Some(at) = self.held[from..].find(end).map(|at| from + at) else {
                        self.searched = self.held.len();
                        return deltas;
                    };
                    self.searched = 0;
                    let inside: String = self.held.drain(..at).collect();
                    if markers.close.is_some() {
                        self.held.drain(..end.len());
                    }
                    deltas.extend(self.calls(markers, &inside, markers.close));
                    self.state = State::Words;
                }
            }
        }
    }

    /// Ends the words. A call that lacks its closing marker counts if it is whole.
    pub(super) fn finish(&mut self) -> Vec<Delta> {
        let held = std::mem::take(&mut self.held);
        let mut deltas = match self.state {
            State::Calls(markers) => self.calls(markers, held.trim_end(), None),
            State::Json => match self.parse(&held) {
                Some(calls) => self.found(calls),
                None => self.text(&held).into_iter().collect(),
            },
            State::Start | State::Words => self.text(&held).into_iter().collect(),
        };
        let blank = std::mem::take(&mut self.blank);
        if !self.has_calls && !blank.is_empty() {
            deltas.push(Delta::Words(blank));
        }
        deltas
    }

    /// Text for the user. Whitespace at its end waits, because calls are set off by it.
    fn text(&mut self, text: &str) -> Option<Delta> {
        let mut all = std::mem::take(&mut self.blank);
        all.push_str(text);
        let length = all.trim_end().len();
        self.blank = all.split_off(length);
        if all.is_empty() {
            return None;
        }
        // Whitespace between a call and the first text is dropped.
        let words = if self.has_calls && !self.has_words { all.trim_start().to_owned() } else { all };
        self.has_words = true;
        Some(Delta::Words(words))
    }

    /// The calls between markers, or the text as it is if they cannot be parsed.
    fn calls(&mut self, markers: Markers, inside: &str, close: Option<&str>) -> Vec<Delta> {
        match self.parse(inside) {
            Some(calls) => self.found(calls),
            None => self.text(&format!("{}{inside}{}", markers.open, close.unwrap_or_default())).into_iter().collect(),
        }
    }

    fn found(&mut self, calls: Vec<Call>) -> Vec<Delta> {
        self.has_calls = true;
        calls.into_iter().map(Delta::Call).collect()
    }

    fn parse(&self, text: &str) -> Option<Vec<Call>> {
        let text = text.trim();
        if let Some(function) = text.strip_prefix("<function=") {
            return Some(vec![self.xml_call(function)?]);
        }
        if let Ok(value) = serde_json::from_str::<Value>(text) {
            return match value {
                Value::Array(calls) if !calls.is_empty() => calls.iter().map(json_call).collect(),
                value => Some(vec![json_call(&value)?]),
            };
        }
        // Mistral's newer form: the name, then the arguments.
        let cut = text.find("[ARGS]").or_else(|| text.find('{'))?;
        let (name, arguments) = (text[..cut].trim(), text[cut..].trim_start_matches("[ARGS]").trim());
        let is_name = !name.is_empty() && !name.contains(char::is_whitespace);
        (is_name && is_object(arguments)).then(|| vec![Call::new(name.to_owned(), arguments.to_owned())])
    }

    /// `NAME>` with parameters as tags.
    fn xml_call(&self, text: &str) -> Option<Call> {
        let (name, mut rest) = text.split_once('>')?;
        let mut arguments = Map::new();
        while let Some((_, parameter)) = rest.split_once("<parameter=") {
            let (key, behind) = parameter.split_once('>')?;
            let (value, behind) = behind.split_once("</parameter>")?;
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            arguments.insert(key.to_owned(), self.tools.value(name, key, value));
            rest = behind;
        }
        Some(Call::new(name.to_owned(), Value::Object(arguments).to_string()))
    }
}

/// Whether a text begins as a call in bare JSON, `{"name"`; `None` while more text decides.
fn begins_json(text: &str) -> Option<bool> {
    let mut expected = "{\"name\"".chars().peekable();
    for c in text.chars() {
        match expected.peek() {
            None => return Some(true),
            Some(&next) if next == c => drop(expected.next()),
            Some('"') if c.is_whitespace() => {}
            Some(_) => return Some(false),
        }
    }
    if expected.peek().is_none() { Some(true) } else { None }
}

fn json_call(value: &Value) -> Option<Call> {
    let arguments = match value.get("arguments").or(value.get("parameters"))? {
        Value::String(text) if text.trim().is_empty() => "{}".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Some(Call::new(value["name"].as_str()?.to_owned(), arguments))
}
