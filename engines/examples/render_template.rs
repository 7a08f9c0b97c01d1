//! Renders chat templates for a comparison with Hugging Face's own rendering: see
//! `engines/tests/fixtures/templates/compare.py`.
//!
//! Reads one JSON object a line on stdin: `{"template", "bos_token", "eos_token", "messages", "tools",
//! "add_generation_prompt", "now"}`. Writes one a line on stdout: `{"text"}` or `{"error"}`.

use chrono::NaiveDateTime;
use exo_engines::template::{ChatTemplate, Conversation, Message};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::{BufRead, Write};

#[derive(Deserialize)]
struct Case {
    template: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    add_generation_prompt: bool,
    #[serde(default)]
    arguments: serde_json::Map<String, Value>,
    now: String,
}

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let rendered = match serde_json::from_str::<Case>(&line?) {
            Ok(case) => render(case),
            Err(error) => Err(format!("the case cannot be decoded: {error}")),
        };
        let answer = match rendered {
            Ok(text) => json!({ "text": text }),
            Err(error) => json!({ "error": error }),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn render(case: Case) -> Result<String, String> {
    let template = ChatTemplate::new(&case.template, case.bos_token.as_deref(), case.eos_token.as_deref());
    let now: NaiveDateTime = case.now.parse().map_err(|error| format!("`now`: {error}"))?;
    let mut arguments = case.arguments;
    arguments.insert("add_generation_prompt".to_owned(), Value::from(case.add_generation_prompt));
    let conversation = Conversation { messages: case.messages, tools: case.tools.unwrap_or_default(), arguments };
    let rendered = template.and_then(|template| template.render(&conversation, now));
    rendered.map_err(|error| error.to_string())
}
