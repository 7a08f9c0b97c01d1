//! The input of a chat template: messages, tools, and the template's own arguments.
//!
//! Field names are OpenAI's, which templates read.

use super::python::from_fields;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A conversation that a model is to continue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Conversation {
    /// The messages, oldest first.
    pub messages: Vec<Message>,
    /// Functions that the model may call, as JSON schemas.
    pub tools: Vec<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub arguments: Map<String, Value>,
}

/// How templates get the arguments of past calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallArguments {
    /// As objects, as Hugging Face's library passes them.
    Objects,
    /// As JSON text, as OpenAI's interface has them.
    Texts,
}

impl CallArguments {
    pub(super) const ALL: [Self; 2] = [Self::Objects, Self::Texts];
}

/// How templates get a message without content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NullContent {
    /// Without the key, as transformers 5 passes it, because many templates print `None`.
    Absent,
    /// As null.
    Null,
    /// As an empty text, for templates that append it without a question.
    Empty,
}

impl NullContent {
    pub(super) const ALL: [Self; 3] = [Self::Absent, Self::Null, Self::Empty];

    /// Null where the template asks for it, as DeepSeek's do to find messages of calls.
    pub(super) fn for_template(source: &str) -> Self {
        let asks = ["content is none", "content'] is none", "content\"] is none"];
        if asks.iter().any(|ask| source.contains(ask)) { Self::Null } else { Self::Absent }
    }
}

impl Conversation {
    /// Messages as templates read them. Reasoning appears under both its names.
    pub(super) fn values(&self, arguments: CallArguments, null_content: NullContent) -> Vec<minijinja::Value> {
        let value = |message: &Message| {
            let mut message = message.clone();
            for call in message.tool_calls.iter_mut().filter(|_| arguments == CallArguments::Texts) {
                let text = call.function.arguments.to_string();
                call.function.arguments = Value::from(text);
            }
            let Ok(Value::Object(mut fields)) = serde_json::to_value(&message) else {
                return minijinja::Value::from(());
            };
            match (&message.content, null_content) {
                (None, NullContent::Absent) => drop(fields.shift_remove("content")),
                (None, NullContent::Empty) => drop(fields.insert("content".to_owned(), Value::from(""))),
                _ => {}
            }
            let thought = message.reasoning_content.map(|thought| ("thinking".to_owned(), Value::from(thought)));
            from_fields(&thought.into_iter().chain(fields).collect())
        };
        self.messages.iter().map(value).collect()
    }
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The author.
    pub role: Role,
    /// The text; `None` where a client sends null, as for a message of calls only.
    #[serde(default)]
    pub content: Option<String>,
    /// The model's reasoning before this message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Functions that the model called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The id of the call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The name of the tool or the speaker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// Creates a message of text only.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: Some(content.into()),
            reasoning_content: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }
}

impl Message {
    /// The text; empty if there is none.
    pub fn text(&self) -> &str {
        self.content.as_deref().unwrap_or_default()
    }
}

/// The author of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The operator's instructions; `developer` is read as the same role.
    #[serde(alias = "developer")]
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// A function that the model called; the message is its result. `function` is OpenAI's older name of the role.
    #[serde(alias = "function")]
    Tool,
}

/// A function call of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The call's id, to which a tool's message refers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The kind of the call, `function` by default; `type` in JSON.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    /// The called function.
    pub function: FunctionCall,
}

fn function() -> String {
    "function".to_owned()
}

/// The name of the called function, and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// The function's name.
    pub name: String,
    /// An object, as templates expect it. JSON text, as OpenAI's clients send it, is parsed; blank text is an empty
    /// object; other text stays text.
    #[serde(deserialize_with = "object_or_text")]
    pub arguments: Value,
}

fn object_or_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match &value {
        // Clients send nothing for a call without arguments.
        Value::String(text) if text.trim().is_empty() => Ok(Value::Object(Map::new())),
        Value::String(text) => Ok(serde_json::from_str(text).unwrap_or(value)),
        _ => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_may_come_as_text() {
        let call = r#"{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": [1, 2]}"}}"#;
        let call: ToolCall = serde_json::from_str(call).expect("a call");
        assert_eq!(call.function.arguments, serde_json::json!({"a": [1, 2]}));
        let odd = r#"{"function": {"name": "f", "arguments": "not json"}}"#;
        let odd: ToolCall = serde_json::from_str(odd).expect("a call");
        let none: ToolCall = serde_json::from_str(r#"{"function": {"name": "f", "arguments": ""}}"#).expect("a call");
        assert_eq!(none.function.arguments, serde_json::json!({}));
        assert_eq!((odd.kind.as_str(), odd.function.arguments), ("function", Value::from("not json")));
    }
}
