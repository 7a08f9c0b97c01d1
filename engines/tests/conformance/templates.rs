//! R4.1: compares chat templates with Hugging Face's own rendering (`fixtures/templates/make.py`).

use crate::fixtures;
use exo_engines::template::{ChatTemplate, Conversation, TemplateError};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Cases {
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    #[serde(flatten)]
    given: Conversation,
    expected: Option<String>,
    /// The text of the exception that the template raises instead.
    refusal: Option<String>,
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let text = std::fs::read_to_string(fixtures().join("templates/cases.json")).expect("the cases are there");
    let cases: Cases = serde_json::from_str(&text).expect("as make.py writes them");
    let mut wrong = Vec::new();
    for case in &cases.cases {
        let template = ChatTemplate::new(&cases.templates[&case.template], Some("<s>"), Some("</s>"));
        let got = template.and_then(|template| template.render(&case.given, chrono::NaiveDateTime::default()));
        let expected = match (&case.expected, &case.refusal) {
            (Some(text), _) => Ok(text.clone()),
            (None, refusal) => Err(TemplateError::Refused { what: refusal.clone().unwrap_or_default() }),
        };
        if got != expected {
            wrong.push(format!(
                "{} on {}:\n  got      {got:?}\n  expected {expected:?}",
                case.template, case.conversation
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
