//! R4.1: compares chat templates with Hugging Face's own rendering (`fixtures/templates/make.py`).

use crate::fixtures;
use exo_engines::template::{ChatTemplate, Conversation, TemplateError};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

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

/// One small template, and what transformers' Jinja renders; `None` where it raises an exception.
#[derive(Deserialize)]
struct JinjaCase {
    name: String,
    template: String,
    context: serde_json::Map<String, serde_json::Value>,
    expected: Option<String>,
}

/// R4.1: filters, tests, methods and operators give what Python's Jinja gives (`fixtures/templates/jinja.json`), but
/// for the differences that `jinja_known.txt` lists: syntax that no published template uses.
#[test]
fn jinja_behaves_as_pythons() {
    let read = |name: &str| std::fs::read_to_string(fixtures().join("templates").join(name)).expect("it is there");
    let cases: Vec<JinjaCase> = serde_json::from_str(&read("jinja.json")).expect("a list of cases");
    let known = read("jinja_known.txt");
    let known: BTreeSet<&str> = known.lines().filter(|line| !line.starts_with('#')).collect();
    let mut wrong = Vec::new();
    for mut case in cases {
        let mut part = |key: &str| case.context.remove(key).filter(|value| !value.is_null());
        let messages = part("messages").map(|value| serde_json::from_value(value).expect("messages"));
        let tools = part("tools").map(|value| serde_json::from_value(value).expect("tools"));
        let given = Conversation {
            messages: messages.unwrap_or_default(),
            tools: tools.unwrap_or_default(),
            arguments: case.context,
        };
        let now = chrono::NaiveDate::from_ymd_opt(2026, 1, 2).and_then(|day| day.and_hms_opt(3, 4, 5)).expect("a time");
        let template = ChatTemplate::new(&case.template, Some("<s>"), Some("</s>"));
        let got = template.and_then(|template| template.render(&given, now));
        // Where Jinja raises an exception, a rendering does no harm.
        let is_same = case.expected.is_none() || got.as_ref().ok() == case.expected.as_ref();
        if is_same == known.contains(case.name.as_str()) {
            wrong.push(format!("{}: {}\n  got      {got:?}\n  expected {:?}", case.name, case.template, case.expected));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
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
